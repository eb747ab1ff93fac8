"""Heads that are fitted to features to the end, without noise, to compare the federated model with.

Where the encoder stays as it is, anyone who trains for itself, or has everybody's records in one place, would fit a head to the
features of all of them instead of taking noisy steps. So that is what each organization reaches alone without privacy, what all
data reach when they are pooled, and, from the federated head, what each organization reaches once it has adapted the model to
itself (see `client.personalization.adaptation`). Penalties are chosen by cross-validation on training records. All heads are
judged once, on the common test set, of which an organization's own held-out records are a part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cotune.client.personalization.adaptation import (
    Adaptation,
    OwnRecords,
    adapt,
    build_own_records,
    fit_alone,
    get_unit_numbers,
)
from cotune.data.config import has_classes
from cotune.data.dataset import Dataset, DatasetManifest
from cotune.data.metrics.metrics import Metrics
from cotune.data.tasks.classes import classes_from_scores
from cotune.errors import CotuneError
from cotune.models.encoding import encoded_examples, encoded_features
from cotune.models.evaluation.test_set import measure
from cotune.models.features.cached import encode_batch
from cotune.models.features.head import feature_head
from cotune.models.features.head_fit import head_names, head_scores
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import get_plan_model
from cotune.reporting.documents.events import AdaptationFailed, ModelAdapted
from cotune.server.runs.run_folder import RunFolder, manifest_file
from cotune.simulations.prepare import Prepared
from cotune.simulations.split import Share

_MOST_ENTRIES = 2**28  # of the pooled records' features, 1 GiB: what is fitted to them is in memory two or three times

Predicted = tuple[int, ...]  # class numbers, in the order of the common test set


@dataclass(frozen=True)
class Evaluated:
    """A model on the common test set.

    Attributes:
        metrics: Its quality.
        predicted: Its predictions, such as class numbers, in the order of `Dataset.truth`.
    """

    metrics: Metrics
    predicted: tuple[Any, ...]


@dataclass(frozen=True)
class Personalized:
    """By organization; empty where nothing was fitted.

    Attributes:
        adapted: How each has adapted the federated model.
        predicted: Predictions of its adapted model.
        alone: What its head without privacy and without the others tells.
    """

    adapted: dict[str, Adaptation] = field(default_factory=dict)
    predicted: dict[str, Predicted] = field(default_factory=dict)
    alone: dict[str, Predicted] = field(default_factory=dict)


def fits_alone(plan: Plan, model: TrainableModel) -> bool:
    """Whether alone without privacy is a head that is fitted to features, instead of a run."""
    return has_classes(plan.task) and all(stage.mode == "head" for stage in plan.stages) and feature_head(model) is not None


def fits_pooled(plan: Plan, model: TrainableModel, records: int) -> bool:
    """Whether pooled is such a head, too: unless the plan says how it is trained, or memory may not hold all the features.

    Args:
        plan: The plan.
        model: Of the plan.
        records: Of all organizations together.
    """
    if plan.simulation.pooled is not None or plan.tasks or not fits_alone(plan, model):
        return False
    return records * _most_entries_of_record(model) <= _MOST_ENTRIES


def _most_entries_of_record(model: TrainableModel) -> int:
    """The numbers of a record that a head reads: of its text, or of each of its words, as many as the widest layer takes."""
    names = set(head_names(model))
    widths = [value.shape[1] for name, value in model.parameters() if name in names and value.dim() == 2]
    reader = feature_head(model)
    words = model.loaded.max_length if reader is not None and reader.reads_words else 1
    return words * max(widths, default=1)


def fit_pooled(plan: Plan, prepared: Prepared, device: str, test: Dataset) -> Evaluated:
    """Judge a head that is fitted to the training records of all organizations, without privacy.

    Args:
        plan: As the pooled model is trained: without privacy, and with nothing personal.
        prepared: Who holds what.
        device: That computes.
        test: The common test set.

    Raises:
        CotuneError: If no head can be fitted to these records.
    """
    model = get_plan_model(plan, device)
    held = Dataset(tuple((prepared.records[share.file], share.rows) for share in prepared.shares), plan.labels, plan.task)
    head = fit_alone(model, _build_own_records(model, plan, {}, held), plan.personalize.folds, plan.seed)
    predicted = _predict_classes(model, head, _features(model, plan, {}, test))
    return Evaluated(measure(model, test, predicted), predicted)


def personalize(folder: RunFolder, prepared: Prepared, served: State) -> Personalized:
    """Adapt a finished run's model for every organization, as far as the plan asks for a comparison with training alone.

    Nothing is fitted where there are no features to fit a head to, where every organization has a model of its own, or where
    neither an adapted model nor a head alone is asked for.
    """
    plan = prepared.plan
    model = get_plan_model(plan, folder.file.device)
    fits = (
        has_classes(plan.task) and feature_head(model) is not None and bool(plan.personalize.methods or fits_alone(plan, model))
    )
    if "alone" not in plan.simulation.baselines or plan.keeps_personal or not fits:
        return Personalized()
    found = Personalized()
    test = _features(model, plan, served, DatasetManifest.read(manifest_file(folder.path, "test"), plan.labels))
    model.load(served)
    shared = model.state(head_names(model))
    for share in prepared.shares:
        try:
            adapted = _adapt(model, prepared, share, served, shared)
        except CotuneError as error:  # a comparison that cannot be made must not cost the run itself
            folder.events.write(AdaptationFailed(organization=share.name, reason=str(error)))
            continue
        if plan.personalize.methods:
            found.adapted[share.name] = adapted
            found.predicted[share.name] = _predict_classes(model, adapted.head, test)
        if fits_alone(plan, model):
            found.alone[share.name] = _predict_classes(model, adapted.alone, test)
        folder.events.write(ModelAdapted(organization=share.name, method=adapted.described))
    return found


def _adapt(model: TrainableModel, prepared: Prepared, share: Share, served: State, shared: State) -> Adaptation:
    plan = prepared.plan
    held = Dataset(((prepared.records[share.file], share.rows),), plan.labels, plan.task)
    return adapt(model, _build_own_records(model, plan, served, held), shared, plan.personalize, plan.seed)


def _build_own_records(model: TrainableModel, plan: Plan, served: State, held: Dataset) -> OwnRecords:
    return build_own_records(_features(model, plan, served, held), held.targets, get_unit_numbers(held), len(plan.labels))


def _features(model: TrainableModel, plan: Plan, served: State, held: Dataset) -> Tensor:
    """Of an unchanged encoder they are kept on disk; of one that this run has trained they are computed."""
    model.load(served)
    if any(name.startswith(model.prefix) for name in served):
        return encode_batch(model, encoded_examples(held, model), plan.model.precision)
    return encoded_features(held, model, served, plan.model.precision)


def _predict_classes(model: TrainableModel, head: State, features: Tensor) -> Predicted:
    return tuple(classes_from_scores(head_scores(model, head, features)).tolist())
