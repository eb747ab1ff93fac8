"""Weightings: how much each update counts, before normalization. One rule per file, found automatically."""
