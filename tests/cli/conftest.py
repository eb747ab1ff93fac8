"""A folder with a toy plan and its data, and the console script, called in this process or as a process of its own."""

from __future__ import annotations

import torch

from tests.support.console import _logging_as_it_was, cotune, folder, script, started

__all__ = ["_logging_as_it_was", "cotune", "folder", "script", "started"]  # fixtures

torch.set_num_threads(1)  # with more, tiny models spend their time waiting for a core whenever the machine is shared
