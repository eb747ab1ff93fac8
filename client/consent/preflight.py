"""Check before joining what a plan means for an organization: the policy's verdict, the noise, and a step on its hardware.

The steps are taken on synthetic records of the greatest length that the plan allows. No record is trained on, nothing is charged,
and nothing is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from cotune.client.audit_log import AuditLog
from cotune.client.consent.policy_check import Violation, find_number_violations, find_violations, limit_gpu_memory
from cotune.client.node.requests import last_declarable_range
from cotune.client.noise_calibration import check_examples
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.site_setup import find_site_base
from cotune.client.training.checks.gradient_checks import check_gradients
from cotune.client.training.checks.sanity_checks import SanityChecks
from cotune.client.training.personal.prediction_model import load_trained_model, read_public
from cotune.client.training.stage_setup.from_records import synthetic_setup
from cotune.client.training.stage_setup.optimizer import build_optimizer
from cotune.data.config import has_labels
from cotune.data.skipped_records import count_cut_texts
from cotune.errors import DataError, ModelError, PlanError, PolicyError, PrivacyError
from cotune.models.device import peak_memory_bytes
from cotune.models.trainable import TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import stage_names
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup

T = TypeVar("T")


@dataclass(frozen=True)
class StageCheck:
    """The result of trying one stage.

    Attributes:
        mode: What it trains.
        rounds: Number of its rounds.
        steps: Steps per round.
        batch: Expected number of records in a step.
        gradient_error: Relative error of the clipped sum, compared with gradients of single records.
        seconds: Duration of one step.
        peak_memory_bytes: Peak memory on the GPU if one is used, else of the whole process so far.
    """

    mode: str
    rounds: int
    steps: int
    batch: float
    gradient_error: float
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class PreflightReport:
    """What a plan would mean for the organization. It may reveal facts about its records, and is only for its own people.

    Attributes:
        organization: Its name.
        examples: Number of its privacy units.
        device: On which it would train.
        declined: Why it would not train, a rule first; None: it would. Figures are given as far as they are known even then.
        broken: Every rule that does not allow the plan.
        problems: What else would prevent training.
        warnings: What would not prevent training but reduce its benefit.
        left_out: Reason -> number of rows of the files that are not used.
        noise_multiplier: σ of the first round.
        epsilon: ε of the run, at `delta`.
        delta: δ of the run.
        epsilon_spent: Spent ε of all runs that count together with this one.
        epsilon_total: Limit of the total ε.
        stages: Results of trying each stage.
    """

    organization: str
    examples: int
    device: str
    declined: str | None
    broken: tuple[Violation, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    epsilon_spent: float | None = None
    epsilon_total: float | None = None
    stages: tuple[StageCheck, ...] = ()


def run_preflight(plan: Plan, site: Site) -> PreflightReport:
    """Check a plan against policy, records and budget and, with privacy, try one step of each stage.

    Raises:
        PlanError: If the plan lists no labels.
        DataError: If the records cannot be read.
        ModelError: If the base model cannot be read although the policy allows it.
    """
    if has_labels(plan.task) and not plan.labels:
        raise PlanError(
            "the plan lists no labels: expected the plan as the coordinator runs it, with its class names:"
            " give the plan.toml of a run, or list labels in the plan",
            code="plan.no_labels",
        )
    policy = site.policy()
    dataset = site.counted_dataset(plan)
    account = Account(plan, policy, site, dataset, draws=False)
    checked = PreflightReport(
        site.organization,
        len(dataset.units),
        site.file.device,
        None,
        warnings=tuple(_warnings(account)),
        left_out=dataset.left_out(),
    )
    broken, problems = _judged(account, _declarable(plan, site))
    if dataset.unknown and dataset.lenient and not any(number >= 0 for number in dataset.truth):
        problems.append(
            f"not one record can be learned from, as none has a class that the plan lists ({', '.join(plan.labels)}): rounds"
            " would spend ε and be answered with noise alone; rename the classes, or name another column with --label"
        )
    sigma = _kept(problems, lambda: _noise(account))
    budget = _kept(problems, lambda: account.budget)
    _kept(problems, lambda: _check_stages(account))
    if plan.shares_predictions:
        _kept(problems, lambda: read_public(plan, site))
    rules = [str(PolicyError(each.rule, each.problem)) for each in broken]
    problems = [each for each in dict.fromkeys(problems) if each not in rules]
    checked = replace(checked, broken=broken, problems=tuple(problems), declined=next(iter([*rules, *problems]), None))
    if budget is not None:
        checked = replace(
            checked,
            noise_multiplier=sigma,
            epsilon=budget.epsilon,
            delta=budget.delta,
            epsilon_spent=account.spent_in_total(),
            epsilon_total=budget.total_epsilon,
        )
    return _tried(checked, account)


def _check_stages(account: Account) -> None:
    for stage in account.plan.stages:
        check_examples(account.public_examples, stage.local, account.site.organization)


def _judged(account: Account, declarable: tuple[int, int] | None) -> tuple[tuple[Violation, ...], list[str]]:
    """Return (the rules that do not allow the plan, problems that prevent checking the others)."""
    plan = account.plan
    policy = account.policy
    examples = account.public_examples
    found = list[Violation](find_number_violations(plan, policy, examples, declarable))
    problems = list[str]()
    _kept(
        problems, lambda: found.extend(find_violations(plan, policy, examples, account.hours()))
    )  # as far as they can be checked
    return tuple(found), problems


def _kept(problems: list[str], ask: Callable[[], T]) -> T | None:
    """Return the result of a function; if it fails, add the reason to the problems and return None."""
    try:
        return ask()
    except (PrivacyError, DataError) as problem:  # a rule declines, the budget is used up, or there are too few records
        problems.append(str(problem))
        return None


def _tried(checked: PreflightReport, account: Account) -> PreflightReport:
    """Add the result of trying each stage. For a declined plan, no base model is downloaded, and a missing one is no error."""
    plan = account.plan
    site = account.site
    examples = account.public_examples
    if checked.declined and not _is_here(plan, site):
        note = "time and memory are measured once the policy allows the base model: it is not fetched before"
        return replace(checked, warnings=(*checked.warnings, note))
    try:
        find_site_base(plan, site.file)
        model = load_trained_model(plan, site)
    except ModelError as error:
        if not checked.declined:
            raise
        return replace(checked, warnings=(*checked.warnings, str(error)))
    limit_gpu_memory(account.policy, model.device)
    left_out = {**checked.left_out, **count_cut_texts(model, account.dataset.inputs())}
    checked = replace(checked, device=str(model.device), left_out=left_out)
    if checked.epsilon is None or any(stage.local.sample_rate(examples) * examples < 1 for stage in plan.stages):
        return checked
    sigma = checked.noise_multiplier or 1.0  # the duration of a step does not depend on σ
    return replace(checked, stages=tuple(_try(plan, stage, model, examples, sigma) for stage in plan.stages))


def _is_here(plan: Plan, site: Site) -> bool:
    """Return whether the base model is on this machine."""
    base = plan.model.base
    return site.file.base is not None or base.startswith("package:") or Path(base).expanduser().exists()


def _declarable(plan: Plan, site: Site) -> tuple[int, int] | None:
    """Return the numbers of records that the coordinator accepts, if it has requested a round already; None: unknown."""
    return None if site.file.simulated else last_declarable_range(AuditLog(site.folder), plan.plan_id)


def _noise(account: Account) -> float | None:
    """Return σ of the plan's first round; None without privacy. Raises PolicyError for a plan that has already run here."""
    if account.budget is None:
        return None
    played = account.ledger.rounds(account.plan.plan_id)
    if played:
        raise PolicyError(
            "privacy.epsilon",
            f"this plan has run here already (rounds {played[0]}–{played[-1]}), and what it"
            " spent is spent; it goes on where it stopped, or starts again with another seed",
        )
    return account.plan_noise(1)


def _warnings(account: Account) -> Iterator[str]:
    """Yield warnings about what does not prevent a run but reduces its benefit."""
    dataset = account.dataset
    plan = account.plan
    if not len(dataset):
        yield "no record is usable: rounds would be answered with noise alone; look at the file, or name another one with --data"
    if dataset.unknown:
        yield (
            f"{len(dataset.unknown)} classes of the records are not among the plan's ({', '.join(plan.labels)}): their records"
            " would be trained without a label"
        )
    if plan.tasks:
        yield (
            f"updates will have the heads of {', '.join(dataset.tasks)}, which shows the coordinator which labels there are"
            " here; a head that nobody else has is not averaged with another, and is released as it was trained, with its noise"
        )
    declared = account.public_examples
    held = account.true_examples
    if account.policy.disclosures.example_count == "declared" and not held / 2 <= declared <= 1.1 * held:
        yield (
            f"the policy declares {declared} records, and there are {held}: expected a number near that, and none above it, as"
            " batches and noise follow from it"
        )


def _try(plan: Plan, stage: Stage, model: TrainableModel, examples: int, sigma: float) -> StageCheck:
    """Take one step of DP-SGD on as many synthetic records as a batch is expected to have."""
    assert isinstance(plan.privacy, RecordPrivacy)
    batch = stage.local.sample_rate(examples) * examples
    model.load({})
    names = stage_names(plan, stage, model)
    parameters = model.train_only(names)
    setup = synthetic_setup(plan, stage, model, max(1, round(batch)))
    error = setup.physical.fit(partial(check_gradients, setup, plan.privacy, stage.mode))
    guard = SanityChecks(model, model.state(names), noise=True)
    guard.begin()
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    config = DPSGDConfig(
        noise_multiplier=sigma,
        clip_norm=plan.privacy.clip_norm,
        sample_rate=1.0,
        expected_batch=float(setup.rows),
        steps=1,
        clipping_mode=plan.privacy.clipping,
    )
    optimizer = build_optimizer(stage.local, model, names, parameters)
    steps = DPSGDSetup(setup.module, optimizer, setup.loss, setup.units, setup.batches, fit=setup.physical.fit)
    began = time.perf_counter()
    for report in DPSGD(config).run(steps):
        guard.after_step(report)
    if on_gpu:
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - began
    memory = torch.cuda.max_memory_allocated(model.device) if on_gpu else peak_memory_bytes()
    return StageCheck(stage.mode, stage.rounds, stage.local.steps_per_round(examples), batch, error, seconds, memory)
