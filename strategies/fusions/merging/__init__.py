"""Fusions of the model-merging literature."""
