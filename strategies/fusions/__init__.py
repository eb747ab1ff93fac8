"""Fusions: how the deltas of a round become one. One rule per file, found automatically."""
