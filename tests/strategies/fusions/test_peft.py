"""Fusions of adapters against peft's own `add_weighted_adapter`, on real layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel

from cotune.models.adapters.lora import get_adapters
from cotune.strategies.aggregator import Aggregator
from cotune.strategies.registry import get_builtin_components
from cotune.strategies.types import RoundContext, Update

RANKS = (2, 4, 3)
COUNTS = (1, 2, 5)
RANK = 4
ALPHA = 6.0
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"]}


def organizations(folder: Path, kind: str) -> Any:
    """A peft model with one adapter for each organization, "0", "1" …, of its own rank and random; their scales are the same."""
    scale = ALPHA / RANK
    configs = [
        LoraConfig(r=r, lora_alpha=scale * r, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2") for r in (RANK, *RANKS)
    ]
    model: Any = get_peft_model(AutoModel.from_pretrained(folder), configs[0])  # "default": what everybody received
    for i, config in enumerate(configs[1:]):
        model.add_adapter(str(i), config)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=rng))
    return model


def next_state(model: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the received state, the next one) by the fusion `name`."""
    own = {n.replace(".base_layer.", "."): p.detach() for n, p in model.base_model.model.named_parameters()}
    adapters = get_adapters(model.base_model.model)
    state = {n: own[n] for adapter in adapters for n in (adapter.a, adapter.b, adapter.weight)}
    driver = Aggregator(
        (get_builtin_components("weighting")["examples"], {"cap": 0}),
        (get_builtin_components("fusion")[name], get_builtin_components("fusion")[name].check({})),
        RoundContext(state=state, adapters=adapters),
    )
    for i, (rank, count) in enumerate(zip(RANKS, COUNTS, strict=True)):
        delta = {}
        for adapter in adapters:
            delta[adapter.a] = own[adapter.a.replace("default", str(i))].double() - state[adapter.a][:rank]
            delta[adapter.b] = own[adapter.b.replace("default", str(i))].double() - state[adapter.b][:, :rank]
        driver.add(Update(str(i), 1, delta, examples=count, steps=1))
    return state, {n: state[n].double() + d for n, d in driver.result().delta.items()}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own, with newer transformers
@pytest.mark.parametrize(("fusion", "combination"), [("flora", "cat"), ("flexlora", "svd")])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_peft_agrees(base_model: Callable[[str], Path], kind: str, fusion: str, combination: str) -> None:
    model = organizations(base_model(kind), kind)
    layers = dict(model.base_model.model.named_modules())
    shares = [count / sum(COUNTS) for count in COUNTS]
    model.add_weighted_adapter([str(i) for i in range(3)], shares, "merged", combination_type=combination, svd_rank=RANK)
    state, new = next_state(model, fusion)
    adapters = get_adapters(model.base_model.model)
    assert len(adapters) == 2 * len(TARGETS[kind])
    for adapter in adapters:
        expected = layers[adapter.weight.removesuffix(".weight")].get_delta_weight("merged").double()
        product = adapter.scale * new[adapter.b] @ new[adapter.a]
        got = (
            (product.T if adapter.transposed else product)
            + new.get(adapter.weight, state[adapter.weight])
            - state[adapter.weight]
        )
        assert adapter.transposed == (kind == "gpt2")
        assert float((got - expected).norm() / expected.norm()) < 1e-6
