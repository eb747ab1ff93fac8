"""Attacks use the fixtures of the rooms that they attack."""

from tests.support.console import _logging_as_it_was, cotune, folder
from tests.support.run_folders import new_run
from tests.support.sites import make_plan, make_site, records, state_for

__all__ = ["_logging_as_it_was", "cotune", "folder", "make_plan", "make_site", "new_run", "records", "state_for"]  # fixtures
