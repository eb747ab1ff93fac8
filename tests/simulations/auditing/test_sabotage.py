"""Does anything notice when differential privacy is broken on purpose? Every check here passes on the real code and fails on its sabotage.

sabotage                                        caught by
(1) gradients are not clipped                   check_contribution, and the audit
(2) a quarter of the noise                      check_noise, and the audit
(3) noise that a plan's seed predicts           check_unpredictable, and the audit
(4) shuffled batches under Poisson accounting   check_sampling (an audit does not see it)
(5) a fresh accountant in every round           check_composition (an audit counts the steps itself: it does not see it)
(6) noise 1 % too small                         the audit's test of the drawn noise (no attack on canaries sees it)

Thresholds are quantiles of exact distributions at one in a billion; those of the audit hold with a confidence of 1 − 10⁻⁷.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from cotune.client.site import Site
from cotune.client.training import charged_steps as training
from cotune.client.training.round import train_round
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.ledger.ledger import create_run_ledger
from cotune.privacy.mechanisms.dp_sgd import DPSGDConfig, DPSGDSetup, StepReport
from cotune.privacy.mechanisms.per_example import Batch
from cotune.privacy.mechanisms.random_generators import PoissonSampler, seeded_generator
from cotune.simulations.auditing import training as audited_training
from cotune.simulations.auditing.audit import AuditResult, audit
from cotune.simulations.prepare import make_run, prepare
from tests.support.batches import in_batches, stack
from tests.support.engines import Steps, engine, take_steps
from tests.support.simulations import NewPlan

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
RARE = 1e-9


# --- sabotages


def unclipped(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
    """(1) The noise is that of the clip norm; the bound is a million times larger."""
    larger = replace(config, noise_multiplier=config.noise_multiplier / 1e6, clip_norm=config.clip_norm * 1e6)
    return take_steps(larger, setup)


def quarter_of_the_noise(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
    """(2)"""
    return take_steps(replace(config, noise_multiplier=config.noise_multiplier / 4), setup)


SEED = 7  # of the plan


def predictable_noise(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
    """(3) From the plan's seed, by the generator that everything reproducible comes from."""
    return take_steps(config, replace(setup, noise_generator=seeded_generator(SEED, "noise")))


def nearly_all_of_the_noise(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
    """(6)"""
    return take_steps(replace(config, noise_multiplier=config.noise_multiplier * 0.99), setup)


class _Shuffled(PoissonSampler):
    """Epochs of a data loader with shuffle=True: every record once per epoch, batches of one size."""

    def __iter__(self) -> Iterator[list[int]]:
        size = round(self.examples * self.sample_rate)
        left: list[int] = []
        for _ in range(self.steps):
            if len(left) < size:
                left = self.generator.permutation(self.examples).tolist()
            yield left[:size]
            left = left[size:]


def shuffled(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
    """(4)"""
    with patch("cotune.privacy.mechanisms.dp_sgd.PoissonSampler", _Shuffled):
        yield from take_steps(config, setup)


def fresh_accountant(site: Site) -> None:
    """(5) What was spent is forgotten between two rounds."""
    for file in site.ledger_file.parent.glob("ledger.sqlite*"):
        file.unlink()
    create_run_ledger(site.ledger_file)


# --- checks


def release(step: Steps, records: list[Batch], module: nn.Linear, **settings: Any) -> Tensor:
    """What steps of plain SGD move the module by, as the sum of the updates: Σ clipped gradients + noise."""
    chosen: dict[str, Any] = {"noise_multiplier": 1.0, "clip_norm": 1.0, "sample_rate": 1.0, "steps": 1, **settings}
    batches = in_batches(records, 4096, chosen.pop("collate", stack), fill=False)
    for p in module.parameters():
        nn.init.zeros_(p)
    batch = chosen["sample_rate"] * len(records)
    optimizer = torch.optim.SGD(module.parameters(), lr=batch)
    units = [[i] for i in range(len(records))]

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(module(batch["x"]), batch["y"], reduction="none")

    setup = DPSGDSetup(module.train(), optimizer, loss, units, batches)
    for _ in step(DPSGDConfig(expected_batch=batch, **chosen), setup):
        pass
    return -torch.cat([p.detach().flatten() for p in module.parameters()])


def record(scale: float = 1.0, inputs: int = 8) -> Batch:
    return {"x": torch.linspace(-1, 1, inputs) * scale, "y": torch.tensor(1)}


def check_contribution(steps: Steps) -> None:
    """A single record moves the sum by C at most, however steep its loss; a flat one is not stretched."""
    for clip in (0.1, 1.0):
        for scale in (1e-3, 1.0, 1e3, 1e6):
            found = release(steps, [record(scale)], nn.Linear(8, 3), noise_multiplier=0.0, clip_norm=clip)
            assert float(found.norm()) <= clip * (1 + 1e-5), f"a record contributed {float(found.norm()):g}, C = {clip:g}"


def check_noise(steps: Steps) -> None:
    """Where no record has a gradient, a step is noise: each coordinate N(0, (σC)²), independent."""
    sigma = 1.3
    clip = 0.5
    module = nn.Linear(100, 200, bias=False)
    found = release(steps, [{"x": torch.zeros(100), "y": torch.tensor(0)}], module, noise_multiplier=sigma, clip_norm=clip)
    z = found.double().numpy() / (sigma * clip)
    low, high = stats.chi2.ppf([RARE / 2, 1 - RARE / 2], len(z))
    assert low <= float(z @ z) <= high, f"the noise's standard deviation is {z.std():.3f} times σC"
    assert abs(z.sum()) <= -stats.norm.ppf(RARE / 2) * np.sqrt(len(z))


def check_unpredictable(steps: Steps) -> None:
    """The same run in the same state of every generator that a plan could seed is another draw, in every coordinate."""
    drawn = []
    for _ in range(2):
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        drawn.append(release(steps, [record()], nn.Linear(8, 300)))
    same = float((drawn[0] == drawn[1]).double().mean())
    assert same < 0.01, f"{same:.0%} of the noise was the same in two runs"
    assert not torch.allclose(attacked(drawn[0]), exact_sum(), atol=1e-3), "the plan's seed takes the noise away"


def attacked(released: Tensor) -> Tensor:
    """Who knows the plan's seed draws the noise again and takes it away."""
    generator = seeded_generator(SEED, "noise")
    shapes = [p.shape for p in nn.Linear(8, 300).parameters()]
    noise = [generator.standard_normal(tuple(shape)).ravel().astype(np.float32) for shape in shapes]
    return released - torch.from_numpy(np.concatenate(noise))


def exact_sum() -> Tensor:
    return release(take_steps, [record()], nn.Linear(8, 300), noise_multiplier=0.0)


def check_sampling(steps: Steps) -> None:
    """Poisson: each record is in each batch by a coin of its own. By exact tests of what shuffled epochs do otherwise."""
    examples = 200
    rate = 0.1
    count = 200
    seen = presence(steps, examples, rate, count)

    def usual(found: int, trials: int, probability: float, what: str) -> None:
        low, high = stats.binom.ppf([RARE / 2, 1 - RARE / 2], trials, probability)
        assert low <= found <= high, f"{what}: {found} of {trials}, expected {low:.0f} to {high:.0f}"

    usual(int(seen.sum()), examples * count, rate, "records in batches")
    sizes = seen.sum(axis=1)
    usual(int((sizes == examples * rate).sum()), count, stats.binom.pmf(examples * rate, examples, rate), "batches of one size")
    epoch = round(1 / rate)
    usual(int((~seen[:epoch].any(axis=0)).sum()), examples, (1 - rate) ** epoch, "records that an epoch leaves out")
    usual(int((seen[::2] & seen[1::2]).sum()), examples * (count // 2), rate**2, "records in two batches running")


def presence(steps: Steps, examples: int, rate: float, count: int) -> np.ndarray:
    """(steps, records): which record was in which batch."""
    found = np.zeros((count, examples), dtype=bool)
    at = 0

    def collate(rows: list[Batch]) -> Batch:
        found[at, [int(row["number"]) for row in rows]] = True
        return stack(rows)

    def watched(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
        nonlocal at
        for report in steps(config, setup):
            yield report
            at += 1

    records = [{**record(inputs=2), "number": torch.tensor(i)} for i in range(examples)]
    release(watched, records, nn.Linear(2, 2), sample_rate=rate, steps=count, collate=collate)
    assert at == count
    return found


def check_composition(plan: Plan, folder: Path, between_rounds: Callable[[Site], None]) -> None:
    """What an organization says that it has spent is the composition of all steps that ran, and within the plan's ε."""
    prepared = prepare(plan, "cpu")
    make_run(prepared, folder, "in-process", "cpu")
    site = Site(folder / "sites" / "org-1")
    resolved = prepared.plan
    assert resolved.privacy != "none"
    model = get_plan_model(resolved, "cpu")
    model.load({})
    state = model.state(model.names("head"))
    ran: list[tuple[float, float]] = []

    def watched(config: DPSGDConfig, setup: DPSGDSetup) -> Iterator[StepReport]:
        for report in take_steps(config, setup):
            ran.append((config.noise_multiplier, config.sample_rate))
            yield report

    with patch.object(training, "DPSGD", engine(watched)):
        for round in range(1, resolved.rounds + 1):
            update = train_round(resolved, site, round, state)
            state = {name: tensor + update.delta[name] for name, tensor in state.items()}
            between_rounds(site)
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for (sigma, rate), count in Counter(ran).items():
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), count)
    truth = accountant.get_epsilon(resolved.privacy.delta_for(prepared.shares[0].public_examples(resolved)))
    assert len(ran) == resolved.rounds * resolved.local.steps
    assert update.epsilon is not None
    assert update.epsilon == pytest.approx(truth, rel=5e-3), f"said {update.epsilon:.2f}, spent {truth:.2f}"
    assert update.epsilon >= truth * (1 - 1e-3)
    assert truth <= resolved.privacy.epsilon


# --- the real code passes, its sabotage does not


def test_clipping() -> None:
    check_contribution(take_steps)
    with pytest.raises(AssertionError, match="a record contributed"):
        check_contribution(unclipped)


def test_noise() -> None:
    check_noise(take_steps)
    with pytest.raises(AssertionError, match="standard deviation is 0.2[45]. times"):
        check_noise(quarter_of_the_noise)


def test_noise_cannot_be_drawn_again() -> None:
    check_unpredictable(take_steps)
    with pytest.raises(AssertionError, match="100% of the noise was the same"):
        check_unpredictable(predictable_noise)
    taken_away = attacked(release(predictable_noise, [record()], nn.Linear(8, 300)))
    assert torch.allclose(taken_away, exact_sum(), atol=1e-4)  # which is why it matters


def test_sampling() -> None:
    check_sampling(take_steps)
    with pytest.raises(AssertionError, match="batches of one size: 200 of 200"):
        check_sampling(shuffled)


def test_accounting(toy_plan: NewPlan, tmp_path: Path) -> None:
    plan = toy_plan(privacy={"epsilon": 3})
    check_composition(plan, tmp_path / "honest", lambda site: None)
    with pytest.raises(AssertionError, match=r"said 1\.\d+, spent 3\.00"):
        check_composition(plan, tmp_path / "sabotaged", fresh_accountant)


def audited(steps: Steps, plan: Plan) -> AuditResult:
    with patch.object(audited_training, "DPSGD", engine(steps)):
        return audit(plan, canaries=10_000, confidence=1 - 1e-7, device="cpu")


@pytest.mark.parametrize(
    ("steps", "broken"),
    [(take_steps, False), pytest.param(unclipped, True, marks=pytest.mark.long), (quarter_of_the_noise, True)],
    ids=["honest", "unclipped", "quarter of the noise"],
)
def test_the_audit(toy_plan: NewPlan, steps: Steps, broken: bool) -> None:
    """Where an audit of one run has power, so that no sabotage is missed by chance: of the surest 1,250 guesses, 35 may be wrong.

    With a quarter of the noise 8.6 are on average (simulated), a Poisson variable that exceeds 35 once in 10¹¹ audits.
    """
    plan = toy_plan(privacy={"epsilon": 2, "delta": 1e-5}, rounds=1, local={"steps": 3, "momentum": 0.0, "batch_size": 0.98})
    result = audited(steps, plan)
    assert result.broken == broken
    assert (result.at_least > result.epsilon) == broken
    assert result.power > 3


@pytest.mark.parametrize(
    ("steps", "fault"),
    [(nearly_all_of_the_noise, "too little noise"), (predictable_noise, "the noise repeats itself")],
    ids=["99 % of the noise", "predictable noise"],
)
def test_the_audit_of_the_drawn_noise(toy_plan: NewPlan, steps: Steps, fault: str) -> None:
    """Half a million draws: a deviation of 1 % lies ten standard errors away, six are refused."""
    plan = toy_plan(privacy={"epsilon": 2, "delta": 1e-5}, rounds=1, local={"steps": 1, "momentum": 0.0, "batch_size": 0.98})
    with patch.object(audited_training, "DPSGD", engine(steps)):
        result = audit(plan, canaries=64, confidence=1 - 1e-7, device="cpu")
    assert result.broken
    assert any(fault in found for found in result.faults)
    assert result.at_least <= result.epsilon
