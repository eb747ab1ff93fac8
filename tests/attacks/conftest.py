"""Attacks use the fixtures of the rooms that they attack."""
