"""Updates of a smaller rank: admitted where the plan allows them, and where their factors agree."""

from __future__ import annotations

import pytest
import torch

from cotune.models.adapters.adapter import Adapter
from cotune.server.rounds.updates.update_validation import UpdateSpec
from cotune.strategies.types import Update

LAYER = Adapter(a="x.a", b="x.b", weight="x", scale=2.0, rank=4)
SHAPES = {"x.a": torch.zeros(4, 7), "x.b": torch.zeros(5, 4), "head": torch.zeros(3)}
TALL = {"x.b": SHAPES["x.b"], "head": SHAPES["head"]}  # a round that trains B alone


def verdict(*, allowed: bool = True, only_b: bool = False, **shapes: tuple[int, ...]) -> str | None:
    """a, b, head: the shapes that came."""
    expected = TALL if only_b else SHAPES
    names = {"a": "x.a", "b": "x.b", "head": "head"}
    came = {name: torch.zeros(shapes.get(short, expected[name].shape)) for short, name in names.items() if name in expected}
    update = Update("clinic", 1, came, examples=5, steps=1)
    smaller = (LAYER,) if allowed else ()
    return UpdateSpec(round=1, shapes=expected, smaller_ranks=smaller).validate(update, "clinic").reason or None


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_any_smaller_rank_passes(rank: int) -> None:
    assert verdict(a=(rank, 7), b=(5, rank)) is None
    assert verdict(b=(5, rank), only_b=True) is None


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"a": (2, 7)}, "x.b has the shape (5, 4), expected (5, 2)"),
        ({"a": (3, 7), "b": (5, 2)}, "x.a has the shape (3, 7), expected (2, 7)"),
        ({"a": (2, 6), "b": (5, 2)}, "x.a has the shape (2, 6), expected (2, 7)"),
        ({"a": (2, 7), "b": (4, 2)}, "x.b has the shape (4, 2), expected (5, 2)"),
        ({"a": (0, 7), "b": (5, 0)}, "x.a has the shape (0, 7), expected (4, 7)"),
        ({"a": (5, 7), "b": (5, 5)}, "x.a has the shape (5, 7), expected (4, 7)"),
        ({"a": (2,), "b": (5, 2)}, "x.a has the shape (2,), expected (2, 7)"),
        ({"a": (), "b": ()}, "x.a has the shape (), expected (4, 7)"),
        ({"a": (2, 7), "b": (5, 2), "head": (2,)}, "head has the shape (2,), expected (3,)"),
    ],
)
def test_what_does_not_agree_is_refused(shapes: dict[str, tuple[int, ...]], reason: str) -> None:
    assert verdict(**shapes) == reason


def test_smaller_rank_needs_the_consent_of_the_plan() -> None:
    assert verdict(allowed=False) is None
    assert verdict(allowed=False, a=(2, 7), b=(5, 2)) == "x.a has the shape (2, 7), expected (4, 7)"
