"""Linear algebra of low-rank factors: what organizations trained, their products side by side, and a product cut to a rank.

Nothing here builds a product of the size of a weight matrix, unless that is what the caller wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cotune.models.adapters.adapter import Adapter
from cotune.strategies.sums import add_weighted, divide
from cotune.strategies.types import WeightedUpdate


def average_deltas(updates: Sequence[WeightedUpdate]) -> dict[str, Tensor]:
    """The weighted mean of the deltas, as the fusion `mean` has it."""
    sums: dict[str, Tensor] = {}
    for update in updates:
        add_weighted(sums, update)
    return divide(sums)


def normalize_weights(updates: Sequence[WeightedUpdate]) -> list[float]:
    """p_k = w_k / Σ w."""
    weights = [update.scalar for update in updates]
    return [weight / sum(weights) for weight in weights]


def get_factors(update: WeightedUpdate, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(B_k, A_k) after training, (d_out, r_k) and (r_k, d_in) in float64; what the organization did not train is as received."""
    sent = update.update.delta
    rank = sent[adapter.b].shape[1] if adapter.b in sent else sent[adapter.a].shape[0]
    b = update.state[adapter.b][:, :rank].to(torch.float64)
    a = update.state[adapter.a][:rank].to(torch.float64)
    return b + sent.get(adapter.b, torch.zeros(())), a + sent.get(adapter.a, torch.zeros(()))


def stack_factors(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float | Tensor]) -> tuple[Tensor, Tensor]:
    """([q_1 B_1 … q_K B_K], [A_1; …; A_K]), whose product is Σ q_k B_k A_k; a weight may be one for each of the r_k columns."""
    left = torch.cat([b * q for (b, _), q in zip(factors, weights, strict=True)], dim=1)
    return left, torch.cat([a for _, a in factors])


def truncate_to_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best (B, A) of a rank for left·right (Eckart & Young, 1936): B = U_r Σ_r, and A = V_rᵀ with orthonormal rows.

    left (d_out, m), right (m, d_in), float64. Where m or a side of the product is less than the rank, the rest is 0. The entry of
    a row of A with the largest magnitude is positive, so that the signs are the same everywhere.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    b = (q_left @ u * s)[:, :rank]
    a = (vh @ q_right.T)[:rank]
    signs = a.gather(1, a.abs().argmax(dim=1, keepdim=True)).sign()
    return pad_to_shape(b * signs.T, (len(b), rank)), pad_to_shape(a * signs, (rank, a.shape[1]))


def pad_to_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same with zeros after it, up to a shape."""
    whole = torch.zeros(tuple(shape), dtype=tensor.dtype)
    whole[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return whole


def product_norm(b: Tensor, a: Tensor) -> float:
    """‖B·A‖_F = √⟨BᵀB, AAᵀ⟩."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).sqrt())


def weight_change(adapter: Adapter, product: Tensor) -> Tensor:
    """What s·(a product of factors) is for W, in the layout that W is kept in."""
    scaled = adapter.scale * product
    return scaled.T if adapter.transposed else scaled


def delta_between(state: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The delta that makes parameters of the state what they are in `new`."""
    return {name: tensor.to(torch.float64) - state[name].to(torch.float64) for name, tensor in new.items()}
