"""Models as they are read from a folder, kept for all who read the same: tests load the same tiny models again and again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_Built = tuple[Any, tuple[str, ...]]


class BuiltOnce:
    """Takes the place of a function that builds a module from a folder; equal questions are answered with copies of one module.

    A question is equal if the files, the configuration and the state of the random numbers are: what is drawn belongs to it, and
    the random numbers go on from where they were.
    """

    def __init__(self, build: Callable[..., _Built]) -> None:
        self._build = build
        self._found: dict[tuple[object, ...], tuple[_Built, torch.Tensor]] = {}

    def __call__(self, path: Path, config: Any, mean_pooling: bool, task: Any, finished: bool) -> _Built:
        """Return the module and what stays frozen, as `models.base.load` builds them."""
        drawn_from = torch.get_rng_state().numpy().tobytes()
        question = (_files(path), config.to_json_string(), mean_pooling, type(task), finished, drawn_from)
        if question not in self._found:
            built = self._build(path, config, mean_pooling, task, finished)
            self._found[question] = (built, torch.get_rng_state())
        (module, frozen), random = self._found[question]
        torch.set_rng_state(random)
        return copy.deepcopy(module), frozen


def _files(path: Path) -> Sequence[tuple[str, int, int, int]]:
    """What changes when a file of a folder does."""
    return tuple(
        (file.name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for file in sorted(path.iterdir()) for stat in [file.stat()]
    )
