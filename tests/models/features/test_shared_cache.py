"""A cache folder that several users share: what another user may have written, or what is no features, is computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cotune.models.features.cached import get_features
from cotune.models.trainable import TrainableModel

TEXTS = ("a great day", "an awful table")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def replace(folder: Path, features: Tensor) -> Path:
    [file] = folder.glob("*.safetensors")
    save_file({"features": features}, file)
    file.chmod(0o600)
    return file


def test_features_that_others_may_have_written_are_not_read(shared: Callable[..., TrainableModel], folder: Path) -> None:
    model = shared("bert")
    expected = get_features(model, TEXTS, {}, "float32")
    replace(folder, torch.zeros_like(expected)).chmod(0o666)
    assert torch.equal(get_features(model, TEXTS, {}, "float32"), expected)


def test_the_folder_of_features_is_its_owners_alone(shared: Callable[..., TrainableModel], folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    get_features(shared("bert"), TEXTS, {}, "float32")
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "damaged", [torch.zeros(2), torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, 1), torch.tensor(1.0)]
)
def test_tensors_that_are_no_features_are_as_good_as_none(
    shared: Callable[..., TrainableModel], folder: Path, damaged: Any
) -> None:
    model = shared("bert")
    expected = get_features(model, TEXTS, {}, "float32")
    replace(folder, damaged)
    assert torch.equal(get_features(model, TEXTS, {}, "float32"), expected)
