"""Fusions of what the models predict, rather than of their parameters."""
