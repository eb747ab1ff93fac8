"""Classifiers that read the vector of the last end token, such as BART's: each row of a batch has exactly one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel

from cotune.data.tasks.classes import example_losses
from cotune.data.tasks.task import get_task
from cotune.models.base.load import load_model
from cotune.models.config import ModelConfig
from tests.support.architectures import ending_tokenizer
from tests.support.failures import fails_with
from tests.support.tiny_models import VOCABULARY

SIZE = {"vocab_size": len(VOCABULARY), "d_model": 16, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
KINDS = {
    "BartConfig": {**SIZE, **BART, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 24},
    "MBartConfig": {**SIZE, **BART, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 24},
    "T5Config": {**SIZE, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_spells_the_end_token_stops_nobody(tmp_path: Path, kind: str) -> None:
    """Such a text has several, and ended the round where it was held."""
    torch.manual_seed(0)
    AutoModel.from_config(getattr(transformers, kind)(**KINDS[kind])).save_pretrained(tmp_path)
    ending_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(base=str(tmp_path), max_length=16), ("bad", "good"), 1)
    task = get_task("sequence-classification")
    end = 3
    word = VOCABULARY[3]
    texts = ["good film", f"good {word} film {word}", word, "film " * 40]
    examples = task.examples(loaded.reader, loaded.max_length, texts, [1, 1, 0, 0])
    examples += [{"input_ids": [5, end, 6, end, 7], "labels": 1}]
    collate = task.collator(loaded.module, loaded.reader, torch.device("cpu"))
    batch = collate(examples)
    rows = [row[seen.bool()].tolist() for row, seen in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert [row.count(end) for row in rows] == [1] * len(examples)
    assert all(row[-1] == end and len(row) <= loaded.max_length for row in rows)
    assert rows[-1] == [5, 6, 7, end]
    losses = example_losses(loaded.module, batch)
    alone = torch.cat([example_losses(loaded.module, collate([example])) for example in examples])
    torch.testing.assert_close(losses, alone, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_that_ends_no_text_with_it_is_refused(tmp_path: Path) -> None:
    """It would end the round everywhere."""
    config = transformers.BartConfig(**{**KINDS["BartConfig"], "eos_token_id": 5})
    AutoModel.from_config(config).save_pretrained(tmp_path)
    ending_tokenizer().save_pretrained(tmp_path)
    with fails_with("model.unusable_tokenizer", "5"):
        load_model(ModelConfig(base=str(tmp_path), max_length=16), ("bad", "good"), 1)
