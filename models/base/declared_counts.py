"""Bound what a configuration file can make transformers build: its numbers of layers are anyone's, and weights are read later.

A `config.json` of a hundred bytes that says 10⁹ layers, or 10⁹ labels, would take all memory of the machine that loads it, before
anything compares it with the weights.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from cotune.errors import ModelError

_COUNTS = re.compile(r"(layers?|labels|blocks|experts|depths?|groups|group_num)$")
_MOST_DECLARED = 100_000  # more than any model of transformers has of anything
_MOST_PARTS = 500_000  # modules and parameters; a model of 61 layers with 256 experts each, all apart, has 150,000


def check_declared_counts(settings: Any) -> None:
    """Check the numbers of layers, labels and the like, before transformers makes a list of as many.

    Args:
        settings: Of `config.json`, with those of its parts.

    Raises:
        ModelError: If one is larger than any model has.
    """
    for key, value in settings.items() if isinstance(settings, dict) else ():
        numbers = value if isinstance(value, list) else [value]
        if _COUNTS.search(key) and any(isinstance(number, int) and number > _MOST_DECLARED for number in numbers):
            raise ModelError(
                f"the base model's config.json says {key[:60]} = {str(value)[:40]}: expected at most {_MOST_DECLARED:,}; download"
                " the folder again, or use another base model",
                code="model.damaged_config",
            )
        for part in numbers:
            check_declared_counts(part)


@contextmanager
def bounded_parts() -> Iterator[None]:
    """Stop this thread from building a model in the block that has more modules and parameters than any.

    Raises:
        ModelError: When there are too many.
    """
    builds = threading.get_ident()
    count = 0

    def register(*_: Any) -> None:
        nonlocal count
        count += threading.get_ident() == builds
        if count > _MOST_PARTS:
            raise ModelError(
                f"the base model's config.json describes more than {_MOST_PARTS:,} layers and parameters: expected those of the"
                " weights beside it; download the folder again, or use another base model",
                code="model.damaged_config",
            )

    hooks = [register_module_module_registration_hook(register), register_module_parameter_registration_hook(register)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
