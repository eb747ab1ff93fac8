"""A finished head on layers in its folder: opened as it was written, refused where damaged, and never mistaken for another model."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from cotune.errors import ModelError
from cotune.models.base.folder import content_hash
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.evaluation.predictor import open_predictor
from cotune.models.export import export_model
from cotune.models.trainable import TrainableModel
from cotune.plan.load import parse_plan
from cotune.reporting.model_card import CARD, model_card
from tests.support.failures import fails_with

LABELS = ("bad", "good", "so")
TEXTS = ["great table", "tree great bad great table awful lamp", "lamp lamp", "awful tree"]


@pytest.fixture(scope="module", params=["public", "none"])
def exported(
    request: pytest.FixtureRequest, base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainableModel, Path]:
    table = {"base": str(base_model("bert")), "max_length": 20, "feature": {"layers": [1, 2], "whiten": request.param}}
    plan = parse_plan({"model": table, "data": {"source": "x.csv"}, "labels": LABELS})
    model = TrainableModel(load_model(plan.model, LABELS, 1), None, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    model.load({n: torch.randn(t.shape, generator=generator) for n, t in model.state(model.names("head")).items()})
    folder = tmp_path_factory.mktemp("run") / "model"
    export_model(model, folder, {CARD: model_card(plan, privacy=["none"], length=20)})
    return model, folder


def copy_of(folder: Path, to: Path) -> Path:
    for file in (file for file in folder.rglob("*") if file.is_file()):
        target = to / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return to


def test_what_is_opened_predicts_what_was_written(exported: tuple[TrainableModel, Path]) -> None:
    model, folder = exported
    predictor = open_predictor(str(folder.parent), "cpu")
    assert (predictor.labels, predictor.task, predictor.max_length) == (LABELS, "sequence-classification", 20)
    names = model.names("head")
    assert all(torch.equal(a, b) for a, b in zip(model.state(names).values(), predictor.model.state(names).values(), strict=True))
    collate = model.loaded.task.collator(model.module, model.loaded.reader, model.device)
    with torch.no_grad():
        examples = model.loaded.encode_unlabeled(TEXTS)
        predicted = [model.loaded.task.scores(model.module, collate([e]))[0].double().softmax(0) for e in examples]
    torch.testing.assert_close(torch.cat(predictor.probabilities(TEXTS)), torch.stack(predicted), atol=1e-5, rtol=1e-5)


def test_the_cards_program_predicts_the_same(exported: tuple[TrainableModel, Path]) -> None:
    """The code in the model card, run as it is on the folder, with transformers alone."""
    _, folder = exported
    program = (folder / CARD).read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    program = program.replace("FOLDER", str(folder)).replace('["a text"]', json.dumps(TEXTS))
    assert "cotune" not in program.replace(str(folder), "")
    predicted = io.StringIO()
    with contextlib.redirect_stdout(predicted):
        exec(program, {})
    best = torch.cat(open_predictor(str(folder), "cpu").probabilities(TEXTS)).argmax(1)
    assert predicted.getvalue().strip() == str([LABELS[number] for number in best])


def test_transformers_does_not_take_it_for_its_own(exported: tuple[TrainableModel, Path]) -> None:
    """With the encoder's own configuration it would load a head of random numbers, and only warn."""
    with pytest.raises(ValueError, match="cotune-layers"):
        AutoModelForSequenceClassification.from_pretrained(exported[1])


def test_it_can_be_written_again(exported: tuple[TrainableModel, Path], tmp_path: Path) -> None:
    export_model(open_predictor(str(exported[1]), "cpu").model, tmp_path / "model")
    for name in ("config.json", "head.safetensors", "encoder/model.safetensors", "encoder/tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (exported[1] / name).read_bytes(), name


def test_the_hash_covers_the_encoder(exported: tuple[TrainableModel, Path], tmp_path: Path) -> None:
    folder = copy_of(exported[1], tmp_path / "model")
    weights = folder / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert content_hash(folder) != content_hash(exported[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "weight": t["weight"][:, :-1].contiguous()},
        lambda t: {**t, "weight": t["weight"][:2].contiguous()},
        lambda t: {**t, "bias": t["bias"] * torch.nan},
        lambda t: {**t, "weight": t["weight"].double()},
        lambda t: {name: tensor for name, tensor in t.items() if name != "bias"},
        lambda t: {**t, "extra": torch.zeros(1)},
        lambda t: {"weight": torch.zeros(3, 16), "bias": t["bias"]},
    ],
)
def test_tensors_that_do_not_fit_are_refused(exported: tuple[TrainableModel, Path], tmp_path: Path, change: Any) -> None:
    folder = copy_of(exported[1], tmp_path / "model")
    save_file(change(load_file(folder / "head.safetensors")), folder / "head.safetensors")
    with pytest.raises(ModelError) as caught:
        open_predictor(str(folder), "cpu")
    assert caught.value.code in ("model.layers_damaged", "model.not_loadable")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"id2label": {"0": "a", "1": "b", "3": "c"}},
        {"layers": [2, 1]},
        {"layers": [1, 99]},
        {"cls": "maybe"},
        {"more": 1},
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    exported: tuple[TrainableModel, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = copy_of(exported[1], tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **change}), encoding="utf-8")
    with pytest.raises(ModelError):
        open_predictor(str(folder), "cpu")


def test_a_truncated_head_is_refused(exported: tuple[TrainableModel, Path], tmp_path: Path) -> None:
    folder = copy_of(exported[1], tmp_path / "model")
    head = folder / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-20])
    with pytest.raises(ModelError):
        open_predictor(str(folder), "cpu")


@pytest.mark.parametrize("place", ["sub/weights.safetensors", "../../weights.safetensors"])
def test_an_encoder_whose_weights_the_hash_does_not_cover_is_refused(
    exported: tuple[TrainableModel, Path], tmp_path: Path, place: str
) -> None:
    folder = copy_of(exported[1], tmp_path / "model")
    encoder = folder / "encoder"
    names = load_file(encoder / "model.safetensors")
    (encoder / place).parent.mkdir(exist_ok=True)
    (encoder / "model.safetensors").rename(encoder / place)
    save_file({"other": torch.zeros(1)}, encoder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
    (encoder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with fails_with("model.weights_outside_folder"):
        open_predictor(str(folder), "cpu")


def test_an_encoder_with_an_adapter_is_refused(exported: tuple[TrainableModel, Path], tmp_path: Path) -> None:
    """transformers would put it on the encoder unasked."""
    folder = copy_of(exported[1], tmp_path / "model")
    (folder / "encoder" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    with fails_with("model.adapter_only"):
        open_predictor(str(folder), "cpu")


def test_a_folder_of_a_base_model_stays_what_it_is(base_model: Callable[[str], Path]) -> None:
    assert load_model(ModelConfig(base=str(base_model("bert"))), LABELS, 1).feature == ()
