"""Sanity checks of a round: exactly the trained parameters change, and all of them stay finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cotune.errors import RunError
from cotune.models.trainable import TrainableModel
from cotune.privacy.mechanisms.dp_sgd import StepReport

_MAX_USUAL_VALUE = 100.0  # of a parameter of a usable model


class SanityChecks:
    """Sanity checks of one round: exactly the trainable parameters change.

    A model that is wired wrongly costs one step, and no more.

    Args:
        before: The trained parameters as they were received.
        noise: Whether every step adds noise.
        summed_at_once: Entries that a checksum takes at once; the default takes 32 MiB as integers.
    """

    def __init__(self, model: TrainableModel, before: Mapping[str, Tensor], *, noise: bool, summed_at_once: int = 2**22) -> None:
        self.model = model
        self.before = before
        self.noise = noise
        self.summed_at_once = summed_at_once
        self.frozen = self._checksums()

    def after_step(self, report: StepReport) -> None:
        """Check that the first step changed no frozen parameter and, with noise, every trained one. Raises RunError."""
        if report.step > 1:
            return
        changed = [name for name, checksum in self._checksums().items() if checksum != self.frozen[name]]
        if changed:
            raise RunError(
                f"the first step changed {changed[0]}, which is frozen: expected only the shared parameters to move",
                code="run.frozen_parameter_changed",
            )
        still = [name for name in self._still() if self._usual(name)]
        if self.noise and still:
            raise RunError(
                f"the first step did not move {still[0]}: expected every shared parameter to get its noise; it takes no part in"
                " the forward pass of this model, so use another train mode",
                code="run.parameter_not_trained",
            )

    def after_round(self) -> None:
        """Check that the round changed something: an adapter that is not wired in would not. Raises RunError."""
        still = self._still()
        if len(still) == len(self.before) and all(self._usual(name) for name in still):
            raise RunError(
                "no parameter moved in this round: expected every shared one to be trained; check the train mode",
                code="run.nothing_trained",
            )

    def _still(self) -> list[str]:
        own = dict(self.model.parameters())
        return [name for name, value in self.before.items() if torch.equal(own[name].detach().cpu(), value)]

    def _usual(self, name: str) -> bool:
        """Whether the values are so small that a step is not lost in rounding: those of a state that was attacked need not be."""
        value = self.before[name]
        return value.numel() == 0 or float(value.abs().max()) < _MAX_USUAL_VALUE

    def _checksums(self) -> dict[str, int]:
        """The sum of every frozen tensor's bits, parameters and buffers."""
        tensors: Iterable[tuple[str, Tensor]] = [*self.model.parameters(), *self.model.module.named_buffers()]
        return {name: _checksum(tensor, self.summed_at_once) for name, tensor in tensors if name not in self.before}


def _checksum(tensor: Tensor, at_once: int) -> int:
    """A slice at a time: on a GPU a sum of integers first makes 64 bits of each."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().view(words).flatten()
    parts = [part.sum(dtype=torch.int64) for part in torch.split(flat, at_once)]
    return int(torch.stack(parts).sum()) if parts else 0
