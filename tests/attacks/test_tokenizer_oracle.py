"""Attack: a tokenizer that answers "does any record hold this word?".

The base model's hash covered its weights alone. One more line in tokenizer.json, a word with a number beyond the embedding
table, made exactly those sites fail that held the word, before anything was charged. Now the hash is of everything that decides
what a record becomes, and a number beyond the table is refused when the model is loaded: by every site, whatever it holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.models.base import ModelConfig, find_base, load_model
from cotune.models.errors import ModelError

LABELS = ("bad", "good", "so")
WORD = "newdrug"


@pytest.fixture
def asking(base_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the base model whose tokenizer knows one more word, beyond the table."""
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "asking"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    content["model"]["vocab"][WORD] = rows + 5
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_changed_tokenizer_is_another_base_model(base_model: Callable[[str], Path], asking: Path) -> None:
    honest = find_base(ModelConfig(base=str(base_model("bert"))))
    assert find_base(ModelConfig(base=str(asking))).content_hash != honest.content_hash
    with pytest.raises(ModelError):
        find_base(ModelConfig(base=str(asking), base_hash=honest.content_hash))


def test_a_word_beyond_the_table_is_refused_before_any_record_is_read(asking: Path) -> None:
    """No record takes part in this: whether one holds the word cannot show."""
    with pytest.raises(ModelError):
        load_model(ModelConfig(base=str(asking), max_length=16), LABELS, 1)
