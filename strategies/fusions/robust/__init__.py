"""Fusions that withstand a few wrong or hostile updates."""
