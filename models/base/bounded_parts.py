"""Stop transformers from building a model that is larger than any, or than the files that it is read from.

Weights are compared with a configuration when they are read: by then a `config.json` of a stranger has made what it says, and
what the files lack is drawn.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from cotune.errors import ModelError

_MOST_PARTS = 500_000  # modules and parameters; a model of 61 layers with 256 experts each, all apart, has 150,000
_ENTRIES_OF_BYTE = 8  # that a file may stand for, such as a quantized one
_MOST_NEW_ENTRIES = 20_000_000  # that no file need hold, such as a head for many classes: 80 MB


def count_entries(folder: Path) -> int:
    """Return how many entries a model's parameters may have, by the size of its files."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return _ENTRIES_OF_BYTE * sum(file.stat().st_size for file in files) + _MOST_NEW_ENTRIES


class _Built:
    """What a thread has built so far."""

    def __init__(self, most_entries: int | None) -> None:
        self._thread = threading.get_ident()
        self._most_entries = most_entries
        self._parts = 0
        self._entries = 0

    def add(self, _: object, __: str, part: object) -> None:
        """Count a module, or a parameter: its entries, too, while it has a shape and no memory yet."""
        if threading.get_ident() != self._thread:
            return
        self._parts += 1
        if isinstance(part, Tensor) and part.is_meta:
            self._entries += part.numel()
        if self._parts > _MOST_PARTS:
            raise _too_large(f"more than {_MOST_PARTS:,} layers and parameters")
        if self._most_entries is not None and self._entries > self._most_entries:
            raise _too_large(f"more than {self._entries:,} weights")


def _too_large(what: str) -> ModelError:
    return ModelError(
        f"the base model's config.json describes {what}, which its files are too small for: expected those of the weights beside"
        " it; download the folder again, or use another base model",
        code="model.damaged_config",
    )


@contextmanager
def bounded_parts(most_entries: int | None) -> Iterator[None]:
    """Stop this thread from building a model in the block that has more parts than any, or more entries than given.

    Args:
        most_entries: Of all parameters while they have no memory, see `count_entries`; None: any, as none will have memory.

    Raises:
        ModelError: When there are too many.
    """
    built = _Built(most_entries)
    hooks = [register_module_module_registration_hook(built.add), register_module_parameter_registration_hook(built.add)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
