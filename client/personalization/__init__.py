"""Adapt the final model to an organization's own records, and compare it with training alone."""
