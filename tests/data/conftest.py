"""A tiny model of any architecture, and texts of unequal length for it."""

from tests.support.tiny_models import shared, texts

__all__ = ["shared", "texts"]  # fixtures
