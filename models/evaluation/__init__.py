"""Evaluate a finished model on labeled records, with confidence intervals."""
