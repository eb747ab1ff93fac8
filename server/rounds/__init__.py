"""The rounds of a run: who is asked, what comes back, whether it may enter the model, and how it is fused."""
