"""Batches of fixed shapes: what a record becomes must not depend on the records that share its batch.

Rows of one length share a forward pass, and a shape decides which kernels compute it and in which order they add. So the length
of a batch is a bucket that each record chooses by itself, the number of slots is a public constant, and slots without a record
hold blank rows. One slot is blank in every batch, unless all rows are longer than their records: transformers leaves out an
attention mask that hides nothing, and a record would learn by the kernel that runs then whether all others in its batch are of
full length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Of batches of few records, as steps of DP-SGD have them: few lengths, or most slots would be blank.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# Of passes over many records (see `models.features.feature_batches`), where slots of many lengths are filled.
FINE_LENGTHS = tuple(sorted({*range(8, 40, 4), *range(40, 128, 8), *(n for n in LENGTHS if n >= 128)}))
_SHORTEST = 2  # a blank row shows one position and hides the others


def bucket_of_length(tokens: int, max_length: int, lengths: Sequence[int] = LENGTHS) -> int:
    """Return the length to which a row is padded, decided by the row alone.

    Args:
        tokens: Of the row.
        max_length: Of the model; no row is longer.
        lengths: Lengths to choose from, ascending.
    """
    longest = max(max_length, _SHORTEST)
    fitting = (length for length in lengths if length >= tokens)
    return max(tokens, min(next(fitting, longest), longest))


def fixed_batches(
    rows: Sequence[int], bucket_of: Callable[[int], int], slots: int, rows_of: Callable[[int], int] | None = None
) -> Iterator[tuple[list[int], int]]:
    """Distributes rows over batches of `slots` slots each, the last of which stays blank.

    Args:
        rows: Row numbers, in any order.
        bucket_of: Row number -> its bucket, from the row alone (`Task.bucket`).
        slots: Rows of a batch, the blank one included; at least 2. A public constant: no number of records may decide it.
        rows_of: Bucket -> how many rows a batch takes, where that is not slots - 1: all, if every row hides a position itself.

    Yields:
        (at most as many row numbers of one bucket in the order of `rows`, the bucket); buckets in ascending order.

    Raises:
        ValueError: With fewer than 2 slots.
    """
    if slots < 2:
        raise ValueError(f"expected slots={slots} >= 2: one slot of every batch is blank")
    held: dict[int, list[int]] = {}
    for row in rows:
        held.setdefault(bucket_of(row), []).append(row)
    for bucket in sorted(held):
        count = rows_of(bucket) if rows_of else slots - 1
        for start in range(0, len(held[bucket]), count):
            yield held[bucket][start : start + count], bucket


def sorted_batches(rows: Sequence[int], order_of: Callable[[int], Any], size: int) -> Iterator[list[int]]:
    """Yield batches of like rows, at most `size` each, where no privacy is promised: their shapes follow the rows.

    order_of: Row number -> a key by which like rows stand together (`Task.order`).
    """
    ordered = sorted(rows, key=order_of)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
