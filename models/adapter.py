"""A LoRA layer by the names of its parameters, for rules that put adapters together."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Adapter"]


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
