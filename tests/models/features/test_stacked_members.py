"""Stacked members: what the head reads is what each member predicts by itself, and no record reaches another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotune.ensembles.folder import write_fused
from cotune.ensembles.fusion import PredictionFusion
from cotune.ensembles.predictor import open_model
from cotune.errors import ModelError
from cotune.models.base.folder import content_hash, member_folder
from cotune.models.base.fused_folder import read_fusion_document
from cotune.models.config import MemberConfig, ModelConfig
from cotune.models.evaluation.predictor import load_finished, open_predictor
from cotune.models.export import export_model
from cotune.models.features.cached import get_features
from cotune.models.features.head import get_readout
from cotune.models.features.member_reader import HOLE, MemberReader
from cotune.models.record_independence import check_independence
from cotune.models.trainable import TrainableModel
from cotune.models.trainable import open_model as open_trainable
from tests.support.datasets import sentences
from tests.support.exported_models import export_random
from tests.support.stacked import LABELS, ORDERS, TEMPERATURES, bundle
from tests.support.tiny_models import tokenizer

KINDS = ("bert", "gpt2", "qwen2")
TEXTS = (*(text for text, _ in sentences(20, seed=3)), "great", "the " * 60)
BaseModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def together(base_model: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(base_model, tmp_path_factory.mktemp("together"), KINDS)


def config_of(base: Path, count: int = len(KINDS), **changes: Any) -> ModelConfig:
    members = tuple(MemberConfig(name=f"org-{n}", epsilon=3.0, delta=1e-5) for n in range(count))
    return ModelConfig.model_validate({"base": str(base), "precision": "float32", "members": members, **changes})


def stacked(base: Path, labels: tuple[str, ...] = LABELS, count: int = len(KINDS), **changes: Any) -> TrainableModel:
    return open_trainable(config_of(base, count, **changes), labels, None, 7, "cpu")


def by_hand(together: Path, labels: tuple[str, ...]) -> np.ndarray[Any, Any]:
    """Each member asked by itself; the logarithms of its calibrated probabilities less their mean."""
    found = []
    for number, kind in enumerate(KINDS, 1):
        said = torch.cat(open_predictor(str(member_folder(together, number)), "cpu").probabilities(TEXTS)).numpy()
        said = said[:, [ORDERS[kind].index(label) for label in labels]] ** (1 / TEMPERATURES[kind])
        logs = np.log(np.maximum(said / said.sum(axis=1, keepdims=True), 1e-6))
        found.append(logs - logs.mean(axis=1, keepdims=True))
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("labels", [LABELS, ("so", "good", "bad")])
def test_head_reads_what_members_predict(together: Path, labels: tuple[str, ...]) -> None:
    model = stacked(together, labels)
    assert get_readout(model) == "pooled"
    assert get_features(model, TEXTS, {}, "float32").numpy() == pytest.approx(by_hand(together, labels), abs=1e-4)


def test_head_begins_with_the_geometric_mean(together: Path) -> None:
    model = stacked(together)
    parts = by_hand(together, LABELS).reshape(len(TEXTS), len(KINDS), -1)
    said = torch.cat(open_predictor(str(member_folder(together, 1)), "cpu").probabilities(TEXTS))
    assert said.shape == (len(TEXTS), 3)
    head = model.state(model.names("head"))
    scores = get_features(model, TEXTS, {}, "float32") @ head["classifier.weight"].T + head["classifier.bias"]
    assert scores.numpy() == pytest.approx(parts.mean(axis=1), abs=1e-4)


def test_no_record_reaches_another(together: Path) -> None:
    """In the shapes of training; of padding, as loud as it gets in each member's own table."""
    model = stacked(together)
    model.train_only(model.names("head"))
    assert check_independence(model, "head", "float32") is torch.float32


def test_only_the_meta_model_is_trained(together: Path) -> None:
    model = stacked(together)
    assert model.names("head") == ["classifier.weight", "classifier.bias"]
    assert model.state(model.names("head"))["classifier.weight"].shape == (3, 3 * len(KINDS))


def test_export_is_a_fused_model_with_the_same_answers(together: Path, tmp_path: Path) -> None:
    model = stacked(together)
    generator = torch.Generator().manual_seed(4)
    head = {name: torch.randn(t.shape, generator=generator) for name, t in model.state(model.names("head")).items()}
    model.load(head)
    export_model(model, tmp_path / "model", {"README.md": "# card\n"})
    features = get_features(model, TEXTS, {}, "float32")
    expected = (features @ head["classifier.weight"].T + head["classifier.bias"]).softmax(dim=1).numpy()
    fused = open_model(str(tmp_path / "model"), "cpu")
    assert torch.cat(fused.probabilities(TEXTS)).numpy() == pytest.approx(expected, abs=1e-4)
    opened = open_predictor(str(tmp_path / "model"), "cpu")
    assert torch.cat(opened.probabilities(TEXTS)).numpy() == pytest.approx(expected, abs=1e-4)
    assert open_model(str(tmp_path), "cpu").content_hash == fused.content_hash  # the folder of a run
    assert read_fusion_document(tmp_path / "model").members == read_fusion_document(together).members


def test_hash_covers_every_member(together: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(together, tmp_path / "copy"))
    assert content_hash(copy) == content_hash(together)
    file = member_folder(copy, 2) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": "changed"}))
    assert content_hash(copy) != content_hash(together)
    with pytest.raises(ModelError) as caught:
        stacked(copy)
    assert caught.value.code == "model.member_changed"


@pytest.mark.parametrize("count", [0, 2, 4])
def test_members_without_a_statement_are_refused(together: Path, count: int) -> None:
    with pytest.raises(ModelError) as caught:
        stacked(together, count=count)
    assert caught.value.code == "model.unstated_members"


def test_members_of_a_single_model_are_refused(base_model: BaseModel) -> None:
    with pytest.raises(ModelError) as caught:
        stacked(base_model("bert"))
    assert caught.value.code == "model.no_members"


def test_plan_with_other_classes_is_refused(together: Path) -> None:
    with pytest.raises(ModelError) as caught:
        stacked(together, ("bad", "good", "other"))
    assert caught.value.code == "model.stacked_classes"


def test_other_task_is_refused(together: Path) -> None:
    with pytest.raises(ModelError) as caught:
        open_trainable(config_of(together), LABELS, None, 7, "cpu", "token-classification")
    assert caught.value.code == "model.stacked_task"


def test_fused_model_is_no_member(together: Path, base_model: BaseModel, tmp_path: Path) -> None:
    export_model(stacked(together), tmp_path / "stacked")
    other = export_random(base_model("bert"), tmp_path / "other", LABELS, seed=9)
    rule = PredictionFusion("average", (1.0, 1.0), (0.5, 0.5))
    with pytest.raises(ModelError) as caught:
        write_fused(tmp_path / "nested", rule, [tmp_path / "stacked", other], "sequence-classification", LABELS)
    assert caught.value.code == "model.nested_fusion"


def test_rule_that_no_run_has_stacked_is_refused(together: Path) -> None:
    assert read_fusion_document(together).method == "average"
    with pytest.raises(ModelError) as caught:
        load_finished(str(together))
    assert caught.value.code == "model.no_stacked_model"


@given(st.lists(st.sampled_from(["great", "the", "awful day", "x", ""]), min_size=1, max_size=4), st.integers(1, 40))
def test_rows_hold_the_tokens_of_each_member(texts: list[str], length: int) -> None:
    readers = [tokenizer("bert"), tokenizer("qwen2")]
    reader = MemberReader(readers, (16, 8))
    rows = reader(texts, max_length=min(length, reader.longest))["input_ids"]
    for text, row in zip(texts, rows, strict=True):
        for k, (one, limit) in enumerate(zip(readers, (16, 8), strict=True)):
            said = [number - 1 for number in row[k::2] if number != HOLE]
            most = min(limit, max(4, -(-min(length, 32) // 2)))
            assert said == (one([text], truncation=True, max_length=most)["input_ids"][0] or [one.pad_token_id])
