"""Fusions of the models' predictions rather than their parameters."""
