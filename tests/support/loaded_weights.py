"""Base models that were read before, for all tests of a process: they load the same tiny ones more than a thousand times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cotune.models.base.lookup import BaseModelFolder

Read = tuple[Any, Mapping[str, Sequence[Any]]]
_MOST_PARAMETERS = 1_000_000  # of a model that is kept


class WeightsByContent:
    """Takes the place of `read_weights`: a model whose files, class and configuration are those of an earlier one is a copy of it.

    Weights that the files lack are drawn from torch's seed, which therefore must be the same, too.

    Args:
        read: What reads a model.
    """

    def __init__(self, read: Callable[[Any, BaseModelFolder, Any], Read]) -> None:
        self._read = read
        self._kept: dict[tuple[object, ...], Read] = {}

    def __call__(self, kind: Any, folder: BaseModelFolder, config: Any) -> Read:
        """Return a model of its own for everybody who asks, and transformers' report."""
        key = (kind, folder.content_hash, folder.has_weights, config.to_json_string(use_diff=False), torch.initial_seed())
        if key not in self._kept:
            module, report = self._read(kind, folder, config)
            if sum(parameter.numel() for parameter in module.parameters()) > _MOST_PARAMETERS:
                return module, report
            self._kept[key] = (module, report)
        module, report = self._kept[key]
        return copy.deepcopy(module), report
