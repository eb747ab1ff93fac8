"""Made-up models, words and records: no network is needed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench, Row
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerFast, Qwen2Config

from cotune.client.training.stage_setup.from_records import synthetic_setup
from cotune.client.training.stage_setup.training_setup import TrainingSetup
from cotune.data.tasks.task import get_task
from cotune.models.base.load import LoadedModel
from cotune.models.base.lookup import BaseModelFolder
from cotune.models.base.quantized_layers import quantize_layer
from cotune.models.config import LoraConfig
from cotune.models.trainable import TrainableModel
from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan

LABELS = ("bad", "good", "so")
WORDS = [f"word{number}" for number in range(200)]


@dataclass(frozen=True)
class Size:
    """A decoder of the Qwen2 type."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    words: int


SIZES = {"1.5 B": Size(1536, 28, 12, 2, 8960, 151_936), "7 B": Size(3584, 28, 28, 4, 18_944, 152_064)}
TINY = {"1.5 B": Size(32, 2, 4, 2, 64, 256), "7 B": Size(64, 3, 4, 2, 128, 256)}


def tokenizer() -> PreTrainedTokenizerFast:
    """One number for each of the made-up words."""
    known = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LABELS, *WORDS])}
    words = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


def texts(count: int, words: int) -> list[str]:
    drawn = random.Random(3)
    return [" ".join(drawn.choices(WORDS, k=words)) for _ in range(count)]


def records(file: Path, count: int) -> Path:
    """Texts whose class is one of their words."""
    drawn = random.Random(5)
    lines = ["text,label"]
    for text in texts(count, 9):
        label = drawn.choice(LABELS)
        lines.append(f"{text} {label},{label}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def plan_for(base: str, **changes: Any) -> Plan:
    """A plan that trains adapters under ε = 8."""
    table: dict[str, Any] = {
        "name": "gpu",
        "labels": list(LABELS),
        "train": "lora",
        "rounds": 1,
        "model": {"base": base, "pooling": "native", **changes.pop("model", {})},
        "lora": {"rank": 8, "targets": ["q_proj", "v_proj"], **changes.pop("lora", {})},
        "data": {"source": "records.csv"},
        "privacy": {"epsilon": 8.0},
        "simulation": {"clients": 2, "partition": "iid", "baselines": []},
    }
    return parse_plan({**table, **changes})


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        size: A name in SIZES.
        weights: The dtype of frozen weights, or of those that have no 4 bits.
        checkpointing: Whether activations are computed again in the backward pass.
        physical: Slots of a batch, the blank one included.
        four_bits: Whether the linear layers of the blocks have 4 bits, as with `model.quantization`.
    """

    size: str
    weights: torch.dtype
    checkpointing: bool
    physical: int
    four_bits: bool = False

    @property
    def named(self) -> Row:
        return {
            "model": self.size,
            "frozen weights": "nf4" if self.four_bits else str(self.weights).removeprefix("torch."),
            "checkpointing": "on" if self.checkpointing else "off",
            "slots": self.physical,
        }


LENGTH = 256


def build_model(bench: Bench, case: Case, task: str = "sequence-classification") -> TrainableModel:
    """A decoder with made-up weights on the device, with adapters and head in float32."""
    size = (TINY if bench.tiny else SIZES)[case.size]
    config = Qwen2Config(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        intermediate_size=size.inner,
        vocab_size=size.words,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        use_cache=False,
        num_labels=len(LABELS),
    )
    does = get_task(task)  # type: ignore[arg-type]
    with bench.device:
        module = does.model_class().from_config(config, dtype=case.weights)
    module.requires_grad_(False)
    if case.four_bits:
        for layer in (each for each in module.base_model.layers.modules() if type(each) is nn.Linear):
            layer.weight = quantize_layer(layer, layer.weight.detach())
    for name, layer in module.named_children():
        if name != module.base_model_prefix and getattr(layer, "weight", None) is not module.get_input_embeddings().weight:
            layer.float()
    folder = BaseModelFolder("made up", Path(), "0" * 64)
    loaded = LoadedModel(module, tokenizer(), folder, (), LENGTH, does)
    model = TrainableModel(loaded, LoraConfig(rank=8, targets=("q_proj", "v_proj")), 7, bench.device)
    model.train_only(model.names("lora"))
    return model


def build_setup(bench: Bench, case: Case, model: TrainableModel, count: int, **changes: Any) -> TrainingSetup:
    """Made-up records of full length, in batches as training has them."""
    plan = plan_for("made-up", model={"max_length": LENGTH, "precision": "bfloat16"}, **changes)
    stage = plan.stages[0]
    again = "on" if case.checkpointing else "off"
    local = stage.local.model_copy(update={"physical_batch_size": case.physical, "activation_checkpointing": again})
    return synthetic_setup(plan, stage.model_copy(update={"local": local}), model, count)


def write_base(folder: Path, config: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
