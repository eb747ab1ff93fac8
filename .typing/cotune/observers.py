"""Functions that are called while something happens in this process: registered for a block, and for no longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

if __name__ != "cotune.observers":
    raise ImportError(f"{__name__} is a part of the package cotune: expected `import cotune.observers`")

Observer = Callable[[str, dict[str, Any]], None]  # (event, its fields)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Registry(Generic[_Function]):
    """The functions that are registered at present, the oldest first.

    Example:
        >>> seen = []
        >>> observers = Registry()
        >>> with observers.register(lambda event, fields: seen.append(event)):
        ...     observers.notify("round_finished", {"round": 1})
        >>> observers.notify("round_finished", {"round": 2})
        >>> seen
        ['round_finished']
    """

    def __init__(self) -> None:
        self._functions: list[_Function] = []

    @contextmanager
    def register(self, function: _Function) -> Iterator[None]:
        """Register a function during the block."""
        self._functions.append(function)
        try:
            yield
        finally:
            self._functions.remove(function)

    def notify(self, *arguments: Any) -> None:
        """Call every function that is registered now; one may register another meanwhile."""
        for function in tuple(self._functions):
            function(*arguments)

    @property
    def newest(self) -> _Function | None:
        """The function that was registered last, of those that still are; None where there is none."""
        return self._functions[-1] if self._functions else None
