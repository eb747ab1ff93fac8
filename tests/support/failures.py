"""Failures that a user meets, by their stable codes and the values that their sentences name: how they are worded may improve."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cotune.errors import CotuneError


@contextmanager
def fails_with(code: str, *values: str) -> Iterator[pytest.ExceptionInfo[CotuneError]]:
    """Expect a failure of this code, whose sentence names these values, each as a word of its own, in this order.

    >>> with fails_with("run.locked", "/runs/1") as caught:
    ...     open_run(folder)
    """
    with pytest.raises(CotuneError) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
    in_order = ".*".join(rf"(?<!\w){re.escape(value)}(?!\w)" for value in values)
    assert re.search(in_order, str(caught.value), re.DOTALL), f"expected {values} in: {caught.value}"
