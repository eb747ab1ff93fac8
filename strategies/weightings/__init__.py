"""Weightings: how much each update counts, before normalisation. One rule a file, found by itself."""
