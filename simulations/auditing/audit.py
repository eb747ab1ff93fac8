"""An audit: the plan's own steps on an organization's records with canaries among them, attacked, and compared with the claim.

Trained is what the organization would train: the same module, loss, optimizer, clip norm, σ, sampling and number of steps, by the
same `DPSGD`, round after round from its own updates. Anyone who attacks sees every delta. Nothing leaves this process and
no ledger is opened: an audit releases nothing but its result, which is for the organization's own eyes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cotune.client.noise_calibration import check_examples, get_budget, noise_multiplier
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.site_folder import SitePaths
from cotune.data.dataset import Dataset, DatasetManifest
from cotune.data.inputs.chat_wording import wording_of
from cotune.errors import DataError, PlanError, PrivacyError, nearest
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.accounting.composition import MIN_NOISE_MULTIPLIER, Steps, epsilon
from cotune.privacy.accounting.tradeoff import trade_off
from cotune.privacy.auditing import stepwise
from cotune.privacy.auditing.canaries import flip_coins
from cotune.privacy.auditing.drawn_noise import DrawnNoise
from cotune.privacy.auditing.lower_bounds import (
    Evidence,
    build_perfect_evidence,
    evidence,
    import_auditing,
    lower_bound_any,
    lower_bound_steps,
)
from cotune.privacy.auditing.stepwise import Separation, perfect, refutes, separation
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.random_generators import private_generator
from cotune.privacy.policy import Policy
from cotune.server.runs.run_folder import RunFolder
from cotune.simulations.auditing.adversarial import Probe
from cotune.simulations.auditing.canary_sentences import (
    Memorization,
    add_sentences,
    can_hold_sentences,
    draw_sentences,
    measure_memorization,
    number_units,
    only_sentences,
)
from cotune.simulations.auditing.training import AuditedTraining, Targets
from cotune.simulations.prepare import prepare

_TESTS = 6  # two attacks by two theorems, that on every step, the noise: each takes an equal part of the allowed probability
_TESTS_OF_SENTENCES = 2  # one more attack by two theorems
_REFERENCES = 1000  # sentences that were never trained on, among which each is ranked


@dataclass(frozen=True)
class Attack:
    """What was attacked and found.

    Attributes:
        name: Of the attack.
        targets: How many records or canaries were attacked.
        auc: Of the attack's scores.
        at_least_any: Lower bound on ε for any mechanism.
        at_least: Lower bound on ε for the claimed steps.
        power: What `at_least` would be after an attack without a mistake; a claim above it cannot be refuted by so few targets.
    """

    name: str
    targets: int
    auc: float
    at_least_any: float
    at_least: float
    power: float


@dataclass(frozen=True)
class AuditResult:
    """The claim (ε at δ of `steps` steps) and what the attacks prove. The bounds hold together with `confidence`.

    Attributes:
        tight: Whether one step of all records was audited in each stage, see `tightened`.
        noise: What was drawn, in each stage.
        states: What adversarial states led to; exact, without any chance.
        memorization: What is known of canary sentences; None where records are no texts that a model writes.
    """

    plan: str
    plan_id: str
    organization: str
    tight: bool
    examples: int
    rounds: int
    rounds_planned: int
    steps: int
    noise_multiplier: float
    clip_norm: float
    epsilon: float
    delta: float
    confidence: float
    attacks: tuple[Attack, ...]
    noise: tuple[DrawnNoise, ...]
    states: tuple[Probe, ...]
    memorization: Memorization | None
    seconds: float

    @property
    def at_least(self) -> float:
        """The largest of the lower bounds."""
        return max(max(attack.at_least, attack.at_least_any) for attack in self.attacks)

    @property
    def power(self) -> float:
        """The largest ε that could have been shown."""
        return max(attack.power for attack in self.attacks)

    @property
    def broken(self) -> bool:
        """Whether the claim is refuted."""
        return self.at_least > self.epsilon or bool(self.faults)

    @property
    def faults(self) -> tuple[str, ...]:
        """What was found wrong inside the steps, in sentences."""
        drawn = [fault for noise in self.noise for fault in noise.faults]
        led = [
            f"{probe.state}: a record moves the sum by {probe.contribution:.6g} C, through others by {probe.influence:.2g} C, and"
            f" {probe.off_grid:.0%} of what is released is off the grid"
            for probe in self.states
            if probe.broken
        ]
        return (*drawn, *led)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": 3,
            **asdict(self),
            "at_least": self.at_least,
            "power": self.power,
            "faults": self.faults,
            "broken": self.broken,
        }


def audit(
    source: Plan | Path,
    *,
    organization: str | None = None,
    canaries: int = 2000,
    rounds: int | None = None,
    tight: bool = False,
    confidence: float = 0.95,
    device: str | None = None,
    sentences: int = 64,
) -> AuditResult:
    """Audit a plan on records that its simulation gives to an organization, or the plan of a run on records of one of its own.

    Args:
        source: A plan, or the folder of a run, which is only read.
        organization: Whose records; None: the first organization's.
        canaries: How many targets of each kind (of records, no more than there are).
        rounds: How many of the plan's are audited; the claim is that of the audited ones. None: all.
        tight: Audit `tightened` steps instead of the plan's own.
        confidence: Of all lower bounds together.
        device: auto, cpu, cuda or cuda:N; None: the run's, or auto.
        sentences: How many canary sentences are put among texts that a model learns to write; 0: none.

    Raises:
        PrivacyError: When there is nothing to audit.
        CotuneError: What `prepare` raises.
    """
    audited = _of_run(source, organization) if isinstance(source, Path) else _of_plan(source, organization, device or "auto")
    asked = _Asked(canaries, sentences if can_hold_sentences(audited.dataset) else 0, rounds, tight, confidence)
    return _audit(audited, asked, device or audited.device)


@dataclass(frozen=True)
class _Asked:
    """What is audited, and by how much: see `audit`."""

    canaries: int
    sentences: int
    rounds: int | None
    tight: bool
    confidence: float


@dataclass(frozen=True)
class _Audited:
    """Whose training is attacked.

    Attributes:
        examples: The public number of records, which decides rate, batch, σ and δ as in training.
    """

    plan: Plan
    policy: Policy
    examples: int
    dataset: Dataset
    name: str
    device: str


def _of_plan(plan: Plan, organization: str | None, device: str) -> _Audited:
    _check(plan)
    prepared = prepare(plan, device)
    name = _chosen(organization, [share.name for share in prepared.shares])
    share = next(share for share in prepared.shares if share.name == name)
    resolved = prepared.plan
    tasks = share.tasks or tuple(task.name for task in resolved.tasks)
    dataset = Dataset(((prepared.held(share), share.rows),), resolved.labels, resolved.task, tasks=tasks)
    dataset = dataset.bound_contributions(resolved.privacy, resolved.seed)
    return _Audited(resolved, share.policy(resolved), share.public_examples(resolved), dataset, name, device)


def _of_run(path: Path, organization: str | None) -> _Audited:
    folder = RunFolder(path)
    _check(folder.plan)
    name = _chosen(organization, [who.name for who in folder.file.participants])
    site = next(who.site for who in folder.file.participants if who.name == name)
    dataset = DatasetManifest.read(SitePaths(folder.path / site).records, folder.plan.labels)
    dataset = dataset.bound_contributions(folder.plan.privacy, folder.plan.seed)
    at = Site(folder.path / site)
    policy = at.policy()
    examples = Account(folder.plan, policy, at, dataset, draws=False).public_examples
    return _Audited(folder.plan, policy, examples, dataset, name, folder.file.device)


def _check(plan: Plan) -> None:
    """Before anything is read: that there is something to audit, and the means to."""
    if not isinstance(plan.privacy, RecordPrivacy):
        raise PrivacyError(
            "the plan says privacy = none: expected one that claims an ε, for there is nothing else to audit",
            code="privacy.nothing_to_audit",
        )
    import_auditing()


def _chosen(organization: str | None, names: Sequence[str]) -> str:
    if organization is not None and organization not in names:
        raise DataError(
            f'there is no organization "{organization}"{nearest(organization, names)}', code="data.unknown_organization"
        )
    return names[0] if organization is None else organization


def tightened(plan: Plan, examples: int) -> Plan:
    """Return the plan with one step of all records in each of its stages, in which its whole ε is spent.

    The engine, model, clip norm and ε are the plan's own. No sampling hides who is in, and what an attacker can learn comes
    in one sum: where Nasr et al. (USENIX Security 2023) find that bounds come nearest to the claim.

    Args:
        examples: The public number of records.
    """
    step = {"batch_size": float(examples), "steps": 1, "epochs": None}
    stages = [stage.model_copy(update={"rounds": 1, "local": stage.local.model_copy(update=step)}) for stage in plan.stages]
    return plan.model_copy(update={"train": tuple(stages), "rounds": len(stages)})


def _audit(source: _Audited, asked: _Asked, device: str) -> AuditResult:
    began = time.monotonic()
    plan = source.plan
    name = source.name
    examples = source.examples
    rounds = asked.rounds
    assert isinstance(plan.privacy, RecordPrivacy)
    audited = tightened(plan, examples) if asked.tight else plan
    planned = audited.rounds
    held = len(source.dataset.units)
    if rounds is not None and not 1 <= rounds <= planned:
        raise PlanError(
            f"expected 1 to {planned} rounds to audit, as many as the plan has, got {rounds}", code="plan.audited_rounds"
        )
    for stage in audited.stages:
        check_examples(examples, stage.local, name)
    coins = private_generator()
    drawn = draw_sentences(source.dataset, asked.sentences + _REFERENCES, coins, wording_of(plan.data)) if asked.sentences else ()
    dataset = add_sentences(source.dataset, drawn[: asked.sentences]) if drawn else source.dataset
    targets = _flip(source.dataset, dataset, asked, coins)
    budget = get_budget(plan.privacy, source.policy, examples)
    sigma = noise_multiplier(audited, source.policy, budget, examples, 1)
    delta = budget.delta
    error = (1 - asked.confidence) / (_TESTS + (_TESTS_OF_SENTENCES if drawn else 0))
    training = AuditedTraining(
        audited, plan.privacy, dataset, name, targets, sigma, get_plan_model(plan, device), error, examples
    )
    secrets = only_sentences(source.dataset, drawn) if drawn else None
    untrained = training.find_losses(secrets) if secrets else np.zeros(0)
    for round in range(1, (rounds or planned) + 1):
        training.play(round)
    found = {
        "canaries": evidence(training.canary_scores(), targets.canaries_in, coins),
        "records": evidence(training.record_scores, targets.records_in, coins),
    }
    memorization = None
    if secrets:
        losses = training.find_losses(secrets)
        learned = (untrained - losses)[: asked.sentences]
        found["canary sentences"] = evidence(learned, targets.sentences_in, coins)
        memorization = measure_memorization(losses[: asked.sentences], targets.sentences_in, losses[asked.sentences :])
    steps = [Steps(sigma, rate, count) for rate, count in training.taken.items()]
    claim = epsilon(steps, delta)
    attacks = [_attack(kind, e, steps, delta, error) for kind, e in found.items()]
    attacks.append(_stepwise(separation(training.step_scores, targets.canaries_in, claim), steps, delta, error))
    return AuditResult(
        plan=plan.name,
        plan_id=plan.plan_id,
        organization=name,
        tight=asked.tight,
        examples=held,
        rounds=rounds or planned,
        rounds_planned=planned,
        steps=sum(s.count for s in steps),
        noise_multiplier=sigma,
        clip_norm=plan.privacy.clip_norm,
        epsilon=claim,
        delta=delta,
        confidence=asked.confidence,
        attacks=tuple(attacks),
        noise=tuple(training.noise),
        states=tuple(training.probes),
        memorization=memorization,
        seconds=time.monotonic() - began,
    )


def _flip(own: Dataset, dataset: Dataset, asked: _Asked, coins: np.random.Generator) -> Targets:
    """Choose who is attacked, and flip a coin for each."""
    sentences = np.asarray(number_units(dataset, len(own)), dtype=np.int64)
    others = np.setdiff1d(np.arange(len(dataset.units)), sentences)
    records = np.sort(coins.choice(others, size=min(len(others), asked.canaries), replace=False))
    in_by_coin = (flip_coins(count, coins) for count in (asked.canaries, len(records), len(sentences)))
    canaries_in, records_in, sentences_in = in_by_coin
    return Targets(canaries_in, records, records_in, sentences, sentences_in)


def _attack(name: str, found: Evidence, steps: Sequence[Steps], delta: float, error: float) -> Attack:
    perfect = lower_bound_steps(build_perfect_evidence(found.targets), steps, delta, error)
    lower = lower_bound_any(found, delta, error), lower_bound_steps(found, steps, delta, error)
    return Attack(name, found.targets, found.auc, *lower, perfect)


def _stepwise(found: Separation, steps: Sequence[Steps], delta: float, error: float) -> Attack:
    """The attack of who sees every step; both of its bounds follow from the same intervals."""
    lower = stepwise.lower_bound_any(found, delta, error), stepwise.lower_bound_steps(found, steps, delta, error)
    return Attack("canaries, every step", found.members + found.others, found.auc, *lower, _power(found, steps, delta, error))


def _power(found: Separation, steps: Sequence[Steps], delta: float, error: float) -> float:
    """What an attack without a mistake would prove at least: ε of half the noise, where it refutes that."""
    half = [replace(s, noise_multiplier=s.noise_multiplier / 2) for s in steps]
    refuted = min(s.noise_multiplier for s in half) >= MIN_NOISE_MULTIPLIER and refutes(perfect(found), trade_off(half), error)
    return max(stepwise.lower_bound_any(perfect(found), delta, error), epsilon(half, delta) if refuted else 0.0)
