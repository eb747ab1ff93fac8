"""DP-SGD and its noise: what a unit contributes to a sum, and how the sum is made private."""
