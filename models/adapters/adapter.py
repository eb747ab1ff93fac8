"""A LoRA layer by the names of its parameters, for rules that put adapters together; and how its A is drawn."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapter:
    """W + s·B·A: A (r, d_in), B (d_out, r), W (d_out, d_in), s the scale, r the rank.

    transposed: W is kept as (d_in, d_out), as GPT-2's linear layers do.
    """

    a: str
    b: str
    weight: str
    scale: float
    rank: int
    transposed: bool = False


def parameter_seed(seed: int, name: str) -> int:
    """A seed for one tensor, from the plan's."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def init_lora_a(shape: tuple[int, ...], seed: int) -> Tensor:
    """A fresh A (r, d_in), as peft draws it, but the same on every machine: float32 on the CPU."""
    drawn = torch.empty(shape)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    return drawn
