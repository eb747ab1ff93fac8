"""Weightings: how much each update counts, before normalization. One rule a file, found by itself."""
