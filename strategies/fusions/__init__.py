"""Fusions: how the deltas of a round become one. One rule a file, found by itself."""
