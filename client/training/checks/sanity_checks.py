"""Sanity checks of a round: exactly the trained parameters change, and all of them stay finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from cotune.client.training.request_context import RequestContext
from cotune.errors import RunError
from cotune.models.trainable import State, TrainableModel
from cotune.privacy.mechanisms.dp_sgd import StepReport

_MAX_USUAL_VALUE = 100.0  # of a parameter of a usable model
_LEAST_LOSS = 1e-4  # mean loss of a batch below which a step may be lost in rounding
_LARGE = 2**16  # entries of a buffer
_Writes = tuple[int, int]  # where a tensor lies, and how often it was written
_summed: WeakKeyDictionary[TrainableModel, dict[str, tuple[_Writes, int]]] = WeakKeyDictionary()  # as a round has left it


class SanityChecks:
    """Sanity checks of one round: exactly the trainable parameters change.

    A model that is wired wrongly costs one step, and no more. Frozen parameters and large buffers are watched by the counters
    that PyTorch raises with every write, and other buffers by checksums. What writes past the counters, such as a kernel of
    somebody else, shows in the checksums of all of them at the end, where these are asked for. Nothing is watched before `begin`.

    Args:
        before: The trained parameters as they were received.
        noise: Whether every step adds noise.
        thorough: Whether all that is watched by counters is compared by a checksum at the end of the round, too.
        summed_at_once: Entries that a checksum takes at once; the default takes 32 MiB as integers.
    """

    def __init__(
        self,
        model: TrainableModel,
        before: Mapping[str, Tensor],
        *,
        noise: bool,
        thorough: bool = True,
        summed_at_once: int = 2**22,
    ) -> None:
        self.model = model
        self.before = before
        self.noise = noise
        self.summed_at_once = summed_at_once
        self._sums = self._recall_sums() if thorough else {}
        self._own = dict(model.parameters())

    def begin(self) -> None:
        """Watch from here on: trials before the first step write parameters and restore them."""
        self._has_learned = self.noise
        self._writes = self._count_writes()
        self._buffers = self._sum_buffers()
        _watching[self.model] = ref(self)

    @contextmanager
    def allowing_trials(self) -> Iterator[None]:
        """Let frozen parameters be written during the block, if they have their values again at its end. Raises RunError."""
        _check_same(self._writes, self._count_writes())
        sums = self._sum_frozen()
        yield
        _check_same(sums, self._sum_frozen())
        self._writes = self._count_writes()

    def after_step(self, report: StepReport) -> None:
        """Check that the first step changed no frozen parameter and, with noise, every trained one. Raises RunError."""
        self._has_learned = self._has_learned or (report.loss or 0.0) > _LEAST_LOSS
        if report.step > 1:
            return
        _check_same(self._writes, self._count_writes())
        _check_same(self._buffers, self._sum_buffers())
        still = [name for name in self._still() if self._usual(name)]
        if self.noise and still:
            raise RunError(
                f"the first step did not move {still[0]}: expected every shared parameter to get its noise; it takes no part in"
                " the forward pass of this model, so use another train mode",
                code="run.parameter_not_trained",
            )

    def after_round(self) -> None:
        """Check that the round changed something, as an adapter that is not wired in would not, and nothing frozen.

        Without noise a round may change nothing: its batches are empty where records are few, or a model that is sure of every
        record, as of those of a single class, has no gradient in float32.

        Raises:
            RunError: It should have and did not, or a checksum is another one.
        """
        still = self._still()
        if self._has_learned and len(still) == len(self.before) and all(self._usual(name) for name in still):
            raise RunError(
                "no parameter moved in this round: expected every shared one to be trained; check the train mode",
                code="run.nothing_trained",
            )
        if self._sums:
            found = self._sum_frozen()
            _check_same(self._sums, found)
            _summed[self.model] = {name: (writes, found[name]) for name, writes in self._count_writes().items()}

    def _still(self) -> list[str]:
        return [name for name, value in self.before.items() if torch.equal(self._own[name].detach().cpu(), value)]

    def _usual(self, name: str) -> bool:
        """Whether the values are so small that a step is not lost in rounding: those of a state that was attacked need not be."""
        value = self.before[name]
        return value.numel() == 0 or float(value.abs().max()) < _MAX_USUAL_VALUE

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        """What is watched by counters: the frozen parameters and the large buffers."""
        yield from ((name, parameter) for name, parameter in self.model.parameters() if name not in self.before)
        yield from ((name, buffer) for name, buffer in self.model.buffers() if _is_counted(buffer))

    def _count_writes(self) -> dict[str, _Writes]:
        """Where each of them lies, and how often it was written."""
        return {name: _count_writes(tensor) for name, tensor in self._frozen()}

    def _sum_buffers(self) -> dict[str, int]:
        return {name: _checksum(buffer, self.summed_at_once) for name, buffer in self.model.buffers() if not _is_counted(buffer)}

    def _recall_sums(self) -> dict[str, int]:
        """As `_sum_frozen`; of those that were not written since, as they were at the end of the round before."""
        known = _summed.get(self.model, {})
        now = self._count_writes()
        same = {name: total for name, (writes, total) in known.items() if now.get(name) == writes}
        return {name: same[name] if name in same else _checksum(tensor, self.summed_at_once) for name, tensor in self._frozen()}

    def _sum_frozen(self) -> dict[str, int]:
        """The sum of the bits of each of them."""
        return {name: _checksum(tensor, self.summed_at_once) for name, tensor in self._frozen()}


_watching: WeakKeyDictionary[TrainableModel, ReferenceType[SanityChecks]] = WeakKeyDictionary()  # the last that has begun


@contextmanager
def trials_allowed(model: TrainableModel) -> Iterator[None]:
    """Allow trials in the middle of a round, which write what is frozen and restore it (`SanityChecks.allowing_trials`)."""
    watching = _watching.get(model)
    checks = None if watching is None else watching()
    if checks is None:
        yield
        return
    with checks.allowing_trials():
        yield


def _count_writes(tensor: Tensor) -> _Writes:
    return tensor.data_ptr(), tensor._version


def _is_counted(buffer: Tensor) -> bool:
    """Whether a buffer is so large that it is watched as parameters are, such as the map of features; PyTorch has to count."""
    return buffer.numel() > _LARGE and not buffer.is_inference()


def _check_same(before: Mapping[str, object], now: Mapping[str, object]) -> None:
    changed = [name for name, value in now.items() if value != before[name]]
    if changed:
        raise RunError(
            f"training changed {changed[0]}, which is frozen: expected only the shared parameters to move",
            code="run.frozen_parameter_changed",
        )


def build_sanity_checks(context: RequestContext, before: State, *, noise: bool) -> SanityChecks:
    """Return thorough checks in every round of a real organization, and in the last one of a simulation, with one model for all.

    Args:
        context: The round.
        before: As of `SanityChecks`.
        noise: As of `SanityChecks`.
    """
    thorough = not context.site.file.simulated or context.round == context.plan.rounds
    return SanityChecks(context.model, before, noise=noise, thorough=thorough)


def _checksum(tensor: Tensor, at_once: int) -> int:
    """A slice at a time: on a GPU a sum of integers first makes 64 bits of each."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().view(words).flatten()
    if 0 < len(flat) <= at_once:
        return int(flat.sum(dtype=torch.int64))
    parts = [part.sum(dtype=torch.int64) for part in torch.split(flat, at_once)]
    return int(torch.stack(parts).sum()) if parts else 0
