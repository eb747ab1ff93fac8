"""Change gradients before every step of an optimizer: under DP-SGD, after the noise was added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def adding_to_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    term: Callable[[str, nn.Parameter], Tensor | None],
) -> Iterator[None]:
    """During the block, add a term to the gradient before every step: under DP-SGD, to the gradient that has its noise.

    Args:
        optimizer: Whose steps they are.
        parameters: By their names.
        term: (name, parameter) -> what is added to its gradient; None: nothing.
    """

    @torch.no_grad()
    def add() -> None:
        for name, p in parameters.items():
            more = term(name, p)
            if more is not None:
                p.grad = more if p.grad is None else p.grad + more

    with before_steps(optimizer, add):
        yield


@contextmanager
def before_steps(optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> Iterator[None]:
    """During the block, act before every step of the optimizer."""
    hook = optimizer.register_step_pre_hook(lambda *_: act())
    try:
        yield
    finally:
        hook.remove()
