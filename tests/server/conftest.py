"""The folder of a small run, and a federation whose organizations are functions; model, grid and wire are the real ones."""

from __future__ import annotations

import torch

from tests.support.run_folders import new_run

__all__ = ["new_run"]  # fixtures

torch.set_num_threads(1)  # with more, tiny models spend their time waiting for a core whenever the machine is shared
