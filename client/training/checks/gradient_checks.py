"""Whether a model has gradients for each record, and sums of them that are right: checked before anything is charged."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from weakref import WeakKeyDictionary

from torch import nn

from cotune.client.training.regularization import find_dropout
from cotune.client.training.stage_setup.from_records import _weights_of, synthetic_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.errors import PrivacyError
from cotune.models.check_cache import model_key, read_check, write_check
from cotune.models.device import is_out_of_memory, kernel_key
from cotune.models.record_independence import check_padding, fits_in_float64, in_float64
from cotune.models.trainable import TrainableModel
from cotune.plan.local_training import LocalTraining, Stage
from cotune.plan.plan import Plan
from cotune.plan.trained_parameters import stage_names
from cotune.privacy.config import RecordPrivacy
from cotune.privacy.mechanisms.dp_sgd import check_clipping
from cotune.privacy.mechanisms.per_example import Batch, kinds_without_rule

_Checked = tuple[object, ...]
_checked: WeakKeyDictionary[TrainableModel, set[_Checked]] = WeakKeyDictionary()  # what was found right, as comparisons ask again
_last_checked: WeakKeyDictionary[TrainableModel, tuple[object, ...]] = WeakKeyDictionary()  # the same, of a round's state
_MAX_GRADIENT_ERROR = 1e-5  # relative, of the clipped sum over made-up rows
_MAX_ROUNDING_ERROR = 1e-3  # what rounding in float32 may add; 2.1e-5 was measured with 30 layers


def check_stages(plan: Plan, model: TrainableModel) -> None:
    """Check before a run that every stage has something to train, and under privacy that its gradients are those of single rows.

    Raises:
        ModelError, PrivacyError: In a sentence that names the train mode.
        PlanError: For a weight of a class that is none of the labels.
    """
    _weights_of(plan, model)
    model.load({})
    if isinstance(plan.privacy, RecordPrivacy):
        check_padding(model)  # first: a record that reads padding has another gradient, and this is the reason
    for stage in plan.stages:
        names = stage_names(plan, stage, model)
        find_dropout(stage.local, model, names)
        model.train_only(names)
        if isinstance(plan.privacy, RecordPrivacy):
            _refuse_trained_ties(model, stage)
            _check_gradients_once(plan, stage, model, plan.privacy)


def _refuse_trained_ties(model: TrainableModel, stage: Stage) -> None:
    """A table that reads and writes tokens has a gradient in two places, of which per-example gradients see one."""
    if not model.loaded.task.keeps_head:
        return
    module = model.loaded.module
    output = module.get_output_embeddings()
    table = module.get_input_embeddings().weight
    if output is not None and output.weight is table and table.requires_grad:
        raise PrivacyError(
            f"train = {stage.mode} would train the table of tokens, which is the output layer, too (tied weights): expected train"
            " = lora, or freeze_embeddings = true",
            code="privacy.tied_weights",
        )


def _check_gradients_once(plan: Plan, stage: Stage, model: TrainableModel, privacy: RecordPrivacy) -> None:
    """Of one unchanged model, and of all that decides how its gradients are taken; nothing of rounds, strategy or partition.

    What has passed is kept on disk, as every process of a comparison and every command asks again.
    """
    taken = privacy.clip_norm, privacy.clipping, plan.model.precision, plan.weights_of_classes(), kernel_key(model.device)
    how = stage.local.physical_batch_size, stage.local.activation_checkpointing, stage.local.keep_lower_layers
    key = stage.mode, stage.layers, stage.freeze_embeddings, plan.personal.parts, *how, *taken
    known = _checked.setdefault(model, set())
    if key in known:
        return
    setup = synthetic_setup(plan, stage, model, 3, expected_batch=_known_batch(stage.local))
    decides = (*model_key(model), *key, _MAX_GRADIENT_ERROR)
    if read_check("gradients", (*decides, setup.physical.rows)) is None:
        error = setup.physical.fit(partial(check_gradients, setup, privacy, stage.mode))
        write_check("gradients", (*decides, setup.physical.rows), error)
    known.add(key)


def _known_batch(local: LocalTraining) -> float:
    """Rows of a step, where the plan alone decides them; else infinity."""
    return local.batch_size if local.batch_size != "all" and local.batch_size >= 1 else math.inf


def check_gradients(setup: TrainingSetup, privacy: RecordPrivacy, mode: str) -> float:
    """Return the relative error of the clipped sum over made-up rows against gradients taken one row at a time, without padding.

    Args:
        setup: What the stage trains; its own records are not read.
        privacy: Clipping mode and clip norm.
        mode: What the stage trains, for the error.

    Raises:
        PrivacyError: When it is more than rounding, or when a row's numbers depend on its place in a batch or on its neighbors:
            then this model cannot be trained privately in this mode and arithmetic.
    """
    try:
        error = _clipping_error(setup.samples(), privacy)
    except (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError, KeyError) as raised:
        if is_out_of_memory(raised):
            raise
        reason = _why_no_gradients(raised, setup.module)
        raise PrivacyError(
            f"train = {mode} does not support per-example gradients for this model ({reason}): use another train mode or model",
            code="privacy.no_per_example_gradients",
        ) from None
    if _MAX_GRADIENT_ERROR < error <= _MAX_ROUNDING_ERROR and fits_in_float64(setup.module):
        error = _error_in_float64(setup, privacy, error)
    if not error <= _MAX_GRADIENT_ERROR:
        raise PrivacyError(
            f"the clipped gradients of this model are wrong by {error:.2g} (relative) in train = {mode}, expected at most"
            f" {_MAX_GRADIENT_ERROR:g}: a record's gradient depends on more than the record; use another train mode or model",
            code="privacy.wrong_gradients",
        )
    setup.check_independent_rows()
    return error


def _clipping_error(made_up: TrainingSetup, privacy: RecordPrivacy, fit: Callable[[Batch], Batch] = dict) -> float:
    """fit: A batch -> the batch in the arithmetic of the module."""

    def batches(numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], Batch]]:
        return ((positions, fit(batch)) for positions, batch in made_up.batches(numbers))

    return check_clipping(
        made_up.module,
        made_up.exact,
        batches=batches,
        alone=[fit(made_up.alone(row)) for row in range(made_up.rows)],
        clip_norm=privacy.clip_norm,
        clipping_mode=privacy.clipping,
    )


def _error_in_float64(setup: TrainingSetup, privacy: RecordPrivacy, in_float32: float) -> float:
    """Return the error of the clipped sum in float64, or that in float32 where a layer or a device has no float64.

    A row alone has another shape than in its batch, and so is rounded otherwise. In a deep model, and where scores nearly cancel,
    that can be more than the bound; what a wrong rule of a layer, or another record, adds to a gradient is the same in float64.
    That no row depends on others in the arithmetic that trains, to the bit, is asked apart (`check_independent_rows`).
    """
    try:
        with in_float64(setup.module):
            return _clipping_error(setup.samples(), privacy, _in_doubles)
    except (NotImplementedError, RuntimeError, ValueError, TypeError):
        return in_float32


def _in_doubles(batch: Batch) -> Batch:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def check_gradients_of_state(setup: TrainingSetup, privacy: RecordPrivacy, mode: str, model: TrainableModel, key: object) -> None:
    """Check gradients as `check_gradients` does, once for a state: simulated organizations share it in every round.

    The check reads no record. Its outcome follows from the module and its values, the way in which gradients are taken, and the
    shapes of batches; all but the values are the same for everybody with the same plan, stage and rows in a batch.

    Args:
        setup: Of the round.
        privacy: Of the plan.
        mode: What is trained.
        model: Set to the state that is about to be trained.
        key: The plan, the round, and a digest of the values that are trained from.

    Raises:
        PrivacyError: As `check_gradients`.
    """
    question = (key, mode, setup.physical.rows, kernel_key(model.device))
    if _last_checked.get(model) != question:
        check_gradients(setup, privacy, mode)
        _last_checked[model] = question


def _why_no_gradients(raised: Exception, module: nn.Module) -> str:
    """What a library said; where that is about its own variables, the layers that it stumbled over."""
    unused = re.search(r"differentiated Tensor at index ([0-9]+) appears to not have been used", str(raised))
    if unused:
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        return f"{names[int(unused[1])]} and what else has no part in a prediction"
    kinds = kinds_without_rule(module) if isinstance(raised, AttributeError | TypeError) else []
    if kinds:
        return f"Opacus has no rule for the gradients of single records in layers of the kind {', '.join(kinds[:3])}"
    return (str(raised).strip() or type(raised).__name__).splitlines()[0][:160]
