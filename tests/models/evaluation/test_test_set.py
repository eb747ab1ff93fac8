from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cotune.data.config import DataConfig
from cotune.data.dataset import Dataset, DatasetManifest, write_manifest
from cotune.models.config import LoraConfig, ModelConfig, TrainMode
from cotune.models.evaluation.test_set import evaluate, predict
from cotune.models.trainable import State, TrainableModel, get_model
from tests.support.datasets import sentences, write_csv, write_tagged
from tests.support.matrix import crossed
from tests.support.tiny_models import ARCHITECTURES

LABELS = ("bad", "good", "so")


@pytest.fixture
def test_set(tmp_path: Path) -> Dataset:
    """70 texts of unequal lengths, which is more than one batch, held in another order than that of their file."""
    source = write_csv(tmp_path / "all.csv", sentences(90, seed=5))
    rows = np.random.default_rng(0).permutation(90)[:70]
    write_manifest(tmp_path / "test" / "data.json", DataConfig(source=str(source)), [(None, rows)])
    return DatasetManifest.read(tmp_path / "test" / "data.json", LABELS)


def shared(folder: Path) -> TrainableModel:
    return get_model(ModelConfig(base=str(folder), max_length=16, precision="float32"), LABELS, None, 1, "cpu")


def moved(model: TrainableModel, mode: TrainMode, seed: int = 3) -> State:
    """A state away from the base model: the head much, the encoder a little."""
    model.load({})
    generator = torch.Generator().manual_seed(seed)
    start = model.state(model.names(mode))
    scale = {name: 0.1 if name.startswith(model.prefix) else 1.0 for name in start}
    return {name: tensor + scale[name] * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}


@torch.no_grad()
def one_by_one(model: TrainableModel, state: State, texts: list[str]) -> list[int]:
    """The oracle: the architecture's own forward on each text by itself, without padding, batches or features."""
    model.load(state)
    tokenizer = model.loaded.reader
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=16)["input_ids"]])
        assert ids.shape[1] > 1, f"the tokenizer reads nothing of {text!r}"
        found.append(int(model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.argmax()))
    return found


def by_hand(truth: list[int], predicted: list[int]) -> dict[str, float]:
    """Accuracy and macro precision, recall and F1 from the definition."""
    precisions = []
    recalls = []
    f1s = []
    for c in range(len(LABELS)):
        hits = sum(t == p == c for t, p in zip(truth, predicted, strict=True))
        precision = hits / predicted.count(c) if c in predicted else 0.0
        recall = hits / truth.count(c)
        precisions.append(precision)
        recalls.append(recall)
        f1s.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    accuracy = sum(t == p for t, p in zip(truth, predicted, strict=True)) / len(truth)
    return {"accuracy": accuracy, "precision": np.mean(precisions), "recall": np.mean(recalls), "f1": np.mean(f1s)}


@pytest.mark.parametrize(("kind", "mode"), crossed(ARCHITECTURES, ["head", "full"]))
def test_metrics_are_those_of_the_plain_model_text_by_text(
    base_model: Callable[[str], Path], test_set: Dataset, kind: str, mode: TrainMode
) -> None:
    model = shared(base_model(kind))
    texts = test_set.inputs()
    answers = ((state, one_by_one(model, state, texts)) for state in (moved(model, mode, seed) for seed in range(20)))
    state, predicted = next((s, p) for s, p in answers if len(set(p)) > 1)  # else texts could be mixed up unseen
    got = evaluate(model, state, test_set, "float32").as_dict()
    assert got == pytest.approx(by_hand(test_set.targets, predicted))


TAGS = ("B-BAD", "B-GOOD", "B-SO", "O")


@pytest.mark.parametrize(("kind", "length"), crossed(["bert", "gpt2"], [16, 4]))
def test_tags_are_judged_word_by_word(base_model: Callable[[str], Path], tmp_path: Path, kind: str, length: int) -> None:
    """Against the plain model on each text alone; a word that the model's length cuts off is predicted wrongly."""
    write_manifest(
        tmp_path / "data.json",
        DataConfig(source=str(write_tagged(tmp_path / "tags.jsonl", 70))),
        [(None, np.random.default_rng(0).permutation(70))],
        "token-classification",
    )
    test = DatasetManifest.read(tmp_path / "data.json", TAGS)
    config = ModelConfig(base=str(base_model(kind)), max_length=length, precision="float32")
    model = get_model(config, TAGS, None, 1, "cpu", "token-classification")
    state = moved(model, "full")
    model.load(state)
    truth = []
    predicted = []
    for words, tags in zip(test.inputs(), test.targets, strict=True):
        ids = torch.tensor([model.loaded.reader(" ".join(words))["input_ids"][:length]])  # a word is a token here
        with torch.no_grad():
            best = model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].argmax(dim=1).tolist()
        truth += tags
        predicted += [*best, *[-1] * (len(words) - len(best))]
    assert len(set(predicted) - {-1}) > 1
    assert (-1 in predicted) == (length == 4)
    right = sum(t == p for t, p in zip(truth, predicted, strict=True))
    got = evaluate(model, state, test, "float32")
    assert got.accuracy == pytest.approx(right / len(truth))
    recalls = [sum(t == p == c for t, p in zip(truth, predicted, strict=True)) / truth.count(c) for c in range(4)]
    assert got.recall == pytest.approx(sum(recalls) / 4)
    assert sum(test.label_counts().values()) == len(test) < len(truth)  # records, not words


def test_the_state_decides_not_what_was_evaluated_before(base_model: Callable[[str], Path], test_set: Dataset) -> None:
    model = shared(base_model("bert"))
    head = moved(model, "head")
    full = moved(model, "full")
    first = evaluate(model, head, test_set, "float32")
    other = evaluate(model, full, test_set, "float32")
    assert first != other
    assert evaluate(model, head, test_set, "float32") == first
    assert evaluate(model, full, test_set, "float32") == other


def test_a_class_that_is_never_predicted_counts_as_zero(base_model: Callable[[str], Path], test_set: Dataset) -> None:
    model = shared(base_model("bert"))
    model.load({})
    state = model.state(model.names("head"))
    always = {"classifier.weight": torch.zeros_like(state["classifier.weight"]), "classifier.bias": torch.tensor([0.0, 9.0, 0.0])}
    share = test_set.targets.count(1) / len(test_set)
    got = evaluate(model, always, test_set, "float32")
    assert got.as_dict() == pytest.approx(
        {"accuracy": share, "precision": share / 3, "recall": 1 / 3, "f1": 2 * share / (1 + share) / 3}
    )


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_predictions_in_smaller_batches_are_the_same(
    base_model: Callable[[str], Path], test_set: Dataset, mode: TrainMode
) -> None:
    """Memory runs out in the first batch, again in the middle, and in the last one; with adapters, lower layers are kept."""
    lora = LoraConfig(targets=("query",), layers=1) if mode == "lora" else None
    get_model.cache_clear()
    model = get_model(ModelConfig(base=str(base_model("bert")), max_length=16, precision="float32"), LABELS, lora, 1, "cpu")
    state = moved(model, mode)
    expected = predict(model, state, test_set, "float32")
    get_model.cache_clear()
    again = get_model(ModelConfig(base=str(base_model("bert")), max_length=16, precision="float32"), LABELS, lora, 1, "cpu")
    shapes: list[int] = []

    def short(_: object, __: object, output: torch.Tensor) -> None:
        shapes.append(len(output))
        if len(output) > 16 or len(shapes) in (5, 9):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with again.module.classifier.register_forward_hook(short):
        assert predict(again, state, test_set, "float32") == expected
    assert max(shapes) == (64 if mode == "full" else 32)
    assert shapes[-1] <= 16
