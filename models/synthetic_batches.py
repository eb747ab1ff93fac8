"""Check with synthetic batches that a record's results are bit-identical at every position and beside any other records.

Kernels choose the order of the sums in a matrix product by shape, thread and position. What holds on one machine may not hold on
another, so it is tested with the shapes, the arithmetic and the device that will be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cotune.data.inputs.batching import LENGTHS
from cotune.data.tasks.classes import IGNORED, Batch
from cotune.data.tasks.text import Example
from cotune.errors import ModelError
from cotune.models.trainable import TrainableModel

PerSlot = Callable[
    [Batch], Sequence[Tensor]
]  # a batch -> tensors (slots, ...), each row of which is about the record in the slot
Operation = tuple[Any, tuple[torch.Size, ...]]  # an overload of an operator, and the shapes of its tensors


def bucket_lengths(model: TrainableModel, lengths: Sequence[int] = LENGTHS) -> tuple[int, ...]:
    """Every bucket, out of these lengths, that a record of this model can be in: (1,) for images."""
    loaded = model.loaded
    (example, *_) = loaded.task.samples(loaded.reader)
    if "input_ids" not in example:
        return (loaded.task.bucket(example, loaded.max_length),)
    longest = loaded.max_length
    counts = (*(n for n in lengths if n < longest), longest)
    return tuple(sorted({loaded.task.bucket({**example, "input_ids": [0] * n}, longest, lengths) for n in counts}))


def mixes_records(answer: PerSlot, probes: Iterable[tuple[Batch, Sequence[int]]]) -> bool:
    """Return whether the result of `answer` for a record changes in any bit with its slot or the other records.

    The operations and shapes must not change either, whatever a batch contains. Then the kernels, and the order in which they
    add, do not depend on values, and neither does the result of this function. An operation on groups of data-dependent sizes
    (as in mixtures of experts) counts as mixing: which rows are computed together depends on all records.

    Args:
        answer: The computation, in the arithmetic that will train.
        probes: Batches of the same shape, each with the slots that contain the same record.
    """
    first: tuple[list[Operation], list[Tensor]] | None = None
    for batch, places in probes:
        with _Operations() as operations:
            answers = [tensor.detach().cpu() for tensor in answer(batch)]
        rows = [_as_bytes(tensor)[places] for tensor in answers]
        first = first or (operations.seen, [row[:1] for row in rows])
        finite = all(bool(tensor[places].isfinite().all()) for tensor in answers)  # NaNs would hide what a kernel does
        same = all(bool((row == expected).all()) for row, expected in zip(rows, first[1], strict=True))
        if not (finite and same) or operations.seen != first[0] or operations.are_grouped():
            return True
    return False


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what is computed inside the block: each operation, and the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Operation] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here; keeping the compiler out of every single operation takes longer than to note it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs) if kwargs else func(*args)
        shapes: list[torch.Size] = []
        _add_shapes(args, shapes)
        if kwargs:
            _add_shapes(kwargs.values(), shapes)
        _add_shapes((found,), shapes)
        self.seen.append((func, tuple(shapes)))
        return found

    def are_grouped(self) -> bool:
        """Return whether an operation computes groups of rows whose sizes are data."""
        return any("grouped" in str(func) for func in {func for func, _ in self.seen})


def _add_shapes(values: Iterable[Any], shapes: list[torch.Size]) -> None:
    """Add the shapes of tensors among what an operation was given or returned, and in its lists: it has no other containers."""
    for value in values:
        if isinstance(value, Tensor):
            shapes.append(value.shape)
        elif isinstance(value, list | tuple):
            _add_shapes(value, shapes)


def feature_probes(
    shape: Sequence[int], pool: Tensor, slots: int, device: torch.device, number: int
) -> Iterator[tuple[Batch, list[int]]]:
    """Two batches of features as a head is trained on, and the slots in which they hold the probe of that number.

    The probe stands beside vectors a thousand times as long, and beside blank ones and others of its kind.

    Args:
        shape: (d,) of a record's features, or (t, d) where each of its words has a vector.
        pool: Labels to take turns with (see `Task.label_pool`).
    """
    generator = torch.Generator().manual_seed(number)
    probe = torch.randn(*shape, generator=generator)
    for parity, size in ((0, 1000.0), (1, 1.0)):
        vectors = size * torch.randn(slots, *shape, generator=generator)
        labels = pool[torch.arange(slots) % len(pool)]
        if len(shape) > 1:
            labels = labels[:, None].repeat(1, shape[0])
        if parity:
            vectors[::4] = 0.0
            labels[::4] = IGNORED
        vectors[parity::2] = probe
        labels[parity::2] = pool[number % len(pool)]
        yield {"features": vectors.to(device), "labels": labels.to(device)}, list(range(parity, slots, 2))


def example_probes(
    model: TrainableModel, length: int, slots: int, filled: int | None = None
) -> Iterator[tuple[Batch, list[int]]]:
    """Yield two batches of the same shape with a probe record, in the even slots of one and the odd slots of the other.

    The other slots contain long, short, extreme and blank records. The last slots are blank, as in `fixed_batches`.

    Args:
        model: For its reader and device.
        length: Of the rows, in tokens.
        slots: Rows per batch.
        filled: How many of them may hold records; all but one, where not given. Where all may, no record fills its row.

    Yields:
        (batch, the slots of the probe).
    """
    loaded = model.loaded
    collate = loaded.task.collator(model.module, loaded.reader, model.device)
    filled = slots - 1 if filled is None else filled
    probe, *crowd = _examples(model, length - (filled == slots))
    quiet = [loaded.task.blank(loaded.reader, length), crowd[1]]
    for parity, others in ((0, crowd), (1, quiet)):
        slot = range(filled)
        rows = [probe if i % 2 == parity else others[i // 2 % len(others)] for i in slot]
        places = [i for i in slot if i % 2 == parity]
        if places:
            yield _brighten_neighbors(collate(rows, length, slots), places), places


def _examples(model: TrainableModel, length: int) -> list[Example]:
    """A probe, and records that it may meet: one of full length, the shortest, the loudest, and one of special tokens."""
    loaded = model.loaded
    samples: list[Example] = loaded.task.samples(loaded.reader)
    if "input_ids" not in samples[0]:
        return [samples[2], *samples[:2]]
    loudest = _longest_embedding(model)
    spelled = _special_tokens(model, length)
    rows = (
        stretch_example(samples[0], max(1, length - 2)),
        stretch_example(samples[1], length),
        stretch_example(samples[0], 1),
        stretch_example({"input_ids": [loudest], "labels": _labels(samples[0])}, length),
        stretch_example({"input_ids": spelled, "labels": _labels(samples[0])}, length),
    )
    return list(rows)


def _labels(example: Example) -> Any:
    labels = example["labels"]
    if isinstance(labels, list):
        return [1] if isinstance(labels[0], int) else labels[:1]  # of several tasks
    return 1 if isinstance(labels, int) else labels


def stretch_example(example: Example, length: int) -> Example:
    """Return an example of exactly `length` tokens: its own, cut off or repeated (labels with them), and the last as it was.

    Raises:
        ModelError: If the example has no token.
    """
    ids = example["input_ids"]
    labels = example["labels"]
    if not ids:
        raise ModelError(
            "the base model's tokenizer makes no token of a text: expected at least one; use another base model",
            code="model.unusable_tokenizer",
        )
    times = -(-length // len(ids))
    rows = (ids * times)[: length - 1] + ids[-1:] if length > 1 else ids[:1]
    if isinstance(labels, list):
        labels = (labels * (-(-length // len(labels))))[:length]
        labels[0] = max(labels[0], 0) if isinstance(labels[0], int) else labels[0]
    return {"input_ids": rows, "labels": labels}


def _longest_embedding(model: TrainableModel) -> int:
    """The token of the longest embedding."""
    table = model.loaded.module.get_input_embeddings()
    weight: Any = getattr(table, "weight", None)
    return int(weight.detach().norm(dim=1).argmax()) if isinstance(weight, Tensor) and weight.dim() == 2 else 0


def _special_tokens(model: TrainableModel, length: int) -> list[int]:
    """Special tokens, which a text may spell."""
    table = getattr(model.loaded.module.config, "vocab_size", None)
    return [i for i in model.loaded.reader.all_special_ids if table is None or i < table][:length] or [0]


def _brighten_neighbors(batch: Batch, places: Sequence[int]) -> Batch:
    """Images beside the probe become a thousand times as bright; tokens are as loud as they get."""
    if "pixel_values" in batch:
        beside = torch.ones(len(batch["labels"]), dtype=torch.bool)
        beside[list(places)] = False
        beside[-1] = False
        batch["pixel_values"][beside] *= 1000.0
    return batch


def _as_bytes(tensor: Tensor) -> Tensor:
    """(b, bytes): two values that compare as equal may differ in them, and NaNs be the same."""
    rows = tensor.contiguous().reshape(len(tensor), -1)
    return rows.view(torch.uint8)
