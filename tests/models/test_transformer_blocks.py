"""Which parameters the last transformer blocks are, in the encoders that are used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cotune.errors import ModelError
from cotune.models.config import LoraConfig
from cotune.models.trainable import TrainableModel
from cotune.models.transformer_blocks import block_of, last_blocks

Make = Callable[..., TrainableModel]
LAST = {  # of two blocks the last one
    "bert": "bert.encoder.layer.1.",
    "distilbert": "distilbert.transformer.layer.1.",
    "gpt2": "transformer.h.1.",
    "llama": "model.layers.1.",
    "roberta": "roberta.encoder.layer.1.",
}
AFTER = {"bert": ("bert.pooler.",), "gpt2": ("transformer.ln_f.",), "llama": ("model.norm.",)}


@pytest.mark.parametrize("kind", LAST)
def test_last_block_comes_with_what_follows_it_and_the_head(shared: Make, kind: str) -> None:
    model = shared(kind, pooling="native")
    names = model.names("blocks", layers=1)
    expected = (LAST[kind], *AFTER.get(kind, ()))
    everything = [name for name, _ in model.parameters()]
    assert names == [n for n in everything if n.startswith(expected) or not n.startswith(model.prefix)]
    assert any(name.startswith(LAST[kind]) for name in names)


@pytest.mark.parametrize("kind", LAST)
def test_all_blocks_are_full_training_but_for_embeddings(shared: Make, kind: str) -> None:
    model = shared(kind, pooling="native")
    blocks = model.names("blocks", layers=2)
    assert set(blocks) <= set(model.names("full"))
    assert {n for n in model.names("full") if block_of(n)} <= set(blocks)


def test_mean_pooling_is_no_block(shared: Make) -> None:
    """It stands after the last one, as a layer of its own, and is never trained."""
    names = shared("bert", pooling="mean").names("blocks", layers=1)
    assert {block_of(name) for name in names} == {("bert.encoder.layer.", 1), None}


def test_blocks_are_named_alike_with_adapters_beside(shared: Make) -> None:
    plain = shared("bert").names("blocks", layers=1)
    assert shared("bert", lora=LoraConfig(rank=2)).names("blocks", layers=1) == plain


def test_encoder_and_decoder_have_blocks_of_their_own() -> None:
    names = [f"{stack}.block.{i}.w" for stack in ("encoder", "decoder") for i in range(3)]
    found = last_blocks(["shared.weight", *names[:3], "encoder.norm.w", *names[3:], "decoder.embed_norm.w"], 2)
    assert found == ["encoder.block.1.w", "encoder.block.2.w", "encoder.norm.w", "decoder.block.1.w", "decoder.block.2.w"]


@pytest.mark.parametrize(
    ("names", "layers", "declared", "code"),
    [
        (["a.layer.0.w", "a.layer.1.w"], 3, 2, "model.too_many_blocks"),
        (["a.w"], 1, None, "model.too_many_blocks"),
        (["albert.groups.0.w"], 1, 12, "model.shared_blocks"),
    ],
)
def test_blocks_that_are_not_there_are_refused(names: list[str], layers: int, declared: int | None, code: str) -> None:
    with pytest.raises(ModelError) as refused:
        last_blocks(names, layers, declared)
    assert refused.value.code == code
