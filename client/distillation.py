"""Distill a student on an organization's own records: by DP-SGD, charged to its ledger before a record is trained on.

The loss of a record is the cross-entropy to the mean of what the teachers predict for that record alone, mixed with its label
(Hinton, Vinyals & Dean, 2015, https://arxiv.org/abs/1503.02531, section 2, at temperature 1). The teachers stay as they are: what
a record adds to a step is its own clipped gradient, whatever they say of it. So the accounting is that of any training here.
It is about this training: what a teacher was trained on shows in what it says, so that teachers must have been released with
privacy before, or know none of these records.

Nothing is asked from outside: the plan is a file of the organization, and starting this approves it. The policy's rules and
the ledger's limits hold all the same. The student is kept after each round of the plan, and goes on from there after an
interruption; an interrupted round is trained again, and charged again, as in a federation. A finished student is written again at
no cost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cotune.client.consent.policy_check import check_consent, check_number, check_plan
from cotune.client.local_events import notify
from cotune.client.noise_calibration import check_examples
from cotune.client.run_account import Account
from cotune.client.site import Site
from cotune.client.training.charged_steps import mechanism_of, within_hours
from cotune.client.training.checks.gradient_checks import check_gradients_of_state
from cotune.client.training.checks.sanity_checks import SanityChecks
from cotune.client.training.stage_setup.from_features import build_feature_setup
from cotune.client.training.stage_setup.optimizer import build_optimizer
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.dataset import Dataset
from cotune.data.readers.sources import check_new
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.soft_labels import SoftLabels
from cotune.errors import ModelError, PlanError, RunError
from cotune.models.base.lookup import find_base
from cotune.models.encoding import find_features
from cotune.models.export import export_model
from cotune.models.features.head import feature_head
from cotune.models.features.public_map import pin_model
from cotune.models.features.stacked_folder import load_side_by_side
from cotune.models.record_independence import check_independence
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.privacy.accounting.composition import Steps
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import DPSGD, DPSGDConfig, DPSGDSetup
from cotune.protocol.messages import state_digest
from cotune.reporting.model_card import CARD, model_card, promised
from cotune.storage.files import exclusive_lock
from cotune.storage.json_documents import JsonDocument

RECORD = "distillation.json"  # what the student is made from, in its folder and among what is kept
_KEPT = "distilled"


@dataclass(frozen=True)
class PrivateDistillation:
    """What is to be done.

    Attributes:
        plan: Its base model is the student, its stage says how the student's head is trained, its privacy what that may cost.
        site: Whose records are learned from.
        teachers: Folders of finished models with the plan's classes, or hub ids.
        label_weight: Part of the records' own labels in what is learned, from 0 to 1; the rest is the teachers'.
        out: A new folder.
    """

    plan: Plan
    site: Site
    teachers: Sequence[str]
    label_weight: float
    out: Path

    def settings(self) -> dict[str, Any]:
        """What decides the student beside the plan, as plain values."""
        from_models = [find_base(self.plan.model.model_copy(update={"base": name, **_UNPINNED})) for name in self.teachers]
        return {
            "plan_id": self.plan.plan_id,
            "teachers": [{"model": Path(each.name).name, "sha256": each.content_hash} for each in from_models],
            "label_weight": self.label_weight,
        }


_UNPINNED = {"base_hash": None, "config_hash": None, "revision": None, "quantization": "none"}


def pin_student(plan: Plan) -> Plan:
    """Return the plan with the hashes of its base model, so that its id stands for one student. Raises ModelError."""
    return plan.model_copy(update={"model": pin_model(plan.model, find_base(plan.model))})


def distill_privately(work: PrivateDistillation) -> dict[str, Any]:
    """Train a student, or write the one that this plan has trained here before.

    Returns:
        The settings, the steps and ε of the plan's charges, as in `distillation.json` of the new folder.

    Raises:
        PlanError: The plan is not one for this, or the label weight is none.
        PolicyError: The policy does not allow it, or the budget does not suffice.
        RunError: The folder is there already or cannot be written, or the plan was distilled with other teachers.
        PrivacyError: The student or a teacher cannot be used with privacy.
        ModelError, DataError: A model or the records cannot be used.
    """
    check_new(work.out)
    _check_label_weight(work.label_weight)
    _check_plan(work.plan)
    site = work.site
    plan = work.plan
    policy = site.policy()
    check_plan(plan, policy)
    kept = site.kept_folder(plan.plan_id, _KEPT)
    kept.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(kept / ".lock"):
        account = Account(plan, policy, site, site.counted_dataset(plan), round=plan.rounds)
        check_number(plan, policy, account.public_examples, None)
        check_consent(plan, policy, account.public_examples, account.hours())
        check_examples(account.public_examples, plan.stages[0].local, site.organization)
        _begin(work, kept)
        model = get_plan_model(plan, site.file.device)  # a site's own base is that of its federation
        if _newest_round(kept) < plan.rounds:
            _train_rounds(work, account, model, kept)
        _answer(account, plan.rounds)
        return _export(work, account, model)


def _newest_round(kept: Path) -> int:
    """The last round whose student is kept; 0: none."""
    return max((int(file.stem.removeprefix("round-")) for file in kept.glob("round-*.safetensors")), default=0)


def _answer(account: Account, round: int) -> None:
    """Say in the ledger that a round is complete, if it does not say so yet."""
    if account.ledger.last_answered_round(account.plan.plan_id) < round:
        account.answered(round)


def _check_label_weight(label_weight: float) -> None:
    if not 0 <= label_weight <= 1:
        raise PlanError(f"the weight of the labels is {label_weight}: expected a number from 0 to 1", code="plan.label_weight")


def _check_plan(plan: Plan) -> None:
    expected = {
        "task = sequence-classification": plan.task == "sequence-classification",
        "labels, the class names": bool(plan.labels),
        "train = head in one stage, as the student's encoder is not trained": [stage.mode for stage in plan.stages] == ["head"],
        'collaboration = "parameters"': not plan.shares_predictions,
        "a student that is one model": not plan.model.members,
        "no [personal] table": not plan.keeps_personal,
        "no class_weights": not plan.class_weights,
        "no local.base_decay": not any(stage.local.base_decay for stage in plan.stages),
        "no client_term, as there is no shared model": plan.strategy.client_term is None,
        "no client_privacy, which is of several organizations": plan.client_privacy is None,
        "differential privacy for records: without it, distill public inputs": isinstance(plan.privacy, RecordPrivacy),
    }
    for what, found in expected.items():
        if not found:
            raise PlanError(
                f"the plan {plan.name} cannot be distilled on private records: expected {what}", code="plan.no_distillation"
            )


def _begin(work: PrivateDistillation, kept: Path) -> None:
    """Keep the settings before anything is charged."""
    document = JsonDocument(kept / RECORD, dict[str, Any], advice="begin a new plan, with another seed")
    settings = work.settings()
    before = document.read()
    if before is None:
        document.write(settings)
    elif before != settings:
        raise RunError(
            f"the plan {work.plan.name} was distilled here with other teachers or another label weight: expected the same, or a"
            " plan with another seed, which is charged for itself",
            code="run.other_settings",
        )


def _train_rounds(work: PrivateDistillation, account: Account, model: TrainableModel, kept: Path) -> None:
    """Train the rounds that are left, from the student that is kept, and keep it after each."""
    plan = work.plan
    student = _with_soft_labels(model, plan)
    setup = _build_setup(work, account, student)
    done = _newest_round(kept)
    _answer(account, done)
    for round in range(done + 1, plan.rounds + 1):
        account.check_unanswered(round)
        student.load(work.site.load_newest_state(plan.plan_id, _KEPT))
        state = _train_round(account, student, setup, round)
        work.site.store_state(plan.plan_id, round, state, _KEPT)
        _answer(account, round)


def _train_round(account: Account, student: TrainableModel, setup: TrainingSetup, round: int) -> State:
    """Train the head by DP-SGD, and return it. The ledger is charged before a record enters a batch."""
    plan = account.plan
    privacy = plan.privacy
    assert isinstance(privacy, RecordPrivacy)
    stage = plan.get_stage(round)
    sigma = account.plan_noise(round)
    names = student.names("head")
    parameters = student.train_only(names)
    before = student.state(names)
    trained_from = plan.plan_id, round, state_digest(before)
    setup.physical.fit(partial(check_gradients_of_state, setup, privacy, stage.mode, student, trained_from))
    rate = stage.local.sample_rate(account.public_examples)
    steps = Steps(sigma, rate, plan.charged_steps(stage, account.public_examples))
    charge = account.reserve(round, steps)
    config = mechanism_of(steps, privacy, rate * account.public_examples)
    optimizer = build_optimizer(stage.local, student, names, parameters)
    trained = DPSGDSetup(setup.module, optimizer, setup.loss, setup.units, setup.batches)
    began = time.monotonic()
    taken = _take_steps(trained, config, account, SanityChecks(student, before, noise=True), round)
    account.settle(charge, steps, taken, time.monotonic() - began)
    return student.state(names)


def _take_steps(setup: DPSGDSetup, config: DPSGDConfig, account: Account, checks: SanityChecks, round: int) -> int:
    checks.begin()
    taken = 0
    for report in within_hours(DPSGD(config).run(setup), account):
        checks.after_step(report)
        taken = report.step
        notify("step", organization=account.site.organization, round=round, step=taken, steps=report.steps, loss=report.loss)
    checks.after_round()
    return taken


def _with_soft_labels(model: TrainableModel, plan: Plan) -> TrainableModel:
    """The same module for records whose labels are probabilities, as it is in the base model."""
    model.load({})
    loaded = replace(model.loaded, task=SoftLabels(len(plan.labels)))
    return TrainableModel(loaded, None, plan.seed, model.device)


def _build_setup(work: PrivateDistillation, account: Account, student: TrainableModel) -> TrainingSetup:
    plan = work.plan
    head = feature_head(student)
    if head is None:
        raise ModelError(
            f"the head of the base model {plan.model.base} cannot be trained without its encoder: expected a student such as"
            " bert, distilbert or roberta",
            code="model.no_feature_head",
        )
    dataset = account.dataset
    features = find_features(dataset, student, {}, plan.model.precision)
    taught = ask_teachers(plan, work.teachers, student.device, dataset)
    targets = mix_targets(taught, dataset.targets, work.label_weight)
    batch = plan.get_stage(1).local.sample_rate(account.public_examples) * account.public_examples
    return build_feature_setup(
        plan.model.precision, student, head, features, list(map(tuple, targets.tolist())), batch, dataset.units
    )


def ask_teachers(plan: Plan, teachers: Sequence[str], device: torch.device, dataset: Dataset) -> Tensor:
    """Return the mean of what the teachers predict for each record, (n, classes); NaN for one that cannot be read.

    A row depends on its record alone, to the bit, as features do.

    Raises:
        ModelError: A teacher cannot be loaded, or has other classes.
        PrivacyError: A teacher lets records reach each other.
    """
    model = TrainableModel(load_side_by_side(teachers, plan.labels), None, plan.seed, device)
    model.train_only(model.names("head"))
    check_independence(model, "head", plan.model.precision)
    scores = find_features(dataset, model, {}, plan.model.precision).copy()
    return scores.reshape(len(scores), len(teachers), -1).softmax(dim=2).mean(dim=1)


def mix_targets(taught: Tensor, truth: Sequence[int], label_weight: float) -> Tensor:
    """Return α · label + (1 − α) · teachers for each record, (n, classes); IGNORED where it was not read.

    A record whose class the plan does not have is taught by the teachers alone.

    Args:
        taught: (n, classes) of the teachers.
        truth: Class number of each record, or IGNORED.
        label_weight: α.
    """
    found = taught.clone()
    for row, number in enumerate(truth):
        if number != IGNORED:
            found[row] *= 1 - label_weight
            found[row, number] += label_weight
    found[taught.isnan().any(dim=1)] = IGNORED
    return found


def _export(work: PrivateDistillation, account: Account, model: TrainableModel) -> dict[str, Any]:
    plan = work.plan
    model.load(work.site.load_newest_state(plan.plan_id, _KEPT))
    charged = account.ledger.spent(plan.plan_id, account.collection)
    found = {**work.settings(), "steps": sum(steps.count for steps in charged), "epsilon": account.reported_epsilon()}
    about = f"Distilled with cotune from {len(work.teachers)} teachers on private records, with differential privacy."
    card = model_card(plan, privacy=promised(plan), length=model.loaded.text_length, about=about)
    _write(model, work.out, {CARD: card, RECORD: json.dumps(found, indent=1)})
    return found


def _write(model: TrainableModel, out: Path, beside: Mapping[str, str]) -> None:
    check_new(out)  # others may have made it since
    try:
        export_model(model, out, beside)
    except OSError as error:
        raise RunError(
            f"{out} cannot be written ({error.strerror}): the student is kept, and the same command with another --out writes it"
            " at no cost",
            code="run.not_writable",
        ) from None
