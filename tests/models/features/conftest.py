"""A tiny language model."""

from tests.support.language_models import language_model

__all__ = ["language_model"]  # fixtures
