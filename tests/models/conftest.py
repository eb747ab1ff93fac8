"""A tiny model of any architecture, ready to be shared, and texts of unequal length for it."""

from __future__ import annotations

import torch

from tests.support.tiny_models import shared, texts

__all__ = ["shared", "texts"]  # fixtures

torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other
