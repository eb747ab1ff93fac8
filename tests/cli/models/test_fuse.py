"""Fused models as folders: what they predict, what the command shows, and what a tampered folder may not do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cotune.ensembles.predictor import FusedPredictor, open_model
from cotune.errors import ModelError
from cotune.models.base.folder import FUSION_FILE, member_folder
from cotune.models.config import Method
from cotune.models.evaluation.predictor import open_predictor
from tests.support.console import Cotune
from tests.support.datasets import sentences, write_csv, write_tagged
from tests.support.exported_models import export_random
from tests.support.language_models import language_model, write_dialogs

__all__ = ["language_model"]  # fixture

METHODS = get_args(Method)
LABELS = ("bad", "good", "so")
OTHER_ORDER = ("so", "bad", "good")


@pytest.fixture(scope="module")
def models(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of unlike architectures, whose heads have the classes in different orders; tests only read them."""
    folder = tmp_path_factory.mktemp("models")
    return [
        export_random(base_model("bert"), folder / "first", LABELS, seed=1),
        export_random(base_model("gpt2"), folder / "second", OTHER_ORDER, seed=2),
    ]


@pytest.fixture(scope="module")
def written() -> dict[Method, Path]:
    """What the command has written for earlier tests."""
    return {}


@pytest.fixture
def fused(
    cotune: Cotune,
    models: list[Path],
    folder: Path,
    written: dict[Method, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Method], Path]:
    """A method -> a folder of models fused by it, which the test may change."""
    write_csv(folder / "held.csv", sentences(60, seed=3))

    def make(method: Method) -> Path:
        if method not in written:
            whole = tmp_path_factory.mktemp("fused") / method
            shown = cotune("fuse", *models, "--data", "held.csv", "--method", method, "--out", whole)
            assert (shown.code, shown.err) == (0, "")
            written[method] = whole
        return Path(shutil.copytree(written[method], folder / f"fused-{method}"))

    return make


@pytest.mark.parametrize("method", METHODS)
def test_fused_model_predicts_by_its_rule(fused: Callable[[Method], Path], models: list[Path], method: Method) -> None:
    texts = ["great happy day", "awful", "the table is here"]
    opened = open_model(str(fused(method)), "cpu")
    assert isinstance(opened, FusedPredictor)
    first, second = (open_predictor(str(model), "cpu") for model in models)
    said = [np.stack([row.numpy()[0] for row in first.probabilities(texts)])]
    swapped = np.stack([row.numpy()[0] for row in second.probabilities(texts)])
    said.append(swapped[:, [OTHER_ORDER.index(label) for label in LABELS]])
    found = np.stack([row.numpy()[0] for row in opened.probabilities(texts)])
    assert opened.labels == LABELS
    assert found == pytest.approx(opened.fusion.fuse(said))
    assert found.sum(axis=1) == pytest.approx(np.ones(3))


def test_predict_and_evaluate_use_a_fused_model(cotune: Cotune, fused: Callable[[Method], Path]) -> None:
    folder = fused("weighted")
    [predicted] = json.loads(cotune("predict", folder, "great happy", "--json").out)
    assert sum(predicted["scores"].values()) == pytest.approx(1)
    found = json.loads(cotune("evaluate", folder, "--data", "held.csv", "--json").out)
    assert found["records"] == 60


def test_the_command_measures_without_writing(cotune: Cotune, models: list[Path], folder: Path) -> None:
    write_csv(folder / "held.csv", sentences(60, seed=3))
    before = {path.name for path in folder.iterdir()}
    found = json.loads(cotune("fuse", *models, "--data", "held.csv", "--method", "average", "--json").out)
    assert [each["model"] for each in found["models"]] == list(map(str, models))
    alone = json.loads(cotune("evaluate", models[1], "--data", "held.csv", "--json").out)
    assert found["models"][1]["accuracy"] == alone["accuracy"]
    best = max(each["accuracy"] for each in found["models"])
    assert found["against_best"]["difference"] == pytest.approx(found["fused"]["accuracy"] - best)
    assert {path.name for path in folder.iterdir()} == before


def test_tags_are_fused_word_by_word(cotune: Cotune, base_model: Callable[[str], Path], folder: Path) -> None:
    write_tagged(folder / "tagged.jsonl", 30)
    known = sorted({tag for line in (folder / "tagged.jsonl").read_text().splitlines() for tag in json.loads(line)["label"]})
    members = [
        export_random(base_model("bert"), folder / f"known-{seed}", tuple(known), seed=seed, task="token-classification")
        for seed in (1, 2)
    ]
    shown = cotune("fuse", *members, "--data", "tagged.jsonl", "--method", "average", "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["answers"] > 30


def test_models_with_other_classes_are_refused(
    cotune: Cotune, models: list[Path], base_model: Callable[[str], Path], folder: Path
) -> None:
    write_csv(folder / "held.csv", sentences(60, seed=3))
    third = export_random(base_model("bert"), folder / "third", ("bad", "good", "other"), seed=4)
    shown = cotune("fuse", *models, third, "--data", "held.csv")
    assert shown.code == 2
    assert "Traceback" not in shown.err


def test_a_member_that_was_changed_is_refused(fused: Callable[[Method], Path]) -> None:
    folder = fused("average")
    weights = next(member_folder(folder, 2).glob("*.safetensors"))
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        open_model(str(folder), "cpu")
    assert caught.value.code == "model.member_changed"


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [0.5, 0.6]},
        {"weights": [1.5, -0.5]},
        {"weights": [1.0]},
        {"temperatures": [0.0, 1.0]},
        {"temperatures": [float("nan"), 1.0]},
        {"temperatures": [1e-40, 1.0]},
        {"temperatures": [1.0, 1e9]},
        {"members": ["../../etc", "x"]},
        {"members": []},
        {"labels": ["good", "good", "so"]},
        {"labels": ["good"]},
        {"method": "pickle"},
        {"task": "no-task"},
        {"surplus": 1},
        {"format": 2},
    ],
    ids=lambda change: "-".join(f"{key}-{value}" for key, value in change.items())[:40],
)
def test_a_fusion_file_that_says_anything_else_is_refused(fused: Callable[[Method], Path], change: dict[str, object]) -> None:
    folder = fused("average")
    document = json.loads((folder / FUSION_FILE).read_text())
    (folder / FUSION_FILE).write_text(json.dumps(document | change))
    with pytest.raises(ModelError) as caught:
        open_model(str(folder), "cpu")
    assert caught.value.code in ("model.fusion_damaged", "model.member_changed")


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_damaged_meta_model_is_refused(fused: Callable[[Method], Path], content: bytes | None) -> None:
    folder = fused("stacking")
    file = folder / "meta_model.safetensors"
    if content is None:
        tensors = load_file(file)
        tensors["coefficients"][0, 0] = np.inf
        save_file(tensors, file)
    else:
        file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_model(str(folder), "cpu")
    assert caught.value.code == "model.fusion_damaged"


@pytest.mark.parametrize("method", ["vote", "average"])
def test_models_are_bundled_without_records(cotune: Cotune, models: list[Path], folder: Path, method: str) -> None:
    shown = cotune("fuse", *models, "--method", method, "--out", "bundle", "--json")
    assert (shown.code, shown.err) == (0, "")
    assert json.loads(shown.out) == {"method": method, "out": "bundle"}
    document = json.loads((folder / "bundle" / FUSION_FILE).read_text())
    assert (document["temperatures"], document["weights"]) == ([1.0, 1.0], [0.5, 0.5])


@pytest.mark.parametrize(
    "given", [["--method", "weighted", "--out", "x"], ["--method", "stacking", "--out", "x"], ["--method", "vote"]]
)
def test_what_is_fitted_or_measured_needs_records(cotune: Cotune, models: list[Path], folder: Path, given: list[str]) -> None:
    shown = cotune("fuse", *models, *given)
    assert shown.code == 2
    assert "--data" in shown.err
    assert not (folder / "x").exists()


def test_a_stacked_model_is_no_member(cotune: Cotune, fused: Callable[[Method], Path], models: list[Path]) -> None:
    shown = cotune("fuse", fused("stacking"), models[0], "--method", "average", "--out", "nested")
    assert shown.code == 2
    assert "Traceback" not in shown.err


def test_language_models_are_measured_together(cotune: Cotune, language_model: Callable[..., Path], folder: Path) -> None:
    write_dialogs(folder / "held.jsonl", 30)
    call = (
        "fuse",
        language_model("llama"),
        language_model("gpt2"),
        "--data",
        "held.jsonl",
        "--prompt",
        "prompt",
        "--target",
        "target",
    )
    found = json.loads(cotune(*call, "--json").out)
    assert len(found["models"]) == 2
    assert sum(found["fused"]["weights"]) == pytest.approx(1)
    shown = cotune(*call, "--method", "average")
    assert (shown.code, shown.err) == (0, "")
    assert "fused: average" in shown.out
    assert "0.500" in shown.out


@pytest.mark.parametrize(
    "options",
    [
        ("--data", "held.jsonl", "--text", "target", "--method", "vote"),
        ("--data", "held.jsonl", "--text", "target", "--method", "stacking"),
        ("--method", "weighted", "--out", "together"),
        ("--method", "vote", "--out", "together"),
        ("--data", "held.jsonl", "--prompt", "prompt"),
    ],
)
def test_what_language_models_cannot_do_together_is_one_sentence(
    cotune: Cotune, language_model: Callable[..., Path], folder: Path, options: tuple[str, ...]
) -> None:
    write_dialogs(folder / "held.jsonl", 30)
    shown = cotune("fuse", language_model("llama"), language_model("gpt2"), *options)
    assert shown.code == 2
    assert "Traceback" not in shown.err
    assert not Path("together").exists()
