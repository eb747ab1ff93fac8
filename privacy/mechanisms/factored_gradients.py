"""Gradients of single rows for the weight of a linear layer, held as the factors that they are products of.

The gradient of row n for the weight of y = x·Wᵀ is Σ_t ∂y[n, t] ⊗ x[n, t] (Goodfellow 2015, https://arxiv.org/abs/1510.01799,
equation 3): outputs × inputs numbers, where its factors are positions × (outputs + inputs). Clipping reads a gradient twice, once
for its norm and once for the sum. So it is multiplied out twice, a few rows at a time, in memory that stays in the processor's
cache, and gradients of all layers never exist at once.

That is no ghost clipping: no norm is found from other products than those that are added. Both passes have to give the same bits,
and are compared.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cotune.errors import PrivacyError
from cotune.models.architecture import fill_rows

_PIECE_ENTRIES = {"cuda": 2**24, "cpu": 2**19}  # numbers of gradients that exist at a time: a GPU idles on fewer
_HASH_KEY = secrets.randbits(63)  # nobody can choose a model whose gradients collide
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> integers of its bits


def has_fewer_factors(inputs: Tensor, above: Tensor) -> bool:
    """Whether the factors of gradients are fewer numbers than the gradients. A matter of shapes, never of values.

    Args:
        inputs: (n, …, inputs) what the layer has read.
        above: (n, …, outputs) the gradients of the losses for its outputs.
    """
    return inputs.numel() + above.numel() < len(inputs) * inputs.shape[-1] * above.shape[-1]


class Scratch:
    """Memory for pieces, one after the other.

    With memory of its own for each piece, what a step of all layers took grew to 2 GB: an aligned block does not fit into the gap
    that one of its size has left, where something small was put behind it in the meantime.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def shaped(self, use: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor that holds anything, and is overwritten by the next one for the same use.

        Args:
            use: A name; memory for one is not that for another.
            shape: Of the tensor.
            like: Has its device and, where none is given, its dtype.
            dtype: Of the tensor.
        """
        key = (use, dtype or like.dtype)
        count = math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < count or held.device != like.device:
            held = self._held[key] = torch.empty(count, dtype=key[1], device=like.device)
        return held[:count].view(tuple(shape))


def multiply(inputs: Tensor, above: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Return the gradients of n rows, (n, outputs, inputs): Σ_t above[n, t] ⊗ inputs[n, t].

    Args:
        inputs: (n, positions, inputs).
        above: (n, positions, outputs).
        scratch: Where they are put; None: into memory of their own.
    """
    left, right = fill_rows(above).transpose(1, 2), fill_rows(inputs)
    shape = (len(left), left.shape[1], right.shape[2])
    products = torch.bmm(left, right, out=scratch.shaped("products", shape, right)) if scratch else torch.bmm(left, right)
    return products[:, : above.shape[-1], : inputs.shape[-1]]


@dataclass
class FactoredGradients:
    """The gradients of n rows for one weight (outputs, inputs).

    Attributes:
        rows: n; the factors may have more, which are blank.
        dtype: Of the gradients; that of a product may be narrower.
        factors: For each use of the layer (inputs, above): (≥ n, positions, inputs) and (≥ n, positions, outputs).
    """

    rows: int
    dtype: torch.dtype
    factors: list[tuple[Tensor, Tensor]]
    _seen: list[Tensor] = field(default_factory=list)  # of each piece, a checksum of its bits

    def first(self, rows: int) -> FactoredGradients:
        """Those of the first rows alone."""
        return FactoredGradients(rows, self.dtype, self.factors)

    def pieces(self, scratch: Scratch | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield the gradients of a few rows at a time: which ones, and (k, outputs, inputs). The next overwrites them.

        All are cut from products of one shape, however many rows are blank: a row's gradient is a function of the row alone.

        Args:
            scratch: Where they are put one after the other.

        Raises:
            PrivacyError: Where a second call does not give the same bits as the first: norms would be those of other gradients.
        """
        size = self._piece_rows()
        scratch = scratch or Scratch()
        found = []
        for start in range(0, self.rows, size):
            piece = self._multiply(slice(start, start + size), scratch)
            found.append(_checksum(piece))
            yield slice(start, min(start + size, self.rows)), piece[: self.rows - start]
        self._compare(found)

    def whole(self) -> Tensor:
        """Return all gradients, (n, outputs, inputs)."""
        return torch.cat([piece.clone() for _, piece in self.pieces()])

    def fingerprints(self) -> list[Tensor]:
        """Return what tells the gradients of two rows apart: their norms (n,) in float64, and hashes of their bits (n,).

        The hash is Σ a_j·b_j modulo 2⁶⁴ of the entries' bits b under random a_j: those of two gradients that differ in an entry
        are the same with a probability of at most 2⁻³², as a difference below 2³² has at most 32 factors of 2 (a vector's
        multiply-shift hash without the shift, Thorup 2015, https://arxiv.org/abs/1504.06804).
        """
        norms = []
        hashes = []
        for _, piece in self.pieces():
            norms.append(norms_of(piece))
            hashes.append(_hash(piece))
        return [torch.cat(norms), torch.cat(hashes)]

    def _piece_rows(self) -> int:
        inputs, above = self.factors[0]
        entries = inputs.shape[-1] * above.shape[-1]
        most = max(1, _PIECE_ENTRIES.get(inputs.device.type, _PIECE_ENTRIES["cpu"]) // entries)
        return math.gcd(len(inputs), 2 ** int(math.log2(most)))

    def _multiply(self, rows: slice, scratch: Scratch) -> Tensor:
        inputs, above = self.factors[0]
        total = multiply(inputs[rows], above[rows], scratch)
        for inputs, above in self.factors[1:]:
            total += multiply(inputs[rows], above[rows])
        if total.dtype == self.dtype:
            return total
        return scratch.shaped("widened", total.shape, total, self.dtype).copy_(total)

    def _compare(self, found: list[Tensor]) -> None:
        if not found:
            return
        if self._seen and not torch.equal(torch.stack(found), torch.stack(self._seen)):
            raise PrivacyError(
                "the same gradients were computed twice and came out differently: expected the same bits, without which no norm"
                " is certain; train on another device",
                code="privacy.not_repeatable",
            )
        self._seen = found


def norms_of(piece: Tensor) -> Tensor:
    """Return the norm of each of k gradients, (k,) in float64; not a finite number where an entry is none."""
    found: Tensor = torch.linalg.vector_norm(piece.reshape(len(piece), -1), dim=1, dtype=torch.float64)
    return found


def _checksum(piece: Tensor) -> Tensor:
    """The sum of a tensor's bits as whole numbers, which wraps around."""
    bits = _BITS[piece.element_size()]
    return piece.contiguous().view(bits).sum(dtype=bits)


def _hash(piece: Tensor) -> Tensor:
    """A hash of the bits of each of k gradients, (k,) in int64."""
    bits = piece.contiguous().view(_BITS[piece.element_size()]).flatten(1).to(torch.int64)
    generator = torch.Generator(piece.device).manual_seed(_HASH_KEY)
    lowest = torch.iinfo(torch.int64).min
    weights = torch.randint(lowest, -(lowest + 1), bits.shape[1:], generator=generator, device=piece.device)
    return bits.mul_(weights).sum(dim=1)


RowGradients = Tensor | FactoredGradients
"""The gradients of n rows for one parameter: (n, *shape), or their factors."""


def pieces_of(gradients: RowGradients, scratch: Scratch | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the gradients of a few rows at a time, as `FactoredGradients.pieces`; those of a tensor are views of it."""
    if isinstance(gradients, FactoredGradients):
        yield from gradients.pieces(scratch)
        return
    entries = max(1, gradients[:1].numel())
    size = max(1, _PIECE_ENTRIES.get(gradients.device.type, _PIECE_ENTRIES["cpu"]) // entries)
    for start in range(0, len(gradients), size):
        yield slice(start, start + size), gradients[start : start + size]


def first_of(gradients: RowGradients, rows: int) -> RowGradients:
    """Return the gradients of the first rows alone."""
    return gradients.first(rows) if isinstance(gradients, FactoredGradients) else gradients[:rows]


def whole_of(gradients: RowGradients) -> Tensor:
    """Return all gradients as one tensor, (n, *shape)."""
    return gradients.whole() if isinstance(gradients, FactoredGradients) else gradients
