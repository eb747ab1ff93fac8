"""A model without its weights: names, shapes and the initial values of what is trained are those of the whole model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, LlamaConfig

from cotune.data.config import TaskName
from cotune.models.base.folder import config_hash
from cotune.models.base.lookup import find_base
from cotune.models.base.skeleton import CheckedLookups, build_skeleton
from cotune.models.config import FeatureConfig, LoraConfig, ModelConfig, TrainMode
from cotune.models.export import export_model
from cotune.models.features.public_map import pin_model
from cotune.models.trainable import TrainableModel, open_model
from tests.support.failures import fails_with
from tests.support.language_models import language_model
from tests.support.paired_models import paired_model
from tests.support.tiny_models import LABELS, copy_without_weights, tokenizer

__all__ = ["language_model", "paired_model"]  # fixtures
LORA = LoraConfig(rank=2, factors="ab")
Both = tuple[TrainableModel, TrainableModel]


def opened(base: Path, small: Path, lora: LoraConfig | None, task: TaskName, labels: tuple[str, ...], **changes: Any) -> Both:
    """The model with its weights, and without; they are asked for in another state of the generator."""
    wanted = ModelConfig.model_validate({"base": str(base), "max_length": 400, **changes})
    pinned = pin_model(wanted, find_base(wanted))
    whole = open_model(pinned, labels, lora, 3, "cpu", task)
    if not small.exists():
        copy_without_weights(base, small)
    torch.rand(random.Random(str(base)).randint(1, 9))
    found = open_model(pinned.model_copy(update={"base": str(small)}), labels, lora, 3, "cpu", task, needs_weights=False)
    return whole, found


def assert_same_but_values(whole: TrainableModel, found: TrainableModel, *modes: TrainMode) -> None:
    shapes = [[(name, tensor.shape, tensor.dtype) for name, tensor in model.parameters()] for model in (whole, found)]
    assert shapes[0] == shapes[1]
    assert whole.parameter_count() == found.parameter_count()
    assert whole.loaded.max_length == found.loaded.max_length
    assert whole.loaded.frozen == found.loaded.frozen
    assert whole.loaded.feature == found.loaded.feature
    assert whole.adapters() == found.adapters()
    trained = {name for mode in modes for name in whole.names(mode)}
    for name, tensor in whole.state(trained).items():
        assert torch.equal(tensor, found.state([name])[name]), name
    adapters = set(whole.adapter_names())
    new = set() if found.loaded.task.keeps_head else {n for n, _ in found.parameters() if not n.startswith(found.prefix)}
    assert found.names_without_value() == {name for name, _ in found.parameters()} - adapters - new


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        ("bert", "mean"),
        ("bert", "native"),
        ("distilbert", "mean"),
        ("roberta", "native"),
        ("gpt2", "native"),
        ("qwen2", "native"),
    ],
)
def test_classifier_has_the_same_new_head_and_adapters(
    base_model: Callable[[str], Path], tmp_path: Path, kind: str, pooling: str
) -> None:
    base = base_model(kind)
    both = opened(base, tmp_path / "small", LORA, "sequence-classification", LABELS, pooling=pooling)
    assert_same_but_values(*both, "head", "lora")


def test_image_classifier_is_the_same(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    both = opened(base_model("vit"), tmp_path / "small", LORA, "image-classification", LABELS)
    assert_same_but_values(*both, "head", "lora")


@pytest.mark.parametrize("tied", [False, True])
def test_language_model_is_the_same(language_model: Callable[..., Path], tmp_path: Path, tied: bool) -> None:
    both = opened(language_model(tied=tied), tmp_path / "small", LORA, "causal-lm", ())
    assert_same_but_values(*both, "lora")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_with_a_decoder_is_the_same(paired_model: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    assert_same_but_values(*opened(paired_model(kind), tmp_path / "small", LORA, "seq2seq", ()), "lora")


def test_heads_of_several_tasks_are_the_same(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    labels = ("mood: bad", "mood: good", "place: in", "place: out")
    both = opened(base_model("bert"), tmp_path / "small", LORA, "multi-task", labels)
    assert_same_but_values(*both, "head", "lora")


@pytest.mark.parametrize("whiten", ["public", "none"])
def test_head_on_layers_is_the_same(base_model: Callable[[str], Path], tmp_path: Path, whiten: str) -> None:
    feature = {"layers": [0, 2], "whiten": whiten}
    both = opened(base_model("bert"), tmp_path / "small", None, "sequence-classification", LABELS, feature=feature)
    assert_same_but_values(*both, "head")


def test_map_that_the_plan_does_not_bind_is_refused(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Organizations would be free to use different ones."""
    base = base_model("bert")
    small = copy_without_weights(base, tmp_path / "small")
    config = ModelConfig(base=str(small), feature=FeatureConfig(layers=(0, 2)), **find_base(ModelConfig(base=str(base))).pins)
    with fails_with("model.unpinned_base"):
        open_model(config, LABELS, None, 3, "cpu", needs_weights=False)
    with fails_with("model.unpinned_base"):
        pin_model(config, find_base(config, needs_weights=False))


def test_new_head_follows_from_the_seed_and_not_from_a_head_in_the_folder(
    base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """A head for other labels is initialized from the seed, whether or not the base model has a head."""
    base = base_model("bert")
    without = open_model(ModelConfig(base=str(base)), LABELS, None, 3, "cpu")
    export_model(open_model(ModelConfig(base=str(base)), ("x", "y", "z"), None, 4, "cpu"), tmp_path / "fitted")
    other = open_model(ModelConfig(base=str(tmp_path / "fitted")), LABELS, None, 3, "cpu")
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(without.state([name])[name], other.state([name])[name])


@pytest.mark.parametrize("mode", ["full", "blocks"])
def test_values_that_begin_with_the_base_models_are_refused(
    base_model: Callable[[str], Path], tmp_path: Path, mode: TrainMode
) -> None:
    _, found = opened(base_model("bert"), tmp_path / "small", None, "sequence-classification", LABELS)
    names = found.names(mode, layers=1)
    for ask in (found.state, found.base_state, found.train_only):
        with fails_with("model.weights_needed"):
            ask(names)
    with fails_with("model.weights_needed"):
        found.load({name: torch.zeros(dict(found.parameters())[name].shape) for name in names})
    with fails_with("model.weights_needed"):
        export_model(found, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_trained_head_of_the_folder_has_no_value(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    """With the weights, training goes on from it; a new one in its place would be another run."""
    base = tmp_path / "fitted"
    export_model(open_model(ModelConfig(base=str(base_model("bert"))), LABELS, None, 3, "cpu"), base)
    _, found = opened(base, tmp_path / "small", None, "sequence-classification", LABELS)
    with fails_with("model.weights_needed"):
        found.state(found.names("head"))


def test_state_of_another_shape_is_refused(language_model: Callable[..., Path], tmp_path: Path) -> None:
    _, found = opened(language_model(), tmp_path / "small", LORA, "causal-lm", ())
    name = found.names("lora")[0]
    with fails_with("model.foreign_state"):
        found.load({name: torch.zeros(3, 5)})


def test_targets_that_no_layer_has_are_refused(language_model: Callable[..., Path], tmp_path: Path) -> None:
    with fails_with("model.lora_targets"):
        opened(language_model(), tmp_path / "small", LoraConfig(targets=("nothing",)), "causal-lm", ())


def test_large_model_takes_no_memory(tmp_path: Path) -> None:
    """24 layers of 1,024: 1.3 GB of weights in float32; all that is in memory are adapters, and buffers."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=2816,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    plan = ModelConfig(base=str(tmp_path), base_hash="ab" * 32, config_hash=config_hash(tmp_path))
    model = open_model(plan, (), LORA, 3, "cpu", "causal-lm", needs_weights=False)
    held = sum(t.numel() * t.element_size() for _, t in [*model.parameters(), *model.buffers()] if not t.is_meta)
    assert {name for name, tensor in model.parameters() if not tensor.is_meta} == set(model.adapter_names())
    assert model.parameter_count() > 3e8
    assert held < 4 * sum(t.numel() for t in model.state(model.adapter_names()).values()) + 2**20


def test_parameters_that_are_not_made_empty_are_on_meta_too(base_model: Callable[[str], Path]) -> None:
    """The ones of a norm, and the tokens of a vision transformer, which are drawn."""
    for kind in ("llama", "vit"):
        module = build_skeleton(AutoModel, AutoConfig.from_pretrained(base_model(kind)))
        assert all(parameter.is_meta for parameter in module.parameters())


def test_number_beyond_a_table_without_values_is_an_error() -> None:
    """As it is in a table with them, which are looked up as ever."""
    meta = torch.empty(5, 3, device="meta")
    held = torch.arange(15.0).reshape(5, 3)
    with CheckedLookups():
        found = functional.embedding(torch.tensor([[0, 4]]), meta)
        assert (found.is_meta, found.shape) == (True, (1, 2, 3))
        assert torch.equal(functional.embedding(torch.tensor([4]), held), held[4:])
        for table in (meta, held):
            with pytest.raises(IndexError):
                functional.embedding(torch.tensor([[0, 5]]), table)
