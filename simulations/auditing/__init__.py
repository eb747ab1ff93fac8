"""Attacks on a plan's own training, to hold what they prove against the ε that is claimed."""
