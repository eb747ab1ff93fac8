"""Linear layers whose rows are all computed alike, whatever the width.

A kernel for a product with few columns, such as the scores of a head, adds a row up in an order that depends on where the row
begins in memory. Rows of 33 float32 begin at every remainder of 16 bytes, so that a record's scores depended on its slot, and
with it on how many records stand before it: in a state of weights of unlike size one record moved others by 1.8e-6 clip norms.
Rows of a multiple of 64 bytes begin all at the same remainder, whichever instructions a processor has.

A product with one column (a LoRA factor of rank 1) is one of a matrix and a vector, whose kernel takes rows by fours, and those
that are left over in another way: it gets a second column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_MULTIPLE = 16  # entries of a row: 64 bytes of float32, a cache line, and more than any vector register's alignment


class AlignedRows(TorchFunctionMode):
    """For the time of the block, inputs and weights of linear layers are filled up with zeros.

    To rows of a multiple of 64 bytes, and to two columns at least.

    What is computed stays the same up to rounding. Layers that have such a width already are left alone, to the bit.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what was called, with filled-up rows where it is a linear layer."""
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of the same arguments."""
    lacking, columns = -input.shape[-1] % _MULTIPLE, len(weight)
    if lacking:
        input = functional.pad(input, (0, lacking))
        weight = functional.pad(weight, (0, lacking))
    if columns > 1:
        return functional.linear(input, weight, bias)
    if bias is not None:
        bias = functional.pad(bias, (0, 1))
    return functional.linear(input, functional.pad(weight, (0, 0, 0, 1)), bias)[..., :columns]
