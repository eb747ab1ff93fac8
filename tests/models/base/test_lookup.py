"""Which folder is taken for a plan's base model, with its weights and without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.models.base.folder import config_hash
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from tests.support.failures import fails_with
from tests.support.tiny_models import copy_without_weights

Pinned = Callable[..., ModelConfig]


@pytest.fixture
def folder(base_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(base_model("bert"), tmp_path / "base")


@pytest.fixture
def small(folder: Path, tmp_path: Path) -> Path:
    return copy_without_weights(folder, tmp_path / "small")


@pytest.fixture
def pinned(folder: Path) -> Pinned:
    """(folder) -> what a plan says of the model, which is looked for in that folder."""
    pins = find_base(ModelConfig(base=str(folder))).pins
    return lambda place, **changes: ModelConfig.model_validate({"base": str(place), **pins, **changes})


def test_folder_without_weights_has_the_plans_hash(folder: Path, small: Path, pinned: Pinned) -> None:
    found = find_base(pinned(small), needs_weights=False)
    whole = find_base(pinned(folder), needs_weights=False)
    assert (found.has_weights, whole.has_weights) == (False, True)
    assert found.pins == whole.pins == find_base(pinned(folder)).pins


def test_weights_are_needed_unless_somebody_says_otherwise(small: Path, pinned: Pinned) -> None:
    with fails_with("model.missing_weights"):
        find_base(pinned(small))


@pytest.mark.parametrize("missing", ["base_hash", "config_hash"])
def test_without_weights_the_plan_says_which_model_it_is(small: Path, pinned: Pinned, missing: str) -> None:
    with fails_with("model.unpinned_base"):
        find_base(pinned(small, **{missing: None}), needs_weights=False)


def damage_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "hidden_size": 32}), encoding="utf-8")


def damage_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def add_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


@pytest.mark.parametrize("change", [damage_config, damage_tokenizer, remove_tokenizer, add_template])
def test_other_files_beside_the_right_hash_are_refused(small: Path, pinned: Pinned, change: Callable[[Path], None]) -> None:
    change(small)
    with fails_with("model.other_config"):
        find_base(pinned(small), needs_weights=False)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def break_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "gone")


def replace_by_one_of_many(file: Path) -> None:
    file.rename(file.parent / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("damage", [truncate, empty, break_link, replace_by_one_of_many])
@pytest.mark.parametrize("needs_weights", [True, False])
def test_weights_that_are_not_whole_are_not_taken_for_absent(
    folder: Path, pinned: Pinned, damage: Callable[[Path], None], needs_weights: bool
) -> None:
    config = pinned(folder)
    damage(folder / "model.safetensors")
    with fails_with("model.other_hash"):
        find_base(config, needs_weights=needs_weights)


def test_pickled_weights_and_pointers_are_not_taken_for_absent(folder: Path, small: Path, pinned: Pinned) -> None:
    (small / "pytorch_model.bin").write_bytes(b"")
    with fails_with("model.pickled_weights"):
        find_base(pinned(small), needs_weights=False)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with fails_with("model.lfs_pointer"):
        find_base(pinned(folder), needs_weights=False)


def test_hashes_of_two_models_are_refused_by_who_has_one(folder: Path, pinned: Pinned) -> None:
    """A coordinator could not pass off another configuration with the right weights' hash, nor by mistake."""
    for needs_weights in (True, False):
        with fails_with("model.other_config"):
            find_base(pinned(folder, config_hash="0" * 64), needs_weights=needs_weights)


def test_hash_of_the_other_files_is_the_same_however_weights_are_cut(folder: Path) -> None:
    before = config_hash(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}), encoding="utf-8")
    assert config_hash(folder) == before
