from __future__ import annotations

import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.client.node.bundle import reason_to_refuse


def archive(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, "")
    return content.getvalue()


def test_configuration_is_fit() -> None:
    assert reason_to_refuse(archive("pyproject.toml", "README.md", "LICENSE", ".info/CONTENT", "docs/notes.txt")) is None


@pytest.mark.parametrize(
    "name",
    [
        "app.py",
        "server/app.PY",
        "../site.py",
        "pyproject.toml.py",
        "module.so",
        "cotune/__init__.pyc",
        "a.pth",
        "toml",
        "x/LICENSE",
    ],
)
def test_anything_else_is_not(name: str) -> None:
    reason = reason_to_refuse(archive("pyproject.toml", name))
    assert reason is not None
    assert reason.startswith(f"the run's bundle holds '{name}': expected configuration only")


@given(st.binary(max_size=200))
def test_what_is_no_archive_is_refused_in_one_sentence(content: bytes) -> None:
    assert "not a zip archive" in str(reason_to_refuse(content))
