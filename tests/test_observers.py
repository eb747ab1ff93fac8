"""Functions that are registered for a block."""

from __future__ import annotations

import pytest

from cotune.observers import Registry


def test_blocks_may_be_nested_and_fail() -> None:
    registry = Registry[object]()  # type: ignore[type-var]
    assert registry.newest is None
    outer, inner = (lambda: None), (lambda: None)
    with registry.register(outer):
        with pytest.raises(ValueError, match="x"), registry.register(inner):
            assert registry.newest is inner
            raise ValueError("x")
        assert registry.newest is outer
    assert registry.newest is None


def test_a_function_may_register_another() -> None:
    registry = Registry[object]()  # type: ignore[type-var]
    seen = list[int]()

    def register_another(value: int) -> None:
        with registry.register(seen.append):
            pass
        seen.append(value)

    with registry.register(register_another):
        registry.notify(1)
    assert seen == [1]
