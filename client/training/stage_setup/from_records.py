"""What a stage trains on at an organization: a module, its rows, how they become batches, the loss of each row.

What should move moves, and nothing else: looked at after the first step, where a wrong wiring costs one step and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cotune.client.local_events import notify
from cotune.client.training.regularization import dropping, find_dropout
from cotune.client.training.stage_setup.from_features import build_feature_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup, build_slot_probe
from cotune.client.training.stage_setup.trial_step import try_step
from cotune.data.dataset import Dataset
from cotune.data.inputs.batching import fixed_batches, sorted_batches
from cotune.data.tasks.classes import IGNORED, count_labels
from cotune.data.tasks.task import Target
from cotune.data.tasks.text import Example
from cotune.errors import DataError, PlanError
from cotune.models.architecture import AlignedRows
from cotune.models.checkpointing import checkpointing, is_checkpointed
from cotune.models.device import bfloat16_is_fast
from cotune.models.encoding import FeatureRows, encoded_examples, find_features
from cotune.models.features.cached import encode_batch
from cotune.models.features.head import FeatureHead, feature_head
from cotune.models.features.kept_states import KeptStates, StateReader, attach_states, get_states, is_small
from cotune.models.features.lower_layers import LowerLayers, find_lower_layers
from cotune.models.physical_batch import FEWEST_SLOTS, PhysicalBatch, first_rows, open_batch
from cotune.models.record_independence import check_independence
from cotune.models.trainable import State, TrainableModel
from cotune.plan.local_training import Stage
from cotune.plan.plan import Plan
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.per_example import Batch, Unit

States = KeptStates | Sequence[Tensor]  # row number -> (tokens, width)
FindStates = Callable[[StateReader], States]


def build_setup(
    plan: Plan,
    stage: Stage,
    model: TrainableModel,
    dataset: Dataset,
    state: State,
    name: str,
    *,
    expected_batch: float,
    find_states: FindStates | None = None,
) -> TrainingSetup:
    """Build the stage's training setup on the records of the organization `name`; the model must be set to `state`.

    Args:
        expected_batch: Rows of a step, a public number: it decides the shape of batches of features.
        find_states: Finds hidden states where they may be kept; None: those of all records of the files, kept on disk.

    Raises:
        DataError: For records that are described as those of another task.
    """
    if dataset.task != plan.task:
        raise DataError(
            f"{name} describes its records as for {dataset.task}, expected {plan.task} as in the plan: correct its description"
            " of its records, or take no part in this plan",
            code="data.wrong_task",
        )
    head = feature_head(model) if stage.mode == "head" else None
    if head is not None:
        features = find_features(
            dataset,
            model,
            state,
            plan.model.precision,
            lambda source, done, total: notify("features", organization=name, source=source, done=done, total=total),
        )
        precision = plan.model.precision
        weights = _weights_of(plan, model)
        targets = [model.loaded.task.encode_target(target) for target in dataset.targets]
        return build_feature_setup(precision, model, head, features, targets, expected_batch, dataset.units, weights)
    rows = encoded_examples(dataset, model)

    def kept(reader: StateReader) -> KeptStates:
        return get_states(reader, dataset, state, lambda source, done, total: told(source=source, done=done, total=total))

    told = partial(notify, "features", organization=name)
    may_keep = stage.local.keep_lower_layers == "on" or is_small(model, dataset)
    physical = _find_physical_batch(plan, stage, model, expected_batch)
    return _on_examples(plan, stage, model, rows, dataset.units, physical, (find_states or kept) if may_keep else None)


def synthetic_setup(
    plan: Plan, stage: Stage, model: TrainableModel, records: int, *, expected_batch: float | None = None
) -> TrainingSetup:
    """Build the stage's training setup on made-up records, as long as the plan allows: what it costs, without a record.

    Args:
        plan: The plan.
        stage: Of the plan.
        model: Of the plan.
        records: Number of made-up records.
        expected_batch: Rows of a step, which decide how many are in memory at a time if the plan leaves that open; default: all.
    """
    head = feature_head(model) if stage.mode == "head" else None
    if head is not None:
        return _on_made_up_features(plan, model, head, records)
    physical = _find_physical_batch(plan, stage, model, float(records) if expected_batch is None else expected_batch)
    return _on_made_up(plan, stage, model, records, physical)


def _made_up(model: TrainableModel, records: int) -> tuple[list[Example], list[int], list[list[int]]]:
    """A few long examples, the number of one of them for each record, and units of one record each."""
    samples = [_lengthened(example, model.loaded.max_length) for example in model.loaded.task.samples(model.loaded.reader)]
    return samples, [i % len(samples) for i in range(records)], [[i] for i in range(records)]


def _on_made_up_features(plan: Plan, model: TrainableModel, head: FeatureHead, records: int) -> TrainingSetup:
    samples, numbers, units = _made_up(model, records)
    vectors = encode_batch(model, samples, plan.model.precision)
    targets = [_target_of(example) for example in samples]
    parts = torch.split(vectors, [len(example["starts"]) if "starts" in example else 1 for example in samples])
    features = FeatureRows.of(torch.cat([parts[i] for i in numbers]))
    chosen = [targets[i] for i in numbers]
    weights = _weights_of(plan, model)
    return build_feature_setup(plan.model.precision, model, head, features, chosen, float(records), units, weights)


def _on_made_up(plan: Plan, stage: Stage, model: TrainableModel, records: int, physical: PhysicalBatch) -> TrainingSetup:
    samples, numbers, units = _made_up(model, records)
    states = partial(_exact_states, samples, numbers)
    return _on_examples(plan, stage, model, [samples[i] for i in numbers], units, physical, states)


def _find_physical_batch(plan: Plan, stage: Stage, model: TrainableModel, expected_batch: float) -> PhysicalBatch:
    """Return the rows that are held in memory at a time; where the plan leaves them open, as many as fit, by made-up records.

    The model's trained parameters are chosen. One slot of every batch is blank under privacy.
    """
    privacy = plan.privacy if isinstance(plan.privacy, RecordPrivacy) else None
    local = stage.local
    if local.physical_batch_size != "auto":
        return PhysicalBatch(max(FEWEST_SLOTS, local.physical_batch_size), model.device)
    trained = tuple(name for name, parameter in model.parameters() if parameter.requires_grad)
    how = local.activation_checkpointing, local.keep_lower_layers, local.dropout > 0, plan.model.precision
    clipped = None if privacy is None else (privacy.clipping, privacy.unit)
    rows = first_rows(model.device, expected_batch)
    physical = open_batch(model, (trained, how, clipped), rows, least=1 if privacy is None else FEWEST_SLOTS)

    def attempt() -> None:
        made_up = _on_made_up(plan, stage, model, max(1, physical.rows - (privacy is not None)), physical)
        layers = find_dropout(local, model, trained)
        with dropping(layers, local.dropout, np.random.default_rng(0)):
            try_step(made_up, privacy)

    physical.fit_first(attempt)
    return physical


def _exact_states(samples: Sequence[Example], numbers: Sequence[int], reader: StateReader) -> Sequence[Tensor]:
    """Of made-up examples, in float32, as their gradients are compared with those of whole passes."""
    states = replace(reader, low_precision=False).read(samples)
    return [states[number] for number in numbers]


def _target_of(example: Example) -> Target:
    """The class of an example, or those of its words."""
    labels = example["labels"]
    found: Target = tuple(labels[place] for place in example["starts"]) if "starts" in example else labels
    return found


def _lengthened(example: Example, length: int) -> Example:
    """An example of tokens, repeated to the full length; one without tokens as it is."""
    tokens = example.get("input_ids")
    if tokens is None:
        return example
    times = -(-length // len(tokens))
    longer = {key: (value * times)[:length] if isinstance(value, list) else value for key, value in example.items()}
    if "starts" in longer:
        longer["starts"] = [place for place, label in enumerate(longer["labels"]) if label != IGNORED]
    return longer


def _weights_of(plan: Plan, model: TrainableModel) -> Tensor | None:
    """How much a label of each class counts in the loss, (classes,); None where all count the same. Raises PlanError."""
    try:
        weights = plan.weights_of_classes()
    except ValueError as error:  # of a plan whose labels were found in the records
        raise PlanError(f"the plan is not valid: {error}", code="plan.invalid") from None
    return None if weights is None else torch.tensor(weights, device=model.device)


def _on_examples(
    plan: Plan,
    stage: Stage,
    model: TrainableModel,
    rows: Sequence[Example],
    units: Sequence[Unit],
    physical: PhysicalBatch,
    find_states: FindStates | None = None,
) -> TrainingSetup:
    """find_states: Of the rows, where they may be kept (see `features.lower_layers`)."""
    task = model.loaded.task
    longest = model.loaded.max_length
    collate = task.collator(model.module, model.loaded.reader, model.device)
    private = isinstance(plan.privacy, RecordPrivacy)
    low_precision = plan.model.precision == "bfloat16" or (
        not private and plan.model.precision == "auto" and model.device.type == "cuda" and bfloat16_is_fast(model.device)
    )

    lower = None if find_states is None else _find_lower_layers(stage, model)
    reader = None if lower is None else StateReader(model, lower, physical.slots, low_precision)
    states = None if find_states is None or reader is None else find_states(reader)

    def batches(numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], Batch]]:
        places: Sequence[int] = range(len(numbers))
        if private or states is not None:
            slots = physical.slots
            places = sorted(places, key=lambda p: count_labels(rows[numbers[p]]["labels"]))
            for positions, length in fixed_batches(places, lambda p: task.bucket(rows[numbers[p]], longest), slots):
                batch = collate([rows[numbers[p]] for p in positions], length, slots)
                yield positions, batch if states is None else attach_states(batch, [states[numbers[p]] for p in positions])
            return
        for positions in sorted_batches(places, lambda p: task.order(rows[numbers[p]]), physical.rows):
            yield positions, collate([rows[numbers[p]] for p in positions])

    skipping = nullcontext if lower is None else lower.skipped
    weights = _weights_of(plan, model)
    again = is_checkpointed(stage.local.activation_checkpointing, model.module)

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=low_precision):
            return exact(batch)

    def exact(batch: Batch) -> Tensor:
        with AlignedRows(), checkpointing(model.module, enabled=again), skipping(batch) as rest:
            return task.losses(model.module, rest, weights)

    def scores(batch: Batch) -> Tensor:
        with AlignedRows(), torch.autocast(model.device.type, enabled=False), skipping(batch) as rest:
            return task.scores(model.module, rest)

    def correct(batch: Batch) -> Tensor:
        """Rows, whatever the task: of tags, all words of a record must be predicted correctly."""
        return task.are_right(scores(batch), batch["labels"])

    def samples() -> TrainingSetup:
        made_up = task.samples(model.loaded.reader)
        found = None if states is None else partial(_exact_states, made_up, range(len(made_up)))
        return _on_examples(plan, stage, model, made_up, [[0], [1], [2]], physical, found)

    return TrainingSetup(
        module=model.module,
        rows=len(rows),
        units=units,
        batches=batches,
        alone=lambda row: collate([rows[row]]),
        loss=loss,
        exact=exact,
        correct=correct,
        samples=samples,
        check_independent_rows=lambda: check_independence(
            model,
            stage.mode,
            "bfloat16" if low_precision else "float32",
            build_slot_probe(model.module, loss, scores),
            slots=physical.slots,
            read_below=None if reader is None else reader.read_batch,
        ),
        physical=physical,
    )


def _find_lower_layers(stage: Stage, model: TrainableModel) -> LowerLayers | None:
    """What is below all that a stage trains, where the plan lets it be kept."""
    if stage.local.keep_lower_layers == "off":
        return None
    return find_lower_layers(model, [name for name, parameter in model.parameters() if parameter.requires_grad])
