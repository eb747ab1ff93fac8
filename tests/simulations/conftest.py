"""A toy federation: a tiny bert, 240 sentences with something to learn in them, and the plan that trains its head."""

from __future__ import annotations

import torch

from tests.support.multi_task import multi_plan, tagged_plan
from tests.support.processes import cotune, forked
from tests.support.simulations import plan_file, toy_data, toy_plan

__all__ = ["cotune", "forked", "multi_plan", "plan_file", "tagged_plan", "toy_data", "toy_plan"]  # fixtures

torch.set_num_threads(1)  # with more, tiny models spend their time waiting for a core whenever the machine is shared
