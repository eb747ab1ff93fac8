"""Find the last transformer blocks of an encoder, and what follows them, by the names of its parameters.

A block is a layer that architectures number: `bert.encoder.layer.5.…`, `transformer.h.11.…`, `vit.encoder.layer.3.…`. With an
encoder and a decoder, each has blocks of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cotune.errors import ModelError

_BLOCK = re.compile(r"^(?P<stack>(?:[^.0-9][^.]*\.)+)(?P<number>\d+)\.")


def block_of(name: str) -> tuple[str, int] | None:
    """Return (stack, number) of the block that a parameter lies in; None where it lies in none."""
    found = _BLOCK.match(name)
    return (found["stack"], int(found["number"])) if found else None


def last_blocks(names: Sequence[str], layers: int, declared: int | None = None) -> list[str]:
    """Return the parameters of the last blocks of every stack, and those that follow them (a final norm, a pooler).

    Tables of embeddings, wherever an architecture lists them, follow nothing.

    Args:
        names: Of the encoder's parameters that may be trained, in its order.
        layers: How many blocks, from the last one.
        declared: How many the architecture says that it has; None where it does not say.

    Raises:
        ModelError: When there are fewer, or blocks share their weights.
    """
    counts: dict[str, int] = {}
    for stack, number in filter(None, map(block_of, names)):
        counts[stack] = max(counts.get(stack, 0), number + 1)
    fewest = min(counts.values(), default=0)
    if layers > fewest:
        raise ModelError(
            f"train = blocks with layers = {layers}, but the encoder has {fewest} blocks: expected at most {fewest}, or train ="
            " full",
            code="model.too_many_blocks",
        )
    if declared is not None and fewest < declared - 1:  # one may be the mean of token vectors, which is never trained
        raise ModelError(
            f"the encoder says that it has {declared} layers and holds the weights of {fewest}, so that they share them and none"
            " is the last: expected train = lora or full",
            code="model.shared_blocks",
        )
    first = next(i for i, name in enumerate(names) if _is_last(name, counts, layers))
    return [n for i, n in enumerate(names) if _is_last(n, counts, layers) or (i > first and _follows(n))]


def _is_last(name: str, counts: dict[str, int], layers: int) -> bool:
    found = block_of(name)
    return found is not None and found[1] >= counts[found[0]] - layers


def _follows(name: str) -> bool:
    return block_of(name) is None and "embed" not in name
