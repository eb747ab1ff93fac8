from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import PlanError
from cotune.protocol.federation_file import check_name
from tests.support.failures import fails_with


@pytest.mark.parametrize("name", ["a", "hospital-a", "3", "a--b", "a" * 63])
def test_names_as_of_hosts(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "-a",
        "a-",
        "a b",
        "a/b",
        "..",
        ".",
        "a.b",
        "../etc",
        "a\n",
        "é",
        "٣",
        "a" * 64,
        "con\x00",
        "a_b",
        "~",
        "a\\b",
        "‮a",
    ],
)
def test_what_is_no_name(name: str) -> None:
    with fails_with("plan.invalid_name", "1", "63", "small"):
        check_name(name)


@given(st.text(max_size=70))
def test_a_name_is_one_folder_below(name: str) -> None:
    """Whatever passes stays below the folder that it is put into, and is one level deep."""
    try:
        check_name(name)
    except PlanError:
        return
    folder = Path("/runs/x")
    assert (folder / name).resolve().parent == folder
    assert name.isascii()
    assert name.isprintable()
