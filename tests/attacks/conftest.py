"""Attacks use the fixtures of the rooms that they attack."""

from tests.cli.conftest import _logging_as_it_was, cotune, folder
from tests.client.conftest import make_plan, make_site, records, state_for
from tests.server.conftest import new_run

__all__ = ["_logging_as_it_was", "cotune", "folder", "make_plan", "make_site", "new_run", "records", "state_for"]  # fixtures
