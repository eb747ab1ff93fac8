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
from typing import Any

import pytest

from cotune.client.site import Site
from cotune.client.training.round import train_round
from cotune.errors import ModelError
from cotune.models.base.load import load_model
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.models.trainable import State
from cotune.plan.plan import Plan

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


def test_token_beyond_the_table_is_refused_before_reading(asking: Path) -> None:
    """No record takes part in this: whether one holds the word cannot show."""
    with pytest.raises(ModelError):
        load_model(ModelConfig(base=str(asking), max_length=16), LABELS, 1)


def test_sites_with_and_without_the_token_refuse_alike(
    asking: Path,
    records: Path,
    make_plan: Callable[..., Plan],
    make_site: Callable[..., Site],
    state_for: Callable[[Plan, int], State],
) -> None:
    lines = records.read_text(encoding="utf-8").splitlines()
    records.write_text("\n".join([*lines, f"the {WORD} is great,good"]) + "\n", encoding="utf-8")
    count = len(lines) - 1
    private: dict[str, Any] = {"epsilon": 8.0, "clip_norm": 1.0}
    state = state_for(make_plan(privacy=private), 1)
    plan = make_plan(privacy=private, model={"base": str(asking)})
    refused = []
    for name, rows in (("with", range(1, count + 1)), ("without", range(count))):
        site = make_site(name, rows=rows)
        with pytest.raises(ModelError) as error:
            train_round(plan, site, 1, state)
        refused.append((type(error.value), str(error.value)))
        assert not site.ledger_file.exists()
    assert refused[0] == refused[1]
