"""The type of a check, a named function that yields what is wrong with a component in words, and checks of tensors they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from cotune.errors import CotuneError
from cotune.strategies.conformance.samples import Case
from cotune.strategies.registry import ComponentInfo

Problems = Iterator[str]
_TOLERANCE = 1e-9  # relative: sums in another order, in float64
_SINGLE = 1e-6  # relative: rounding in float32


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        name: Of the check.
        passed: Whether nothing is wrong.
        detail: What is wrong, in words; empty if passed.
    """

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Check:
    """A named check.

    Attributes:
        name: What a component that passes does.
        find: Yields the problems of a case, in words.
        applies: Whether the check applies to what a component declares.
    """

    name: str
    find: Callable[[Case], Problems]
    applies: Callable[[ComponentInfo], bool] = lambda info: True


def run(check: Check, case: Case) -> Finding:
    """Run a check and report its first problem; an exception counts as a problem."""
    try:
        problem = next(check.find(case.fresh()), None)
    except CotuneError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return Finding(check.name, problem is None, problem or "")


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, exact: bool = False) -> str | None:
    """Return where two sets of tensors differ, in words.

    Args:
        found: Name -> tensor.
        expected: Name -> tensor; shapes and types must agree, too.
        exact: Compare bit for bit, rather than to 1e-9 of the largest entry.

    Returns:
        The first difference; None if there is none.
    """
    if found.keys() != expected.keys():
        return f"{sorted(found)} instead of {sorted(expected)}"
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape or tensor.dtype != found[name].dtype:
            return f"{name} is {_form(found[name])} instead of {_form(tensor)}"
        if exact and not torch.equal(found[name], tensor):
            return f"{name} is not the same bit for bit"
        error = (found[name].double() - tensor.double()).abs()
        scale = max(1e-3, float(tensor.double().abs().max()))
        if not bool((error <= _TOLERANCE * scale).all()):
            rounded = bool((error <= _SINGLE * scale).all())
            why = " (as much as float32 rounds: is a tensor made without dtype=torch.float64?)" if rounded else ""
            return f"{name} is off by {float(error.max()):.2g}{why}"
    return None


def wrong_shapes(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Problems:
    """Yield entries that are no float tensors, are not finite, or differ in shape from the parameter of the same name."""
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            yield f"{name} is a {type(tensor).__name__}, expected a tensor"
        elif not tensor.is_floating_point():
            yield f"{name} is {tensor.dtype}, expected floats"
        elif name in state and tensor.shape != state[name].shape:
            yield f"{name} is {_form(tensor)}, expected {tuple(state[name].shape)} as in the model"
        elif not bool(tensor.isfinite().all()):
            yield f"{name} is not finite"


def wrong_names(found: Mapping[str, Tensor], least: set[str], most: set[str]) -> Problems:
    """Yield problems with the names of tensors.

    Args:
        found: Name -> tensor.
        least: Names that must be present.
        most: Names that may be present.
    """
    if least - set(found):
        yield f"{min(least - set(found))} is missing"
    if set(found) - most:
        yield f"{min(set(found) - most)} is a parameter that nobody sent"


def checkpointed(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the memory after a round trip through safetensors, which raises for anything but tensors."""
    found: dict[str, Tensor] = load(save({name: tensor.contiguous() for name, tensor in memory.items()}))
    return found


def refusal(call: Callable[[], object]) -> bool:
    """Return whether the call raises one of cotune's own errors."""
    try:
        call()
    except CotuneError:
        return True
    return False


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
