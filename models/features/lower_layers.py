"""What is below the first trained layer is computed once: a forward pass begins with what that layer read the last time.

Where only the last layers of a model are trained (`lora.layers`), everything below them gives the same for a record in every step
of every round. A record's hidden states before the first trained layer stand beside its tokens in a batch, under `STATES`; inside
`LowerLayers.skipped` the layers below hand on what they are given, and the first trained one reads these states instead.

What is computed is the same to the bit: states are made in batches of the shapes that train (see `data.inputs.batching`), and a
row does not depend on what else is in its batch. A model for which that does not hold is found out on made-up records, and is
trained from its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cotune.data.tasks.classes import Batch
from cotune.models.architecture import AlignedRows
from cotune.models.trainable import State, TrainableModel

STATES = "states_before_trained_layers"  # of a batch: (slots, length, width)
_FAILURES = (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError)
_found: WeakKeyDictionary[TrainableModel, dict[int, LowerLayers | None]] = WeakKeyDictionary()


class _Reached(Exception):
    """The first trained layer is reached."""


@dataclass(frozen=True)
class LowerLayers:
    """The layers of a model below the first one that is trained.

    Attributes:
        name: Of the list of layers, as parameters are called.
        layers: All of them.
        first: The number of the first trained one; at least 1.
        tuples: Whether a layer answers with a tuple.
    """

    module: nn.Module
    name: str
    layers: nn.ModuleList
    first: int
    tuples: bool

    @torch.no_grad()
    def read(self, batch: Batch) -> Tensor:
        """Return what the first trained layer reads of a batch: (slots, length, width). Layers above are not computed."""
        held: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        hook = self.layers[self.first].register_forward_pre_hook(stop, with_kwargs=True)
        inputs = {key: value for key, value in batch.items() if key not in ("labels", STATES)}
        try:
            self.module(**inputs)
        except _Reached:
            pass
        finally:
            hook.remove()
        return held[0]

    @contextmanager
    def skipped(self, batch: Batch) -> Iterator[Batch]:
        """Provide the batch without its states; forward passes on it inside the block begin with them. Without any, as ever."""
        states = batch.get(STATES)
        if states is None:
            yield batch
            return
        below = self.layers[: self.first]
        before = [layer.__dict__.get("forward") for layer in below]
        for layer in below:
            layer.__dict__["forward"] = self._hand_on
        hook = self.layers[self.first].register_forward_pre_hook(_reading(states), with_kwargs=True)
        try:
            yield {key: value for key, value in batch.items() if key != STATES}
        finally:
            hook.remove()
            for layer, own in zip(below, before, strict=True):
                layer.__dict__.pop("forward")
                if own is not None:
                    layer.__dict__["forward"] = own

    def _hand_on(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.tuples else hidden_states

    def trained_below(self, state: State) -> State:
        """Return what of a state lies in the encoder and not in the layers that are trained now."""
        above = tuple(f"{self.name}.{number}." for number in range(self.first, len(self.layers)))
        prefix = self.name.partition(".")[0]
        return {name: tensor for name, tensor in state.items() if name.startswith(f"{prefix}.") and not name.startswith(above)}


def _reading(states: Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    return read


def find_lower_layers(model: TrainableModel, trained: Iterable[str]) -> LowerLayers | None:
    """Return the layers below all that is trained; None where there are none, or where they cannot be left out.

    Args:
        model: In any state.
        trained: The names of the trained parameters.
    """
    place = _list_of_layers(model)
    first = None if place is None else _first_trained(model, place[0], list(trained))
    if place is None or not first:
        return None
    known = _found.setdefault(model, {})
    if first not in known:
        known[first] = _make(model, *place, first)
    return known[first]


def _list_of_layers(model: TrainableModel) -> tuple[str, nn.ModuleList] | None:
    """The one list of layers of the encoder, with its name; lists inside of layers do not count."""
    if len(model.prefix) != 1:
        return None
    lists = [(name, part) for name, part in model.module.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    outer = [(name, part) for name, part in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    inside = [(name, part) for name, part in outer if name.startswith(model.prefix)]
    return inside[0] if len(inside) == 1 and len({type(layer) for layer in inside[0][1]}) == 1 else None


def _first_trained(model: TrainableModel, name: str, trained: list[str]) -> int | None:
    """The number of the first layer with a trained parameter; None where something else of the encoder is trained, too."""
    encoder = [each for each in trained if each.startswith(model.prefix)]
    if not encoder or not all(each.startswith(f"{name}.") for each in encoder):
        return None
    return min(int(each.removeprefix(f"{name}.").partition(".")[0]) for each in encoder)


def _make(model: TrainableModel, name: str, layers: nn.ModuleList, first: int) -> LowerLayers | None:
    """None where made-up records show that a pass which begins in the middle is another one."""
    loaded = model.loaded
    samples = loaded.task.samples(loaded.reader)
    if not all("input_ids" in example for example in samples):
        return None
    batch = loaded.task.collator(model.module, loaded.reader, model.device)(samples)
    for tuples in (False, True):
        lower = LowerLayers(model.module, name, layers, first, tuples)
        try:
            if _is_exact(model, lower, batch):
                return lower
        except _FAILURES:  # an architecture whose layers hand on more than hidden states
            continue
    return None


@torch.no_grad()
def _is_exact(model: TrainableModel, lower: LowerLayers, batch: Batch) -> bool:
    scores = model.loaded.task.scores
    with AlignedRows():
        expected = scores(model.module, batch)
        with lower.skipped({**batch, STATES: lower.read(batch)}) as rest:
            return torch.equal(scores(model.module, rest), expected)
