"""Language models that go on with a text: what a record is, which tokens are targets, and their losses against transformers' own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from cotune.data.config import DataConfig
from cotune.data.metrics.metrics import compute_text_metrics
from cotune.data.record_reading import read_records
from cotune.data.tasks import token_losses
from cotune.data.tasks.causal import CausalLanguageModeling
from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.task import get_task
from cotune.data.types import Passage, record_identity
from cotune.errors import DataError
from cotune.models.base.load import LoadedModel, load_model
from cotune.models.config import ModelConfig
from tests.support.language_models import dialogs
from tests.support.tiny_models import tokenizer

TASK = get_task("causal-lm")
EOS = 3
Loaded = Callable[..., LoadedModel]


@pytest.fixture(scope="module")
def loaded(language_model: Callable[..., Path]) -> Loaded:
    def make(kind: str = "llama", *, tied: bool = False, length: int = 16) -> LoadedModel:
        config = ModelConfig(base=str(language_model(kind, tied=tied)), max_length=length, precision="float32")
        return load_model(config, (), 3, "causal-lm")

    return make


def passages(count: int = 6) -> list[Passage]:
    return [Passage(record["prompt"] + "\n", record["target"]) for record in dialogs(count)]


def read(folder: Path, rows: list[dict[str, Any]], **columns: str) -> Any:
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_records(DataConfig(source=str(file), **columns), task="causal-lm")


# --- records


def test_a_record_is_a_prompt_with_its_target(tmp_path: Path) -> None:
    rows = [{"q": "the day", "a": "fine"}, {"q": " ", "a": "sad"}, {"q": "a tree", "a": ""}, {"q": "a tree", "a": "road"}]
    found = read(tmp_path, rows, prompt="q", target="a")
    assert found.inputs == (Passage("the day\n", "fine"), Passage("a tree\n", "road"))
    assert found.skipped == {"blank prompt": 1, "blank target": 1}
    other = read(tmp_path, rows, prompt="q", target="a", separator=" -> ")
    assert other.inputs[0] == Passage("the day -> ", "fine")


def test_a_text_alone_is_all_target(tmp_path: Path) -> None:
    found = read(tmp_path, [{"text": "the day"}, {"text": "text"}, {"text": " "}])
    assert found.inputs == (Passage("", "the day"),)
    assert found.skipped == {"repeated header": 1, "blank text": 1}


def test_one_column_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt is not given"):
        DataConfig(source="x.csv", target="a")
    with pytest.raises(ValueError, match="two different columns"):
        DataConfig(source="x.csv", prompt="a", target="a")


def test_identity_is_of_prompt_and_target() -> None:
    assert record_identity(Passage("The day\n", "fine")) == record_identity(Passage("the  day ", "Fine."))
    assert record_identity(Passage("the day", "fine")) != record_identity(Passage("the", "day fine"))
    assert record_identity(Passage("the day", "fine")) != record_identity(Passage("the day", "sad"))
    assert record_identity(Passage("", "The day")) == record_identity("the day"), "the same text under another task"


# --- examples


def test_targets_are_the_next_tokens_and_prompts_have_none() -> None:
    reader = tokenizer()
    (example,) = TASK.examples(reader, 16, [Passage("the day\n", "great road")], [0])
    prompt = reader("the day")["input_ids"]
    target = [*reader("great road")["input_ids"], EOS]
    assert example["input_ids"] == [*prompt, *target][:-1]
    assert example["labels"] == [IGNORED] * (len(prompt) - 1) + target


def test_all_of_a_text_but_its_first_token_is_a_target() -> None:
    reader = tokenizer()
    (example,) = TASK.examples(reader, 16, [Passage("", "the great road")], [0])
    ids = [*reader("the great road")["input_ids"], EOS]
    assert (example["input_ids"], example["labels"]) == (ids[:-1], ids[1:])


def test_truncated_target_contributes_nothing_and_is_counted(loaded: Loaded) -> None:
    model = loaded()
    records = [Passage("the " * 20, "day"), Passage("the " * 10, "day " * 10), Passage("the", "day"), Passage("the " * 16, "day")]
    examples = TASK.examples(model.reader, 16, records, [0] * 4)
    assert [any(label != IGNORED for label in example["labels"]) for example in examples] == [False, True, True, True]
    assert [len(example["input_ids"]) for example in examples] == [16, 16, 2, 16]
    assert TASK.cut(model.reader, 16, records) == 3
    assert TASK.lost(model.reader, 16, records) == 1
    collate = TASK.collator(model.module, model.reader, torch.device("cpu"))
    losses = TASK.losses(model.module, collate(examples, 16, 5))
    assert losses[0] == 0
    assert losses[4] == 0, "a slot without a record"
    assert bool((losses[1:4] > 0).all())


# --- losses


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_losses_are_those_of_transformers_one_record_at_a_time(loaded: Loaded, kind: str, tied: bool) -> None:
    model = loaded(kind, tied=tied, length=32)
    examples = TASK.examples(model.reader, 31, passages(), [0] * 6)
    collate = TASK.collator(model.module, model.reader, torch.device("cpu"))
    together = TASK.losses(model.module, collate(examples, 32, 8))
    for example, loss in zip(examples, together, strict=False):
        ids = torch.tensor([[*example["input_ids"], EOS]])
        labels = torch.tensor([[IGNORED, *example["labels"]]])
        expected = model.module(input_ids=ids, labels=labels).loss  # the mean over the record's own target tokens
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**16))
def test_gradients_made_forward_are_those_of_autograd(rows: int, length: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(5, 11, bias=seed % 2 == 0).requires_grad_(False)
    hidden = torch.randn(rows, length, 5, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = IGNORED
    weights = torch.randn(rows, length, generator=generator)
    expected = functional.cross_entropy(layer(hidden).movedim(-1, 1), labels, ignore_index=IGNORED, reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
    losses, behind = token_losses._FrozenOutput.apply(hidden, labels, layer, size)  # type: ignore[no-untyped-call]
    (made,) = torch.autograd.grad((losses * weights).sum(), hidden)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(made, gradient)
    right = (layer(hidden).argmax(dim=-1) == labels) | (labels == IGNORED)
    assert bool(((behind == 0) == right).all())


def test_scores_that_an_architecture_bounds_are_its_own(loaded: Loaded) -> None:
    """As in Gemma 2: the output layer's scores are not the model's."""
    model = loaded()
    collate = TASK.collator(model.module, model.reader, torch.device("cpu"))
    batch = collate(TASK.examples(model.reader, 16, passages(), [0] * 6))
    plain = TASK.losses(model.module, batch)
    whole = model.module.forward

    def bounded(*args: Any, **kwargs: Any) -> Any:
        output = whole(*args, **kwargs)
        output.logits = 0.1 * torch.tanh(output.logits / 0.1)
        return output

    token_losses._plain.clear()
    model.module.forward = bounded
    found = TASK.losses(model.module, batch)
    assert not torch.allclose(found, plain)
    scores = bounded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = functional.cross_entropy(scores.movedim(-1, 1), batch["labels"], ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(found, each.sum(dim=1) / (batch["labels"] != IGNORED).sum(dim=1))


def test_the_scores_of_a_batch_are_never_in_memory_at_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded()
    collate = TASK.collator(model.module, model.reader, torch.device("cpu"))
    batch = collate(TASK.examples(model.reader, 16, passages(), [0] * 6), 16, 8)
    shapes: list[tuple[int, ...]] = []
    handle = model.module.get_output_embeddings().register_forward_hook(lambda _, __, scores: shapes.append(tuple(scores.shape)))
    TASK.losses(model.module, batch)  # finds out how scores are made
    shapes.clear()
    words = model.module.config.vocab_size
    monkeypatch.setattr(token_losses, "_MAX_SCORES_CPU", 8 * words * 3)
    TASK.losses(model.module, batch)
    handle.remove()
    labeled = {column // 2 for column in (batch["labels"] != IGNORED).any(dim=0).nonzero()[:, 0].tolist()}
    assert 0 < len(labeled) < 8
    assert shapes == [(8, 2, words)] * len(labeled)  # a power of two, and none where no record has a label


def test_positions_without_labels_change_no_record(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record's loss and gradient are the same to the bit beside records with more labels and beside blank ones."""
    model = loaded()
    collate = TASK.collator(model.module, model.reader, torch.device("cpu"))
    few, many = TASK.examples(model.reader, 16, [Passage("w1 w2", "w3"), Passage("w1", "w3 w4 w5 w6 w7 w8")], [0, 0])
    layer = model.module.get_output_embeddings()
    monkeypatch.setattr(token_losses, "_MAX_SCORES_CPU", 4 * model.module.config.vocab_size * 2)
    made = []
    handle = layer.register_forward_hook(lambda _, __, scores: made.append(scores))
    found = []
    for beside in ([], [many]):
        made.clear()
        labels = collate([few, *beside], 16, 4)["labels"]
        hidden = torch.randn(4, 16, layer.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
        losses, behind = token_losses._losses_of_hidden(hidden, labels, layer)
        (gradient,) = torch.autograd.grad(losses[0].sum(), hidden)
        found.append((len(made), losses[0], behind[0], gradient[0]))
    handle.remove()
    (fewer, *alone), (more, *together) = found
    assert fewer < more
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert bool((alone[0] > 0).any())
    assert bool(alone[2].any())


def test_a_row_that_is_not_finite_leaves_positions_without_labels_at_zero() -> None:
    layer = torch.nn.Linear(5, 11, bias=False).requires_grad_(False)
    hidden = torch.full((2, 2, 5), math.nan, requires_grad=True)
    losses, behind = token_losses._losses_of_hidden(hidden, torch.tensor([[3, IGNORED], [IGNORED, IGNORED]]), layer)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert losses.isnan().tolist() == [[True, False], [False, False]]
    assert behind.isnan().tolist() == [[True, False], [False, False]]
    assert not gradient[1].any()
    assert not gradient[0, 1].any()


# --- what is predicted


def test_metrics_are_over_all_target_tokens() -> None:
    found = compute_text_metrics([(3.0, 2, 1), (0.0, 0, 0), (1.0, 6, 5)])
    assert (found.loss, found.perplexity, found.accuracy) == (0.5, pytest.approx(math.exp(0.5)), 0.75)
    assert math.isfinite(compute_text_metrics([(1e6, 1, 0)]).perplexity)


def test_records_without_any_target_have_no_metrics() -> None:
    with pytest.raises(DataError) as raised:
        compute_text_metrics([(0.0, 0, 0)])
    assert raised.value.code == "data.no_targets"


def test_answers_add_up_the_tokens_of_a_record(loaded: Loaded) -> None:
    model = loaded()
    examples = TASK.examples(model.reader, 16, passages(), [0] * 6)
    collate = TASK.collator(model.module, model.reader, torch.device("cpu"))
    batch = collate(examples)
    scores = TASK.scores(model.module, batch)
    logits: Tensor = model.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    there = batch["labels"] != IGNORED
    predicted = ((logits.argmax(dim=-1) == batch["labels"]) & there).sum(dim=1)
    for (answer,), row in zip(TASK.answers(scores, examples), range(6), strict=True):
        loss, tokens, right = answer
        assert (tokens, right) == (int(there[row].sum()), int(predicted[row]))
        assert loss / tokens == pytest.approx(float(TASK.losses(model.module, batch)[row]), rel=1e-5)
    assert TASK.are_right(scores, batch["labels"]).tolist() == (predicted == there.sum(dim=1)).tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_of_targets_alone_give_the_same_losses(loaded: Loaded, kind: str) -> None:
    model = loaded(kind)
    batch = model.task.collator(model.module, model.reader, torch.device("cpu"))(
        model.task.examples(model.reader, 16, [Passage(d["prompt"], d["target"]) for d in dialogs(5)], [0] * 5), 16, 8
    )
    found = [token_losses.token_losses(model.module, batch, most) for most in (None, 6)]
    assert int((batch["labels"] != IGNORED).sum(dim=1).max()) <= 6
    for whole, chosen in zip(*found, strict=True):
        torch.testing.assert_close(chosen, whole, rtol=1e-5, atol=1e-6)


def test_no_more_scores_are_made_than_a_target_has_tokens(loaded: Loaded) -> None:
    model = loaded()
    batch = {"input_ids": torch.full((3, 16), 5), "attention_mask": torch.ones(3, 16, dtype=torch.long)}
    batch["labels"] = torch.full((3, 16), IGNORED)
    batch["labels"][:, 9:] = 6
    token_losses.token_losses(model.module, batch)  # whether the layer is plain is found out once
    seen = []
    hook = model.module.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    losses, _ = token_losses.token_losses(model.module, batch, 4)
    hook.remove()
    assert sum(seen) == 4
    assert (losses != 0).sum(dim=1).tolist() == [4, 4, 4]


def test_targets_are_cut_at_their_most_tokens() -> None:
    task = CausalLanguageModeling(2)
    long = Passage("a", " ".join(["b"] * 5))
    reader = tokenizer("llama")
    (example,) = task.examples(reader, 16, [long], [0])
    assert sum(label != IGNORED for label in example["labels"]) == 2
    assert task.cut(reader, 16, [long]) == 1
    assert task.lost(reader, 16, [long]) == 0
