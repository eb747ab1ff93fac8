"""Gradients of single records of language models with adapters, against one record at a time; with gradient checkpointing, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cotune.privacy.mechanisms.per_example import Batch, per_example

IGNORED = -100
VOCABULARY = 64
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TWO_STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
NEOX = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CAUSAL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (LLAMA, ["q_proj", "v_proj", "down_proj"]),
    "qwen2": (LLAMA, ["q_proj", "v_proj"]),
    "qwen3": ({**LLAMA, "head_dim": 8}, ["q_proj", "v_proj"]),
    "mistral": (LLAMA, ["q_proj", "v_proj"]),
    "gemma": ({**LLAMA, "head_dim": 8}, ["q_proj", "v_proj"]),
    "gpt2": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ["c_attn"],
    ),
    "opt": (
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "word_embed_proj_dim": 32,
        },
        ["q_proj", "v_proj"],
    ),
    "gpt_neox": (NEOX, ["query_key_value"]),
    "phi": (NEOX, ["q_proj", "v_proj", "fc1"]),
    "phi3": ({**NEOX, "pad_token_id": 0}, ["qkv_proj", "down_proj"]),
}
PAIRED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "t5": ({"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}, ["q", "v"]),
    "bart": (TWO_STACKS, ["q_proj", "v_proj"]),
    "marian": (TWO_STACKS, ["q_proj", "v_proj"]),
}


def build(kind: str) -> nn.Module:
    """A tiny model with adapters whose second factor is not zero, so that the first has a gradient."""
    torch.manual_seed(0)
    settings, targets = CAUSAL.get(kind) or PAIRED[kind]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **{**special, **settings})
    module = (AutoModelForCausalLM if kind in CAUSAL else AutoModelForSeq2SeqLM).from_config(config)
    module.requires_grad_(False)
    module = inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, fan_in_fan_out=kind == "gpt2"), module)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return module.train()


def losses_of(kind: str, module: nn.Module, batch: Batch) -> Tensor:
    """The mean over each record's own target tokens: (b,)."""
    labels = batch["labels"]
    if kind in CAUSAL:
        scores = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
        labels = labels[:, 1:]
    else:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        scores = module(**inputs, labels=labels.clamp(min=0), use_cache=False).logits
    each = functional.cross_entropy(scores.float().movedim(-1, 1), labels, ignore_index=IGNORED, reduction="none")
    return each.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)


def batch_of(records: int = 4, length: int = 10) -> Batch:
    """Records of unlike lengths, whose first tokens are a prompt, and one without any target."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (records, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[2, 4:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :3] = IGNORED
    labels[3] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [*CAUSAL, *PAIRED])
def test_gradients_are_those_of_single_records(kind: str, checkpointing: bool) -> None:
    module = build(kind)
    batch = batch_of()
    trained = tuple(p for p in module.parameters() if p.requires_grad)

    def loss(given: Batch) -> Tensor:
        return losses_of(kind, module, given)

    alone = []
    for row in range(3):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        alone.append(torch.autograd.grad(loss(one).sum(), trained))
    if checkpointing:
        module.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    with per_example(module, loss) as of:
        losses, found = of.gradients(batch)
    for row, expected in enumerate(alone):
        for gradients, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(gradients[row], gradient, rtol=1e-4, atol=1e-6)
    assert losses[3] == 0
    assert all(not each[3].any() for each in found), "a record without a target contributes nothing"
    assert any(each[0].any() for each in found)
