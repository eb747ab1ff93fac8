"""A tiny language model, and a plan of two tasks."""

from tests.support.language_models import language_model
from tests.support.multi_task import multi_plan

__all__ = ["language_model", "multi_plan"]  # fixtures
