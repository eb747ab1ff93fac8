"""Heads of several tasks on one encoder: what classifiers of texts and of words have in common, and what one kind alone has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel

from cotune.models.config import ModelConfig
from cotune.models.multi_head import load_multi_task
from tests.support.architectures import ending_tokenizer
from tests.support.failures import fails_with
from tests.support.tiny_models import VOCABULARY

LABELS = ("words/B", "words/O", "mood/bad", "mood/good")
T5 = {"vocab_size": len(VOCABULARY), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def load(folder: Path, tags: tuple[str, ...] = ("words",), **config: Any) -> Any:
    return load_multi_task(ModelConfig(base=str(folder), max_length=16, **config), LABELS, 1, "multi-task-tags", tags).module


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_the_shared_encoder_is_the_one_with_all_parts(base_model: Callable[[str], Path], kind: str) -> None:
    """BERT's pooler is of texts alone: it is shared, although the first task has none, and not a part of that task's model."""
    module = load(base_model(kind))
    assert module.tasks == ("words", "mood")
    of_words = {name for name, _ in module.classifier("words").named_parameters()}
    of_texts = {name for name, _ in module.classifier("mood").named_parameters()}
    assert any("pooler" in name for name in of_texts) == (kind == "bert")
    assert not any("pooler" in name for name in of_words)
    shared = dict(module.classifier("mood").named_parameters())
    assert all(shared[name] is own for name, own in module.classifier("words").named_parameters() if name.startswith(f"{kind}."))


def test_scores_of_a_text_stand_at_every_position(base_model: Callable[[str], Path]) -> None:
    module = load(base_model("bert"))
    tokens = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    scores = module(input_ids=tokens, attention_mask=(tokens != 0).long()).logits
    assert scores.shape == (2, 4, 4)
    assert torch.equal(scores[:, :, 2:], scores[:, :1, 2:].expand(-1, 4, -1))
    assert not torch.equal(scores[:, 0, :2], scores[:, 1, :2])


def test_unlike_encoders_are_refused(tmp_path: Path) -> None:
    """T5 classifies texts by encoder and decoder, and words by its encoder alone."""
    config = transformers.T5Config(**T5, pad_token_id=0, eos_token_id=3, decoder_start_token_id=3)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    ending_tokenizer().save_pretrained(tmp_path)
    with fails_with("model.no_shared_encoder", "t5"):
        load(tmp_path)
