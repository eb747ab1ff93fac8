from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cotune.data.tasks.classes import Batch, example_losses, logits
from cotune.data.tasks.text import collator, encode
from cotune.models.adapters.lora import merge_adapters
from cotune.models.config import LoraConfig, ModelConfig, TrainMode
from cotune.models.trainable import State, TrainableModel, get_model, strip_prefix
from tests.support.failures import fails_with

Make = Callable[..., TrainableModel]
ARCHITECTURES = ("bert", "distilbert", "gpt2", "llama", "qwen2")
HEADS = {
    "bert": ["classifier.weight", "classifier.bias"],
    "distilbert": ["pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"],
    "gpt2": ["score.weight"],
    "llama": ["score.weight"],
    "qwen2": ["score.weight"],
}
ADAPTED = {  # a module that the automatic targets adapt, in layer 1
    "bert": "bert.encoder.layer.1.attention.self.query",
    "distilbert": "distilbert.transformer.layer.1.attention.q_lin",
    "gpt2": "transformer.h.1.attn.c_attn",
    "llama": "model.layers.1.self_attn.q_proj",
    "qwen2": "model.layers.1.self_attn.q_proj",
}
EMBEDDINGS = {
    "bert": "bert.embeddings.",
    "distilbert": "distilbert.embeddings.",
    "gpt2": "transformer.w",
    "llama": "model.embed_tokens.",
    "qwen2": "model.embed_tokens.",
}


def batch_of(model: TrainableModel, texts: tuple[str, ...]) -> Batch:
    ids = encode(model.loaded.reader, texts, model.loaded.max_length)
    return collator(model.module, model.loaded.reader, model.device)(
        [{"input_ids": row, "labels": i % 3} for i, row in enumerate(ids)]
    )


@torch.no_grad()
def scores(model: TrainableModel, texts: tuple[str, ...]) -> Tensor:
    return logits(model.module, batch_of(model, texts))


def everything(model: TrainableModel) -> State:
    return model.state(name for name, _ in model.parameters())


def changed(before: State, after: State) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def train(model: TrainableModel, names: list[str], texts: tuple[str, ...], steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.train_only(names), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        example_losses(model.module, batch_of(model, texts)).mean().backward()
        optimizer.step()


# --- which names


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_head_is_what_lies_outside_the_encoder(shared: Make, kind: str) -> None:
    assert shared(kind).names("head") == HEADS[kind]
    assert shared(kind, lora=LoraConfig(rank=2)).names("head") == HEADS[kind]


def test_names_that_were_asked_for_cannot_be_changed(shared: Make) -> None:
    model = shared("bert")
    expected = model.names("head")
    model.names("head").clear()
    assert model.names("head") == expected
    assert model.names("full", freeze_embeddings=False) != model.names("full")
    for number in range(2 * 64):  # more than are kept
        assert model.names("head", round=number) == expected


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_lora_shares_b_and_the_head(shared: Make, kind: str) -> None:
    names = shared(kind, lora=LoraConfig(rank=2)).names("lora")
    assert names[-len(HEADS[kind]) :] == HEADS[kind]
    factors = names[: -len(HEADS[kind])]
    assert factors
    assert all(".lora_B." in name for name in factors)
    assert f"{ADAPTED[kind]}.lora_B.default.weight" in factors


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_lora_shares_a_too_unless_frozen(shared: Make, kind: str) -> None:
    frozen = shared(kind, lora=LoraConfig(rank=2)).names("lora")
    both = shared(kind, lora=LoraConfig(rank=2, factors="ab")).names("lora")
    assert set(both) - set(frozen) == {n.replace(".lora_B.", ".lora_A.") for n in frozen if ".lora_B." in n}
    assert set(frozen) < set(both)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_full_is_everything_but_embeddings(shared: Make, kind: str) -> None:
    model = shared(kind, pooling="native")
    everybody = [name for name, _ in model.parameters()]
    assert model.names("full", freeze_embeddings=False) == everybody
    left_out = set(everybody) - set(model.names("full"))
    assert left_out == {name for name in everybody if name.startswith(EMBEDDINGS[kind])}
    assert left_out


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("freeze_embeddings", [True, False])
def test_the_pooling_layer_is_never_shared(shared: Make, kind: str, freeze_embeddings: bool) -> None:
    model = shared(kind, pooling="mean")
    layer = ("bert.encoder.layer.2.", "bert.pooler.") if kind == "bert" else ("distilbert.transformer.layer.2.",)
    assert any(name.startswith(layer) for name, _ in model.parameters())
    names = model.names("full", freeze_embeddings=freeze_embeddings)
    assert not any(name.startswith(layer) for name in names)
    native = shared(kind, pooling="native").names("full", freeze_embeddings=freeze_embeddings)
    assert names == [name for name in native if not name.startswith(layer)]


def test_the_pooling_layer_gets_no_adapter(shared: Make) -> None:
    model = shared("bert", pooling="mean", lora=LoraConfig(rank=2, targets=("query", "value", "dense")))
    adapted = {name for name, _ in model.parameters() if ".lora_" in name}
    assert any("bert.encoder.layer.1.output.dense" in name for name in adapted)
    assert not any(name.startswith(("bert.encoder.layer.2.", "bert.pooler.", "classifier")) for name in adapted)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_names_are_the_same_with_and_without_adapters(shared: Make, kind: str) -> None:
    plain = shared(kind)
    adapted = shared(kind, lora=LoraConfig(rank=2))
    names = [name for name, _ in plain.parameters()]
    assert [name for name, _ in adapted.parameters() if ".lora_" not in name] == names
    assert adapted.names("full") == plain.names("full")
    assert names == [name for name, _ in plain.loaded.module.named_parameters()]
    assert not changed(everything(plain), {n: t for n, t in everything(adapted).items() if ".lora_" not in n})


def test_without_adapters_lora_is_the_head(shared: Make) -> None:
    assert shared("bert").names("lora") == HEADS["bert"]


@pytest.mark.parametrize("mode", get_args(TrainMode))
def test_only_the_named_parameters_are_trained(shared: Make, texts: tuple[str, ...], mode: TrainMode) -> None:
    model = shared("bert", lora=LoraConfig(rank=2))
    names = model.names(mode, layers=1 if mode == "blocks" else None)
    before = everything(model)
    chosen = model.train_only(names)
    assert [name for name, p in model.parameters() if p.requires_grad] == names
    assert [tuple(p.shape) for p in chosen] == [tuple(before[name].shape) for name in names]
    train(model, names, texts)
    moved = changed(before, everything(model))
    assert moved <= set(names)
    assert {"classifier.weight", "classifier.bias"} <= moved
    inside = {"head": "classifier.", "lora": ".lora_B.", "blocks": "layer.1.", "full": "query.weight"}[mode]
    assert any(inside in name for name in moved)


# --- adapters


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_is_drawn_from_the_seed(shared: Make, kind: str) -> None:
    def factors(seed: int) -> State:
        model = shared(kind, lora=LoraConfig(rank=2), seed=seed)
        return model.state(name for name, _ in model.parameters() if ".lora_A." in name)

    torch.manual_seed(1)
    first = factors(3)
    torch.manual_seed(2)
    assert not changed(first, factors(3))
    assert changed(first, factors(4)) == set(first)
    assert all(bool(t.any()) for t in first.values())
    drawn = [t.flatten()[:4].tolist() for t in first.values()]
    assert len({tuple(row) for row in drawn}) == len(drawn)  # every layer its own


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_new_adapters_change_nothing(shared: Make, texts: tuple[str, ...], kind: str) -> None:
    model = shared(kind, lora=LoraConfig(rank=2))
    factors = model.state(name for name, _ in model.parameters() if ".lora_B." in name)
    assert factors
    assert not any(bool(t.any()) for t in factors.values())
    assert torch.equal(scores(model, texts), scores(shared(kind), texts))
    model.load({name: torch.ones_like(t) for name, t in factors.items()})
    assert not torch.allclose(scores(model, texts), scores(shared(kind), texts), atol=1e-3)  # they are wired in


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_merging_adapters_keeps_the_logits(shared: Make, texts: tuple[str, ...], kind: str) -> None:
    model = shared(kind, lora=LoraConfig(rank=2, alpha=8))
    generator = torch.Generator().manual_seed(0)
    model.load({n: torch.randn(t.shape, generator=generator) for n, t in model.state(model.names("lora")).items()})
    merged: Any = copy.deepcopy(model.loaded.module)
    merge_adapters(merged)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in shared(kind).loaded.module.named_parameters()]
    with torch.no_grad():
        got = logits(merged, batch_of(model, texts))
    torch.testing.assert_close(got, scores(model, texts), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, scores(shared(kind), texts), atol=1e-2)


def test_an_adapter_is_alpha_over_r_times_b_a(shared: Make) -> None:
    """Hu et al., ICLR 2022: W + (α/r)·B·A, against the merged weight."""
    model = shared("bert", lora=LoraConfig(rank=2, alpha=6))
    layer = "bert.encoder.layer.0.attention.self.value"
    b = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    model.load({f"{layer}.lora_B.default.weight": b})
    state = everything(model)
    expected = state[f"{layer}.weight"] + 3 * b @ state[f"{layer}.lora_A.default.weight"]
    merged: Any = copy.deepcopy(model.loaded.module)
    merge_adapters(merged)
    torch.testing.assert_close(merged.get_parameter(f"{layer}.weight"), expected)


def test_targets_that_match_nothing_are_refused(shared: Make) -> None:
    with fails_with("model.lora_targets", "lora.targets", "q_proj"):
        shared("bert", lora=LoraConfig(targets=("q_proj",)))


# --- states


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_empty_state_is_the_base_model(shared: Make, texts: tuple[str, ...], kind: str) -> None:
    model = shared(kind, lora=LoraConfig(rank=2))
    base = everything(model)
    generator = torch.Generator().manual_seed(0)
    for mode in ("head", "lora", "full"):
        state = {n: torch.randn(t.shape, generator=generator) for n, t in model.state(model.names(mode)).items()}
        model.load(state)
        now = everything(model)
        assert changed(base, now) == set(state)
        assert not changed(state, {name: now[name] for name in state})
        train(model, model.names(mode), texts)
        model.load({})
        assert not changed(base, everything(model))


def test_state_applies_to_the_base_whatever_was_loaded(shared: Make) -> None:
    model = shared("bert", lora=LoraConfig(rank=2))
    base = everything(model)
    full = {n: t + 1 for n, t in model.state(model.names("full")).items()}
    head = {n: t - 1 for n, t in model.state(model.names("head")).items()}
    model.load(full)
    model.load(head)
    assert changed(base, everything(model)) == set(head)


@pytest.mark.parametrize("mode", get_args(TrainMode))
def test_training_without_a_state_is_undone_too(shared: Make, texts: tuple[str, ...], mode: TrainMode) -> None:
    """`load` makes the parameters a function of the base model and the given state alone."""
    model = shared("bert", lora=LoraConfig(rank=2))
    base = everything(model)
    model.load({})
    train(model, model.names(mode, layers=1 if mode == "blocks" else None), texts)
    assert changed(base, everything(model))
    model.load({})
    assert not changed(base, everything(model))


def test_a_state_is_a_copy(shared: Make) -> None:
    model = shared("bert")
    state = model.state(["classifier.weight"])
    with torch.no_grad():
        model.module.get_parameter("classifier.weight").zero_()
    assert bool(state["classifier.weight"].any())
    model.load(state)
    state["classifier.weight"].zero_()
    assert bool(everything(model)["classifier.weight"].any())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("classifier.weights", (3, 16)),
        ("classifier.weight", (2, 16)),
        ("classifier.weight", (48,)),
        ("classifier.weight", (3, 16, 1)),
        ("bert.encoder.layer.0.attention.self.query.lora_B.default.weight", (16, 2)),
    ],
)
def test_a_state_of_another_model_is_refused(shared: Make, name: str, shape: tuple[int, ...]) -> None:
    model = shared("bert")
    before = everything(model)
    with fails_with("model.foreign_state"):
        model.load({"classifier.bias": torch.ones(3), name: torch.ones(shape)})
    assert not changed(before, everything(model))  # nor is half of it taken over


def test_parameter_count(shared: Make) -> None:
    adapters = 2 * 2 * (16 * 2 + 2 * 16)  # layers × modules × (A and B)
    plain = sum(p.numel() for p in shared("bert").loaded.module.parameters())
    assert shared("bert", lora=LoraConfig(rank=2)).parameter_count() == plain + adapters


# --- the one model of a process


def test_a_process_keeps_one_model(base_model: Callable[[str], Path]) -> None:
    def get(labels: tuple[str, ...] = ("a", "b"), seed: int = 1) -> TrainableModel:
        return get_model(ModelConfig(base=str(base_model("bert"))), labels, None, seed, "cpu")

    first = get()
    assert get() is first
    head = everything(first)["classifier.weight"]
    assert get(seed=2) is not first
    assert not torch.equal(everything(get(seed=2))["classifier.weight"], head)
    assert torch.equal(everything(get())["classifier.weight"], head)  # loaded again: the same
    assert get(labels=("a", "b", "c")).loaded.module.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_tensors_under_a_prefix_go_by_the_rest_of_their_names() -> None:
    one = torch.zeros(1)
    other = torch.ones(1)
    found = strip_prefix("a/", {"a/x": one, "a/b/a/y": other, "b/a/x": one, "a": one})
    assert list(found) == ["x", "b/a/y"]
    assert found["x"] is one
