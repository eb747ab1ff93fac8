"""Canaries are what they are said to be: exactly C each, nobody else's business, and no trace of who is held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from cotune.privacy.auditing.canaries import PlantedCanaries, build_canaries, flip_coins, plant
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup
from cotune.privacy.mechanisms.per_example import Batch
from tests.support.batches import in_batches, stack

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
CLIP = 0.25
CANARIES_IN = np.array([True, False, True, True, False])
RECORDS_IN = np.array([True, True, False, False, True, False])


class Toy:
    """A linear classifier, six records, five canaries."""

    slots = 64

    def __init__(
        self,
        canaries_in: np.ndarray = CANARIES_IN,
        records_in: np.ndarray = RECORDS_IN,
        scale: float = 1.0,
        rows_each: int = 1,
        promised_to_rows: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.module = nn.Linear(4, 3).train()
        nn.init.zeros_(self.module.weight)
        nn.init.zeros_(self.module.bias)
        self.records = [{"x": torch.randn(4, generator=generator) * scale, "y": torch.tensor(i % 3)} for i in range(6)]
        self.planted: PlantedCanaries = plant(
            self.module,
            [[i] for i in range(6)],
            lambda rows: in_batches(self.records, self.slots)(rows),
            self.loss,
            canaries=build_canaries(5, torch.device("cpu")),
            canaries_in=canaries_in,
            units_in=records_in,
            clip_norm=CLIP,
            rows_each=rows_each,
        )
        if promised_to_rows:
            self.planted = replace(self.planted, units=[[row] for unit in self.planted.units for row in unit])

    def loss(self, batch: Batch) -> Tensor:
        return functional.cross_entropy(self.module(batch["x"]), batch["y"], reduction="none")

    def step(self, slots: int = 64) -> tuple[Tensor, list[Tensor]]:
        """The sum of one step without noise over all rows: of the canaries, and of the module."""
        before = [p.detach().clone() for p in (self.planted.canaries, *self.module.parameters())]
        optimizer = torch.optim.SGD([self.planted.canaries, *self.module.parameters()], lr=11.0)  # 6 + 5 rows: B = 11
        p = self.planted
        config = DPSGDConfig(noise_multiplier=0.0, clip_norm=CLIP, sample_rate=1.0, expected_batch=11.0, steps=1)
        self.slots = slots
        list(DPSGD(config).run(DPSGDSetup(p.module, optimizer, p.loss, p.units, p.batches)))
        after = [p.detach() for p in (self.planted.canaries, *self.module.parameters())]
        moved = [b - a for b, a in zip(before, after, strict=True)]
        return moved[0][:, 0], moved[1:]

    def clipped(self, row: int) -> list[Tensor]:
        gradients = torch.autograd.grad(self.loss(stack([self.records[row]])).sum(), list(self.module.parameters()))
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        return [g * min(1.0, CLIP / norm) for g in gradients]


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_a_canary_that_is_in_contributes_exactly_the_clip_norm(slots: int) -> None:
    canaries, _ = Toy().step(slots)
    expected = torch.tensor([0.0, *(CLIP if present else 0.0 for present in CANARIES_IN)])
    assert torch.allclose(canaries, expected, atol=1e-6)


@pytest.mark.parametrize("slots", [1, 4, 64])
@pytest.mark.parametrize("rows", [2, 5])
def test_a_canary_of_many_rows_is_one_unit(slots: int, rows: int) -> None:
    """It contributes C once; an engine that clips each row by itself lets it contribute C for every row."""
    wanted = torch.tensor([0.0, *(CLIP if present else 0.0 for present in CANARIES_IN)])
    toy = Toy(rows_each=rows)
    assert [len(unit) for unit in toy.planted.units] == [1] * 6 + [rows] * 5
    assert sorted(row for unit in toy.planted.units for row in unit) == list(range(6 + 5 * rows))
    assert torch.allclose(toy.step(slots)[0], wanted, atol=1e-6)
    assert torch.allclose(Toy(rows_each=rows, promised_to_rows=True).step(slots)[0], rows * wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_records_contribute_what_they_would_without_canaries(scale: float, rows: int) -> None:
    toy = Toy(scale=scale, rows_each=rows)
    wanted = [sum(parts) for parts in zip(*(toy.clipped(int(i)) for i in np.flatnonzero(RECORDS_IN)), strict=True)]
    _, found = toy.step()
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, torch.as_tensor(other), atol=1e-5)


def test_with_everybody_held_out_nothing_moves() -> None:
    canaries, module = Toy(np.zeros(5, bool), np.zeros(6, bool)).step()
    assert not canaries.any()
    assert not any(p.any() for p in module)


def test_the_number_of_rows_does_not_tell_who_is_in() -> None:
    sizes = {len(Toy(flip_coins(5, np.random.default_rng(i)), RECORDS_IN).planted.units) for i in range(5)}
    assert sizes == {11}


def test_a_coin_for_each_and_no_more() -> None:
    with pytest.raises(ValueError, match="expected a coin for each of 5 canaries and 6 units, got 4 and 6"):
        Toy(canaries_in=np.ones(4, bool))


def test_coins_are_fair() -> None:
    low, high = stats.binom.ppf([1e-9, 1 - 1e-9], 100_000, 0.5)
    coins = flip_coins(100_000, np.random.default_rng(0))
    assert low <= coins.sum() <= high
    assert low / 2 <= (coins[1:] & coins[:-1]).sum() <= high / 2
