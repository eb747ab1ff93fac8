"""Linear algebra of low-rank factors: stacking, truncation, padding and norms of products B·A.

Only `weight_change`, whose caller needs it, works on a matrix of the size of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cotune.models.adapters.adapter import Adapter
from cotune.strategies.sums import add_weighted, divide
from cotune.strategies.types import WeightedUpdate


def average_deltas(updates: Sequence[WeightedUpdate]) -> dict[str, Tensor]:
    """Return the weighted mean of the deltas, as the fusion `mean` does."""
    sums: dict[str, Tensor] = {}
    for update in updates:
        add_weighted(sums, update)
    return divide(sums)


def normalize_weights(updates: Sequence[WeightedUpdate]) -> list[float]:
    """Return p_k = w_k / Σ w for each update."""
    weights = [update.scalar for update in updates]
    return [weight / sum(weights) for weight in weights]


def get_factors(update: WeightedUpdate, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return the organization's factors after its training, in float64.

    Args:
        update: Contains A_k, B_k or both; a factor that was not trained is taken from the received state.
        adapter: Names of the factors.

    Returns:
        B_k (d_out, r_k) and A_k (r_k, d_in).
    """
    sent = update.update.delta
    rank = sent[adapter.b].shape[1] if adapter.b in sent else sent[adapter.a].shape[0]
    b = update.state[adapter.b][:, :rank].to(torch.float64)
    a = update.state[adapter.a][:rank].to(torch.float64)
    return b + sent.get(adapter.b, torch.zeros(())), a + sent.get(adapter.a, torch.zeros(()))


def stack_factors(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float | Tensor]) -> tuple[Tensor, Tensor]:
    """Stack factors so that their product is Σ q_k B_k A_k.

    Args:
        factors: (B_k, A_k) of each organization.
        weights: q_k, a number or one per column (r_k,).

    Returns:
        [q_1 B_1 … q_K B_K] (d_out, Σ r_k) and [A_1; …; A_K] (Σ r_k, d_in).
    """
    left = torch.cat([b * q for (b, _), q in zip(factors, weights, strict=True)], dim=1)
    return left, torch.cat([a for _, a in factors])


def truncate_to_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of left·right of a given rank (Eckart & Young, 1936), without forming the product.

    The signs of singular vectors are arbitrary; here the entry of the largest magnitude in each row of A is positive, so that
    every machine gives the same factors.

    Args:
        left: (d_out, m), float64.
        right: (m, d_in), float64.
        rank: r. If m, d_out or d_in is smaller, the remaining columns of B and rows of A are 0.

    Returns:
        B = U_r Σ_r (d_out, r), and A = V_rᵀ (r, d_in) with orthonormal rows.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    b = (q_left @ u * s)[:, :rank]
    a = (vh @ q_right.T)[:rank]
    signs = a.gather(1, a.abs().argmax(dim=1, keepdim=True)).sign()
    return pad_to_shape(b * signs.T, (len(b), rank)), pad_to_shape(a * signs, (rank, a.shape[1]))


def pad_to_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the tensor padded with zeros at the end of each dimension, up to a shape."""
    whole = torch.zeros(tuple(shape), dtype=tensor.dtype)
    whole[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return whole


def product_norm(b: Tensor, a: Tensor) -> float:
    """Return ‖B·A‖_F = √⟨BᵀB, AAᵀ⟩."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0.0).sqrt())


def weight_change(adapter: Adapter, product: Tensor) -> Tensor:
    """Return the change of W for a product of factors, scaled by s and in the memory layout of W."""
    scaled = adapter.scale * product
    return scaled.T if adapter.transposed else scaled


def delta_between(state: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the delta from the state to the parameters in `new`."""
    return {name: tensor.to(torch.float64) - state[name].to(torch.float64) for name, tensor in new.items()}
