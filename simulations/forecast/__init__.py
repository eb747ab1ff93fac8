"""What a plan will do, before it does it: noise, ε, bytes and time."""
