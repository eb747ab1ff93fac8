"""Fusions that average: the weighted mean, and means that correct for local steps or losses."""
