"""Attacks use the fixtures of the rooms that they attack."""

from tests.server.conftest import new_run

__all__ = ["new_run"]
