"""`cotune onnx`, as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.console import Cotune
from tests.support.exported_models import export_random, export_random_layers

LABELS = ("bad", "good", "so")


@pytest.mark.skipif(find_spec("onnx") is None, reason="onnx is an extra")
def test_head_is_written_once(cotune: Cotune, base_model: Callable[[str], Path], folder: Path) -> None:
    export_random_layers(base_model("bert"), folder / "run" / "model", LABELS, seed=1, whiten="none")
    shown = cotune("onnx", "run")
    assert (shown.code, shown.err) == (0, "")
    assert (folder / "run" / "model" / "head.onnx").is_file()
    assert cotune("onnx", "run", "--out", "other.onnx").code == 0
    assert (folder / "other.onnx").read_bytes() == (folder / "run" / "model" / "head.onnx").read_bytes()
    again = cotune("onnx", "run")
    assert again.code == 2
    assert "is there already" in again.err
    [predicted] = json.loads(cotune("predict", "run", "great", "--json").out)
    assert set(predicted["scores"]) == set(LABELS)


@pytest.mark.parametrize("model", ["plain", "nowhere/at/all"])
def test_mistakes_are_one_sentence(cotune: Cotune, base_model: Callable[[str], Path], folder: Path, model: str) -> None:
    export_random(base_model("bert"), folder / "plain", LABELS, seed=1)
    shown = cotune("onnx", model)
    assert shown.code == 2
    assert "Traceback" not in shown.err
    assert list(folder.rglob("*.onnx")) == []
