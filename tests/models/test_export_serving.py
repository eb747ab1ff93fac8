"""The exported folder as those meet it who serve it: `transformers.pipeline`, `tokenizers`, another user of the machine."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, pipeline

from cotune.data.config import TaskName
from cotune.data.tasks.classes import logits
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.export import export_model
from cotune.models.trainable import TrainableModel
from tests.support.datasets import COLORS, write_images

LABELS = ("bad", "good", "so")
LONG = "great " + "the sad tree " * 40  # 121 words: beyond the length of training, and beyond the positions of the tiny models
TRAINED = 8  # tokens


@pytest.fixture
def made(base_model: Callable[[str], Path]) -> Callable[..., TrainableModel]:
    """(kind, task, problem_type) -> a model with a head that does not sit at zero, of a base that was for something else."""

    def make(kind: str, task: TaskName = "sequence-classification", labels: tuple[str, ...] = LABELS) -> TrainableModel:
        config = ModelConfig.model_validate({"base": str(base_model(kind)), "max_length": TRAINED})
        model = TrainableModel(load_model(config, labels, 1, task), None, 1, torch.device("cpu"))
        generator = torch.Generator().manual_seed(2)
        names = model.names("head")
        model.load({n: torch.randn(t.shape, generator=generator) for n, t in model.state(names).items()})
        return model

    return make


@torch.no_grad()
def own_scores(model: TrainableModel, text: str) -> torch.Tensor:
    """What the model gives in training for a text."""
    loaded = model.loaded
    [example] = loaded.task.examples(loaded.reader, loaded.max_length, [text], [0])
    assert len(example["input_ids"]) == TRAINED
    return functional.softmax(
        logits(model.module, loaded.task.collator(model.module, loaded.reader, model.device)([example])), -1
    )[0]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "qwen2"])
def test_a_long_text_is_read_as_in_training(made: Callable[..., TrainableModel], tmp_path: Path, kind: str) -> None:
    model = made(kind)
    export_model(model, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(str(tmp_path / "model")).model_max_length == TRAINED
    predicted = pipeline("text-classification", str(tmp_path / "model"), truncation=True)(LONG, top_k=None)
    assert {each["label"]: each["score"] for each in predicted} == pytest.approx(
        dict(zip(LABELS, own_scores(model, LONG).tolist(), strict=True)), abs=1e-5
    )


def test_a_long_sentence_is_tagged_up_to_the_length_of_training(made: Callable[..., TrainableModel], tmp_path: Path) -> None:
    export_model(made("bert", "token-classification"), tmp_path / "model")
    predicted = pipeline("token-classification", str(tmp_path / "model"), ignore_labels=[])(LONG)
    assert len(predicted) == TRAINED
    assert AutoConfig.from_pretrained(str(tmp_path / "model")).problem_type is None


def test_the_tokenizer_by_itself_truncates(made: Callable[..., TrainableModel], tmp_path: Path) -> None:
    """Servers that are no Python, such as text-embeddings-inference, read tokenizer.json alone."""
    export_model(made("bert"), tmp_path / "model")
    assert len(Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")).encode(LONG).ids) == TRAINED


def test_images_are_still_read(made: Callable[..., TrainableModel], tmp_path: Path) -> None:
    export_model(made("vit", "image-classification", tuple(COLORS)), tmp_path / "model")
    image = next(write_images(tmp_path / "photos", 3).rglob("*.png"))
    predicted = pipeline("image-classification", str(tmp_path / "model"))(str(image))
    assert sum(each["score"] for each in predicted) == pytest.approx(1)


@pytest.mark.parametrize("before", ["regression", "multi_label_classification"])
def test_what_the_base_was_for_does_not_stay(
    base_model: Callable[[str], Path], tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in base_model("bert").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "problem_type": before}))
    model = TrainableModel(load_model(ModelConfig(base=str(base)), LABELS, 1), None, 1, torch.device("cpu"))
    export_model(model, tmp_path / "model")
    predicted = pipeline("text-classification", str(tmp_path / "model"))("great tree", top_k=None)
    assert sum(each["score"] for each in predicted) == pytest.approx(1)
    assert AutoConfig.from_pretrained(str(tmp_path / "model")).problem_type == "single_label_classification"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_anyone_who_serves_it_can_read_it(made: Callable[..., TrainableModel], tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        export_model(made("bert"), tmp_path / "model", {"README.md": "# card\n"})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755
    assert {"model.safetensors", "config.json", "README.md"} <= modes.keys()
    assert set(modes.values()) == {0o644}
