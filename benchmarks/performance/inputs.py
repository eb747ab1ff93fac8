"""What several benchmarks compute on: made-up texts, and an encoder that costs next to nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tomli_w

NARROW = Path(__file__).parents[1] / "tweets-narrow.toml"  # a plan
WORDS = [f"w{number}" for number in range(100)]


def write_encoder(folder: Path, width: int) -> Path:
    """Write a bert without layers: the mean of its word embeddings is a dense feature of `width` numbers.

    Its frozen parameters are few, so that what is measured is not the handling of a large encoder.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def bare_encoder(model: Any) -> Any:
    """Return the encoder of a model's folder as anybody loads it: without the layer by which cotune's models take the mean."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(model.loaded.folder.path, add_pooling_layer=False).eval()


def write_records(file: Path, records: int, classes: int = 10, seed: int = 0) -> Path:
    """Write texts of eight words, two of which come from a tenth of the words that is more likely for their class."""
    rng = random.Random(seed)
    own = max(1, len(WORDS) // classes)
    rows = ["text,label"]
    for number in range(records):
        label = number % classes
        words = [*rng.choices(WORDS, k=6), *rng.choices([WORDS[(label * own + i) % len(WORDS)] for i in range(own)], k=2)]
        rows.append(f"{' '.join(words)},c{label}")
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def write_plan(file: Path, **tables: Any) -> Path:
    """Write a plan as TOML."""
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return file


def tweets(count: int) -> list[str]:
    """Return a given number of distinct tweets, sampled evenly from the data set of the preset `tweets`."""
    from cotune import load_plan
    from cotune.data.record_reading import read_records

    found = list(dict.fromkeys(read_records(load_plan("tweets").data).inputs))
    step = max(1, len(found) // count)
    return [str(text) for text in found[::step][:count]]
