"""Check that a model treats records independently: equal results alone and padded, bit-identical beside any other records.

Clipping bounds what a record contributes, not how it influences the contributions of others. With an architecture that attends to
padding (FNet), or arithmetic whose rounding depends on the batch, one record can change the gradients of many, by far more than
the clip norm. Both are tested before a run, on synthetic records, and refused.

**Why the result does not depend on the state.** Operations, shapes, memory locations, threads and device determine which kernels
compute, and in which order they add; `mixes_records` refuses models whose operations or shapes depend on the content of records.
Values only determine whether a difference is visible: with a head or adapters of zeros, every order gives the same sum, and a
server that chooses states could have its model tested in such a one. So every test uses the base model with several draws of
random weights in the trained parameters, whatever the model's state, and is made once: its cache key contains the mode, the
trained parameters, the arithmetic, the shapes, and what determines the kernels (`device.kernel_key`).

Only this module tests the independence of records. Whether the clipped sum is correct in the state that is trained is tested
separately (`privacy.mechanisms.dp_sgd.check_clipping`, for the state of every round).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cotune.data.inputs.batching import LENGTHS
from cotune.data.tasks.classes import Batch
from cotune.data.tasks.text import Example
from cotune.errors import PrivacyError
from cotune.models.check_cache import model_key, read_check, write_check
from cotune.models.config import TrainMode
from cotune.models.device import bfloat16_is_fast, is_out_of_memory, kernel_key
from cotune.models.features.head import encode_vectors, feature_head
from cotune.models.features.lower_layers import STATES
from cotune.models.features.precision import features_mix
from cotune.models.features.stacked_members import StackedClassifier
from cotune.models.synthetic_batches import (
    PerSlot,
    bucket_lengths,
    example_probes,
    feature_probes,
    mixes_records,
    stretch_example,
)
from cotune.models.trainable import TrainableModel

MAX_PADDING_ERROR = 1e-5  # relative; in float32, architectures that hide their padding are below 2e-6
_MOST_IN_FLOAT64 = 2e9  # parameters: 16 GB
_FEATURES_TRIED = 4
_SLOTS_TRIED = 64  # where nobody says in which batches records train
_WEIGHTS_TRIED = 4  # under one draw, two orders of adding up 33 to 96 products gave the same sum in up to 4 of 10 cases
_FAILURES = (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError, KeyError, IndexError)
_padding: WeakKeyDictionary[TrainableModel, float | str] = WeakKeyDictionary()  # the error, or why it cannot be told
_mixing: WeakKeyDictionary[TrainableModel, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def check_independence(
    model: TrainableModel,
    mode: TrainMode,
    precision: str,
    per_slot: PerSlot | None = None,
    *,
    slots: int = _SLOTS_TRIED,
    lengths: Sequence[int] | None = None,
    width: int | None = None,
    read_below: Callable[[Batch], Tensor] | None = None,
) -> torch.dtype:
    """Before records are trained on under privacy: none of them may reach another. Tried once per model and process.

    Args:
        model: Set to any state, its trainable parameters chosen.
        mode: What is trained. With "head" and a head on features, the features are tried, in their own shapes, and the head on
            random ones.
        precision: "float32", "bfloat16", or "auto" for bfloat16 where it is fast and independent.
        per_slot: A batch -> what is computed of each slot, (slots, ...): scores, losses, the gradient of every trained
            parameter, in the way that will train. Called under autocast where bfloat16 is tried. Without it, scores are tried.
        slots: Rows of the batches that will train; of those of examples, the blank one included.
        lengths: Lengths of batches of examples; all that the model has, where not given. Of batches of features those of records
            that have several vectors; without them each has one.
        width: Of the features, where a head on them is trained by `per_slot`.
        read_below: A batch -> what the first trained layer reads of it, where what is below is computed once for each record
            (`features.lower_layers`): both parts are tried by themselves, the lower one once, as no draw changes its weights.

    Returns:
        The arithmetic in which no record reaches another: with "auto" it may be float32 where bfloat16 would be fast.

    Raises:
        PrivacyError: When padding reaches a record, or when no admissible arithmetic keeps records apart.
    """
    check_padding(model)  # of the features, too
    on_features = mode == "head" and feature_head(model) is not None
    low = precision == "bfloat16" or (precision == "auto" and bfloat16_is_fast(model.device))
    for dtype in (torch.bfloat16, torch.float32) if precision == "auto" and low else (_dtype(low),):
        try:
            if on_features:
                mixing = features_mix(model, dtype) or _head_mixes(model, per_slot, slots, width, lengths)
            else:
                mixing = _examples_mix(model, mode, dtype, per_slot, slots, lengths or bucket_lengths(model), read_below)
        except _FAILURES as raised:
            if is_out_of_memory(raised):
                raise
            raise PrivacyError(_not_independent(model, _reason(raised)), code="privacy.records_mix") from None
        if not mixing:
            return dtype
    raise PrivacyError(
        f"with train = {mode} in {str(dtype).removeprefix('torch.')} on this {model.device.type}, a record's numbers change with"
        " the records beside it, expected the same bits: use model.precision = float32, one thread (OMP_NUM_THREADS=1), another"
        " device, or a base model of another width and without mixtures of experts",
        code="privacy.records_mix",
    )


def _dtype(low: bool) -> torch.dtype:
    return torch.bfloat16 if low else torch.float32


def _head_mixes(
    model: TrainableModel, per_slot: PerSlot | None, slots: int, width: int | None, lengths: Sequence[int] | None
) -> bool:
    """lengths: Of records of several vectors; None where each has one."""
    if per_slot is None or width is None:
        return False
    pool = model.loaded.task.label_pool(len(model.loaded.module.config.id2label))
    shapes = [(width,)] if lengths is None else [(length, width) for length in lengths]

    def mixing() -> bool:
        numbers = itertools.product(shapes, range(_FEATURES_TRIED))
        batches = (feature_probes(shape, pool, slots, model.device, number) for shape, number in numbers)
        return any(mixes_records(per_slot, probes) for probes in batches)

    return _known_mixing(model, ("features", *shapes, slots), lambda: _mixes_in_draws(model, mixing))


def _examples_mix(
    model: TrainableModel,
    mode: TrainMode,
    dtype: torch.dtype,
    per_slot: PerSlot | None,
    slots: int,
    lengths: Sequence[int],
    read_below: Callable[[Batch], Tensor] | None,
) -> bool:
    answer = _make_answer(model, dtype, per_slot)

    def mixing(length: int) -> bool:
        return _mixes_in_draws(model, lambda: mixes_records(answer, example_probes(model, length, slots)))

    def mixing_in_parts(length: int) -> bool:
        assert read_below is not None
        with model.with_random_weights(()):
            probes = list(example_probes(model, length, slots))
            if mixes_records(lambda batch: [read_below(batch)], probes):
                return True
            begun = [({**batch, STATES: read_below(batch)}, places) for batch, places in probes]
        return _mixes_in_draws(model, lambda: mixes_records(answer, begun))

    tried = mixing if read_below is None else mixing_in_parts
    what = (mode, dtype, slots, per_slot is None, read_below is None)
    return any(_known_mixing(model, (*what, length), partial(tried, length)) for length in lengths)


def _known_mixing(model: TrainableModel, what: tuple[object, ...], mixing: Callable[[], bool]) -> bool:
    """What `mixing` says, asked once for what it is about, what is trained, and what it is computed by."""
    known = _mixing.setdefault(model, {})
    key = (*what, _trained(model), kernel_key(model.device))
    if key not in known:
        known[key] = mixing()
    return known[key]


def _trained(model: TrainableModel) -> tuple[str, ...]:
    return tuple(name for name, p in model.parameters() if p.requires_grad)


def _mixes_in_draws(model: TrainableModel, mixing: Callable[[], bool]) -> bool:
    """Whether records mix in the base model with any of several draws of random weights in what is trained."""
    kept = model.loaded.task.keeps_head
    head = [] if kept else [name for name, _ in model.parameters() if not name.startswith(model.prefix)]
    drawn = list(dict.fromkeys((*_trained(model), *head, *model.adapter_names())))
    return any(_mixes_with(model, drawn, seed, mixing) for seed in range(_WEIGHTS_TRIED))


def _mixes_with(model: TrainableModel, drawn: Sequence[str], seed: int, mixing: Callable[[], bool]) -> bool:
    with model.with_random_weights(drawn, seed):
        return mixing()


def _make_answer(model: TrainableModel, dtype: torch.dtype, per_slot: PerSlot | None) -> PerSlot:
    """What `per_slot` says of each slot in an arithmetic; the task's scores without it."""

    def answer(batch: Batch) -> Sequence[Tensor]:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            if per_slot is not None:
                return per_slot(batch)
            with torch.no_grad():
                return [model.loaded.task.scores(model.module, batch)]

    return answer


def check_padding(model: TrainableModel) -> None:
    """Raises PrivacyError when the model, or its feature, reads the padding of a record. Tried once per model and machine."""
    if model not in _padding:
        _padding[model] = _known_padding_error(model)
    error = _padding[model]
    kind = model.loaded.module.config.model_type
    if isinstance(error, str):
        raise PrivacyError(_not_independent(model, error), code="privacy.records_mix")
    if not error <= MAX_PADDING_ERROR:
        raise PrivacyError(
            f"the architecture {kind} reads padding: a record padded to the length of its batch differs from itself alone by"
            f" {error:.2g} (relative), expected at most {MAX_PADDING_ERROR:g}; use another base model, such as bert, distilbert,"
            " roberta or llama",
            code="privacy.reads_padding",
        )


def _known_padding_error(model: TrainableModel) -> float | str:
    """The error, or why it cannot be told; one that is small enough is kept on disk."""
    key = (*model_key(model), MAX_PADDING_ERROR)
    known = read_check("padding", key)
    if known is not None:
        return known
    try:
        with model.with_random_weights(()):
            error = padding_error(model, model.loaded.task.samples(model.loaded.reader))
            if error > MAX_PADDING_ERROR and fits_in_float64(model.loaded.module):
                with in_float64(model.loaded.module):
                    error = padding_error(model, model.loaded.task.samples(model.loaded.reader))
    except _FAILURES as raised:
        if is_out_of_memory(raised):
            raise
        return _reason(raised)
    if error <= MAX_PADDING_ERROR:
        write_check("padding", key, error)
    return error


def fits_in_float64(module: nn.Module) -> bool:
    """Whether the weights of a module may be held in float64 for a moment."""
    return sum(parameter.numel() for parameter in module.parameters()) <= _MOST_IN_FLOAT64


@contextmanager
def in_float64(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a module in float64 for the time of the block.

    Deep models may turn the rounding of float32, which depends on the length of a row, into differences of 2e-5. What a model
    reads of its padding, or of other records, is of the same size in any arithmetic; rounding is not.
    """
    held = [*module.parameters(), *module.buffers()]
    before = [tensor.data for tensor in held]
    try:
        for tensor in held:
            if tensor.is_floating_point():
                tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, data in zip(held, before, strict=True):
            tensor.data = data


def _reason(raised: BaseException) -> str:
    return (str(raised).strip() or type(raised).__name__).splitlines()[0][:160]


def _not_independent(model: TrainableModel, reason: str) -> str:
    return (
        f"the architecture {model.loaded.module.config.model_type} cannot take records of any content side by side ({reason}):"
        " expected one that reads each record by itself, such as bert, distilbert, roberta or llama; use another base model"
    )


@torch.no_grad()
def padding_error(model: TrainableModel, examples: Sequence[Example], slots: int = 8) -> float:
    """Measure how much padding and other records of the batch change a record's results, in float32.

    Each example alone and unpadded is compared with itself in a batch, padded to lengths up to four times its own: its scores,
    and its feature if the head reads one. This is done twice, the second time with a large embedding of the padding token, as a
    state may have one although a base model's is zero.

    Args:
        model: In any state.
        examples: Records.
        slots: Rows per batch.

    Returns:
        The largest root mean square of padded − alone, relative to the largest one of the examples alone, as the scores of a
        single one can be almost 0 with a random head. 0 for a task without padding.
    """
    feature_head(model)  # finds out what the head reads while the model is unchanged
    quiet = _padding_error(model, examples, slots)
    with _loud_padding(model):
        return max(quiet, _padding_error(model, examples, slots))


def _padding_error(model: TrainableModel, examples: Sequence[Example], slots: int) -> float:
    """Examples of one length share a batch, behind the first of all."""
    loaded = model.loaded
    collate = loaded.task.collator(model.module, loaded.reader, model.device)
    tried = [e for given in examples for e in _with_lengthened(given, loaded.max_length)]
    alone = [_outputs(model, collate([example])) for example in tried]
    sizes = [max(_root_mean_square(each[0]) for each in of_all) for of_all in zip(*alone, strict=True)]
    lengths = [_paddings(model, example) for example in tried]
    worst = 0.0
    for length in sorted({length for each in lengths for length in each}):
        numbers = [number for number, each in enumerate(lengths) if length in each]
        for start in range(0, len(numbers), slots - 1):
            rows = numbers[start : start + slots - 1]
            padded = _outputs(model, collate([*examples[:1], *(tried[row] for row in rows)], length, slots))
            for slot, row in enumerate(rows, start=1):
                for one, other, size in zip(alone[row], padded, sizes, strict=True):
                    worst = max(worst, _distance(one[0], other[slot], size))
    return worst


@contextmanager
def _loud_padding(model: TrainableModel) -> Iterator[None]:
    """For the time of the block, the padding token's vector is as long as those of others are together.

    Where the table of tokens is the output layer, too, only what is read changes: scores of a token with such a row would round
    so coarsely that nothing could be compared.
    """
    module: Any = model.loaded.module
    pad = getattr(model.loaded.reader, "pad_token_id", None)
    if isinstance(module, StackedClassifier):
        tables = list(module.padded_tables())
    else:
        tables = [] if pad is None else [(module.get_input_embeddings(), int(pad))]
    with ExitStack() as stack:
        for table, number in tables:
            stack.enter_context(_loud_row(table, number))
        yield


@contextmanager
def _loud_row(table: Any, number: int) -> Iterator[None]:
    """The same of one table of tokens; nothing where it is none."""
    weight = getattr(table, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        yield
        return
    loud = weight.abs().sum(dim=0)

    def replace(_: object, args: tuple[Tensor, ...], read: Tensor) -> Tensor:
        return torch.where(args[0].eq(number)[..., None], loud, read)

    hook = table.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _with_lengthened(example: Example, longest: int) -> list[Example]:
    """The example, and itself at a length at which blocks and windows come into play."""
    if "input_ids" not in example:
        return [example]
    return [example, stretch_example(example, min(20, longest))]


def _paddings(model: TrainableModel, example: Example) -> list[int]:
    """The bucket of an example, and the next longer ones, of which no record of its length would be a part."""
    bucket = model.loaded.task.bucket(example, model.loaded.max_length)
    if "input_ids" not in example:
        return [bucket]
    longest = min(model.loaded.max_length, 4 * len(example["input_ids"]))
    return [bucket, *(length for length in LENGTHS if bucket < length <= longest)]


def _outputs(model: TrainableModel, batch: Batch) -> list[Tensor]:
    found = [model.loaded.task.scores(model.module, batch).cpu()]
    if feature_head(model) is not None:
        found.append(encode_vectors(model, batch, torch.float32))
    return found


def _distance(alone: Tensor, padded: Tensor, size: float) -> float:
    """Relative to a size; of tokens' scores, of those at the positions that the record has."""
    padded = padded[: len(alone)] if alone.dim() > 1 else padded
    distance = _root_mean_square(padded.double() - alone.double())
    return distance / size if size > 0 and math.isfinite(distance) else (0.0 if distance == 0 else math.inf)


def _root_mean_square(of: Tensor) -> float:
    return float(of.double().square().mean().sqrt())
