from __future__ import annotations

import torch

from tests.support.adapted_layers import HEAD, A, B, adapter, close, deltas_of, fused, state_of


def test_by_hand() -> None:
    """‖B_k A_k‖_F = 5·1 = 5 at rank 1, and √(9² + 12²) = 15 at rank 2: weights ¼ and ¾."""
    state = {A: torch.zeros(2, 2), B: torch.zeros(2, 2)}
    small = {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[3.0], [4.0]])}
    whole = {A: torch.eye(2), B: torch.tensor([[9.0, 0.0], [0.0, 12.0]])}
    new = fused("hetlora", state, [small, whole], (1, 1), adapter(2))
    close(new[A], torch.tensor([[1.0, 0.0], [0.0, 0.75]]))
    close(new[B], torch.tensor([[7.5, 0.0], [1.0, 9.0]]))


def test_equal_adapters_leave_the_weights_of_the_weighting() -> None:
    state = state_of(2)
    [delta] = deltas_of(state, (2,))
    other = {A: delta[A], B: -delta[B] - 2 * state[B], HEAD: 3 * delta[HEAD]}  # B_k turned round: the same norm
    new = fused("hetlora", state, [delta, other], (3, 1), adapter(2))
    mean = fused("mean", state, [delta, other], (3, 1))
    for name in (A, B, HEAD):
        close(new[name], mean[name], 1e-6)


def test_adapters_that_do_nothing_are_averaged_all_the_same() -> None:
    state = {A: torch.ones(1, 2), B: torch.zeros(2, 1)}
    still = {A: torch.ones(1, 2), B: torch.zeros(2, 1)}
    new = fused("hetlora", state, [still, {**still, A: torch.zeros(1, 2)}], (1, 1), adapter(1))
    close(new[A], torch.full((1, 2), 1.5))
