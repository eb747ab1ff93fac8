"""Accounting of ε: for a sequence of steps, and for several runs together."""
