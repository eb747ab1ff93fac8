"""What should move moves, and nothing else: looked at after the first step, where a wrong wiring costs one step and no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cotune.models.errors import RunError
from cotune.models.sharing import SharedModel
from cotune.privacy.dp_sgd import StepReport

_USUAL = 100.0  # of a parameter of a usable model


class Guard:
    """Watches one round. before: the trained parameters as they were received. noise: whether every step adds noise."""

    def __init__(self, model: SharedModel, before: Mapping[str, Tensor], *, noise: bool) -> None:
        self.model, self.before, self.noise = model, before, noise
        self.frozen = self._checksums()

    def after_step(self, report: StepReport) -> None:
        """Raises RunError when the first step changed a frozen parameter, or left one without the noise that it was to get."""
        if report.step > 1:
            return
        changed = [name for name, checksum in self._checksums().items() if checksum != self.frozen[name]]
        if changed:
            raise RunError(f"the first step changed {changed[0]}, which is frozen: expected only the shared parameters to move")
        still = [name for name in self._still() if self._usual(name)]
        if self.noise and still:
            raise RunError(
                f"the first step did not move {still[0]}: expected every shared parameter to get its noise; it takes no part in"
                " the forward pass of this model, so use another train mode"
            )

    def after_round(self) -> None:
        """Raises RunError when nothing moved in the whole round: an adapter that is not wired in."""
        still = self._still()
        if len(still) == len(self.before) and all(self._usual(name) for name in still):
            raise RunError("no parameter moved in this round: expected every shared one to be trained; check the train mode")

    def _still(self) -> list[str]:
        own = dict(self.model.parameters())
        return [name for name, value in self.before.items() if torch.equal(own[name].detach().cpu(), value)]

    def _usual(self, name: str) -> bool:
        """Whether the values are so small that a step is not lost in rounding: those of a state that was attacked need not be."""
        value = self.before[name]
        return value.numel() == 0 or float(value.abs().max()) < _USUAL

    def _checksums(self) -> dict[str, int]:
        """The sum of every frozen tensor's bits, parameters and buffers."""
        tensors: Iterable[tuple[str, Tensor]] = [*self.model.parameters(), *self.model.module.named_buffers()]
        return {name: _checksum(tensor) for name, tensor in tensors if name not in self.before}


def _checksum(tensor: Tensor) -> int:
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(words).sum(dtype=torch.int64))
