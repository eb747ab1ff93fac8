"""One long record changes the features of others.

Features were computed sorted by length, in batches of 64 padded to the longest, under bfloat16 autocast. One record of 128 tokens
beside 199 of 10 changed those of 63 others by 5e-3 (relative), and one of 16 tokens sufficed. By choosing the head, a server made
of it a sensitivity of 46 clip norms, where clipping promises 1; end to end, at a claimed ε = 1, the two worlds' updates lay 12
standard deviations apart.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from cotune.models.features.cached import get_features
from cotune.models.trainable import TrainableModel
from tests.support.tiny_models import VOCABULARY, tokenizer

WORDS = [word for word in VOCABULARY if not word.startswith("[")]
LONGEST = 128


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TrainableModel:
    """A BERT that is wide enough for kernels to choose by shape."""
    from transformers import AutoModel, BertConfig

    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=LONGEST,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("bert")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    loaded = load_model(ModelConfig(base=str(folder), max_length=LONGEST, pooling="mean"), ("bad", "good"), 1)
    return TrainableModel(loaded, None, 1, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [16, LONGEST])
def test_a_long_record_leaves_the_features_of_others_alone(
    encoder: TrainableModel, tokens: int, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path))
    rng = random.Random(0)
    others = [" ".join(rng.choices(WORDS, k=10)) for _ in range(199)]
    encoder.load({})
    without = get_features(encoder, others, {}, precision)
    beside = get_features(encoder, [*others, " ".join(rng.choices(WORDS, k=tokens))], {}, precision)
    assert int((beside[:-1] != without).any(dim=1).sum()) == 0
