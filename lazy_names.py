"""Names of a package that are imported when they are first used (PEP 562), as PyTorch takes seconds to load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def import_lazily(namespace: dict[str, Any], modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Build the `__getattr__` of a package.

    Args:
        namespace: `globals()` of the package, which keeps what was imported.
        modules: Public name -> module that defines it, relative to the package.
    """
    package = namespace["__name__"]

    def get_attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        namespace[name] = value
        return value

    return get_attribute
