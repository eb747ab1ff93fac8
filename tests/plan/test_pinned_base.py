"""The hashes of a base model are written into a plan, and nothing else of it changes."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.models.features.public_map import pin_model
from cotune.plan.load import load_plan
from cotune.plan.pinned_base import pin_base
from tests.support.failures import fails_with

OTHERS = '# ours\nrounds = 3  # few\nprivacy = "none"\n{}\n[data]\nsource = "x.csv"\n'
TABLES = (
    '[model]\nmax_length = 16  # tokens\nbase = "{}"',
    'model = {{ base = "{}", max_length = 16 }}',
    'model.base = "{}"\nmodel.max_length = 16',
)


@pytest.mark.parametrize("table", TABLES, ids=["table", "inline", "dotted"])
def test_plan_gets_the_hashes_however_it_is_written(base_model: Callable[[str], Path], tmp_path: Path, table: str) -> None:
    base = base_model("bert")
    file = tmp_path / "plan.toml"
    file.write_text(OTHERS.format(table.format(base)), encoding="utf-8")
    pinned = pin_base(str(file))
    assert "# ours\nrounds = 3  # few" in pinned
    before = tomllib.loads(file.read_text(encoding="utf-8"))
    pins = find_base(ModelConfig(base=str(base))).pins
    assert tomllib.loads(pinned) == {**before, "model": {**before["model"], **pins}}
    file.write_text(pinned, encoding="utf-8")
    assert pin_base(str(file)) == pinned
    assert load_plan(file).model.config_hash == pins["config_hash"]


def test_hash_of_the_map_of_a_feature_is_among_them(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    table = f'[model]\nbase = "{base_model("bert")}"\n[model.feature]\nlayers = [0, 2]\n'
    file.write_text(OTHERS.format("") + table, encoding="utf-8")
    config = ModelConfig.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))["model"])
    file.write_text(pin_base(str(file)), encoding="utf-8")
    assert load_plan(file).model == pin_model(config, find_base(config))


def test_model_elsewhere_keeps_the_name_that_the_plan_has(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Hashes of another model are replaced: that is what was asked for."""
    file = tmp_path / "plan.toml"
    file.write_text(OTHERS.format(f'[model]\nbase = "some/model"\nbase_hash = "{"0" * 64}"'), encoding="utf-8")
    copied = shutil.copytree(base_model("bert"), tmp_path / "copy")
    model = tomllib.loads(pin_base(str(file), copied))["model"]
    assert model == {"base": "some/model", **find_base(ModelConfig(base=str(copied))).pins}


def test_what_cannot_be_pinned_is_refused(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(OTHERS.format('[model]\nbase = "some/model"'), encoding="utf-8")
    lacking = shutil.copytree(base_model("bert"), tmp_path / "lacking", ignore=shutil.ignore_patterns("*.safetensors"))
    with fails_with("model.missing_weights"):
        pin_base(str(file), lacking)
    with fails_with("plan.missing_file"):
        pin_base(str(tmp_path / "gone.toml"))
    file.write_text("= 3", encoding="utf-8")
    with fails_with("plan.malformed_toml"):
        pin_base(str(file))
