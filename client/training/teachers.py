"""Noisy votes of teachers, in place of noise in training: PATE with Confident-GNMax (Papernot et al., ICLR 2018, algorithm 1,
https://arxiv.org/abs/1802.08908).

The organization's records are dealt to K teachers by a hash of each unit, which no other unit has a part in: one that comes or
goes changes a single teacher, whose vote moves from one class to another. So the counts of an input change by √2 in L2, and the
largest of them by 1. With counts n_j, noise multiplier s and plan values T (a part of K) and c:

    if max_j n_j + N(0, (c·s)²) ≥ T:  release argmax_j (n_j + N(0, (√2·s)²)),  else nothing.

Each released vote is a Gaussian mechanism at the multiplier s, each check one at c·s. At most `answers` votes are released, and
all of them and all checks are charged before a record is touched, whatever comes (the data-independent bound: the data-dependent
one is smaller, and itself reveals something about the records).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cotune.client.run_account import Account
from cotune.client.training.charged_steps import TrainedRound
from cotune.client.training.checks.request_checks import BEFORE_CHARGE, run_checks
from cotune.client.training.disclosures import disclose
from cotune.client.training.personal.prediction_model import OwnModel
from cotune.client.training.preparation import PreparedRound
from cotune.client.training.stage_setup.optimizer import build_optimizer
from cotune.models.trainable import State
from cotune.plan.public import SCORES
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.config import PateConfig, RecordPrivacy
from cotune.privacy.mechanisms.grid_noise import add_gaussian_noise
from cotune.strategies.types import Delta

_ROUNDING = 2.0**-17  # of the sensitivity, for each entry's step on the grid: see `Account.noised`


def vote_with_privacy(prepared: PreparedRound) -> tuple[TrainedRound, Delta]:
    """Train the teachers, and return their votes with noise; all is charged before a record takes part in it.

    Raises:
        PrivacyError, PolicyError: The budget does not suffice.
    """
    context = prepared.context
    plan = context.plan
    personal = prepared.personal
    assert isinstance(plan.privacy, RecordPrivacy)
    assert plan.privacy.pate is not None
    assert isinstance(personal, OwnModel)
    run_checks(BEFORE_CHARGE, context)
    sigma = context.noise_multiplier
    disclosed = disclose(context.account, context.round, prepared.setup)
    charged = Steps(sigma, 1.0, plan.charged_steps(context.stage, context.examples))
    charge = context.account.reserve(context.round, charged)
    counts = _count_votes(prepared, personal, plan.privacy.pate.teachers)
    released = release(counts, plan.privacy.pate, sigma, context.account)
    context.account.settle(charge, charged, charged.count)
    trained = TrainedRound(context.stage.local.steps_per_round(context.examples), disclosed, context.account.reported_epsilon())
    return trained, {SCORES: released - context.state[SCORES]}


def release(counts: Tensor, pate: PateConfig, sigma: float, account: Account) -> Tensor:
    """Return 1 for the class that each released vote names, and rows of zeros for inputs without one, in float32.

    Args:
        counts: (inputs, classes), how many teachers name each class, in float64.
        pate: Threshold, and how many votes are released at most.
        sigma: s, the noise multiplier of a vote.
        account: Whose generator makes the noise.
    """
    classes = counts.shape[1]
    largest = counts.max(dim=1).values
    enlarged = 1 + _ROUNDING
    checked = add_gaussian_noise(largest, enlarged, sigma * pate.threshold_noise, account.generator)
    chosen = torch.nonzero(checked >= pate.threshold * pate.teachers).flatten()[: pate.answers]
    found = torch.zeros(counts.shape, dtype=torch.float32)
    if len(chosen):
        sensitivity = math.sqrt(2) * (1 + _ROUNDING * math.sqrt(classes))
        noised = add_gaussian_noise(counts[chosen], sensitivity, sigma, account.generator)
        found[chosen] = functional.one_hot(noised.argmax(dim=1), classes).float()
    return found


def deal(identities: Sequence[bytes], teachers: int, seed: int) -> list[list[int]]:
    """Return the numbers of the units of each teacher. Where a unit goes depends on that unit and the seed alone.

    Args:
        identities: Of each unit.
        teachers: How many there are.
        seed: The plan's.
    """
    dealt: list[list[int]] = [[] for _ in range(teachers)]
    for number, identity in enumerate(identities):
        digest = hashlib.sha256(seed.to_bytes(8, "big") + identity).digest()
        dealt[int.from_bytes(digest[:8], "big") % teachers].append(number)
    return dealt


def _count_votes(prepared: PreparedRound, personal: OwnModel, teachers: int) -> Tensor:
    """(inputs, classes): how many teachers name each class; a teacher that cannot read an input says nothing."""
    context = prepared.context
    shape = context.state[SCORES].shape
    counts = torch.zeros(shape, dtype=torch.float64)
    for units in deal(context.account.dataset.get_unit_identities(), teachers, context.plan.seed):
        state = _train_teacher(prepared, units)
        scores = personal.public.predict({**prepared.received, **state}, list(prepared.parameters))
        votes = functional.one_hot(scores.nan_to_num().argmax(dim=1), shape[1]).double()
        counts += votes.masked_fill(scores.isnan().any(dim=1, keepdim=True), 0.0)
    context.model.load(prepared.received)
    return counts


def _train_teacher(prepared: PreparedRound, units: Sequence[int]) -> State:
    """Train on some units alone, by as many steps as the plan gives, each on all of them; without any, on nothing."""
    context = prepared.context
    setup = prepared.setup
    names = list(prepared.parameters)
    context.model.load(prepared.received)
    rows = [row for unit in units for row in setup.units[unit]]
    optimizer = build_optimizer(context.stage.local, context.model, names, list(prepared.parameters.values()))
    for _ in range(context.stage.local.steps_per_round(context.examples) if rows else 0):
        setup.set_mean_gradients(optimizer, rows)
        optimizer.step()
    state = context.model.state(names)  # one that diverged votes all the same: a failure would reveal something about its records
    return {name: tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for name, tensor in state.items()}
