"""Models of an encoder and a decoder: what a record becomes, its loss against transformers' own, and what padding reaches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.task import get_task
from cotune.data.types import Passage
from cotune.models.base.load import LoadedModel, load_model
from cotune.models.config import ModelConfig
from tests.support.language_models import dialogs
from tests.support.paired_models import PAIRED, paired_model

__all__ = ["paired_model"]  # fixtures
TASK = get_task("seq2seq")
END = 3
CPU = torch.device("cpu")
Loaded = Callable[..., LoadedModel]


@pytest.fixture
def loaded(paired_model: Callable[[str], Path]) -> Loaded:
    def make(kind: str = "bart") -> LoadedModel:
        return load_model(ModelConfig(base=str(paired_model(kind)), max_length=16, precision="float32"), (), 3, "seq2seq")

    return make


def passages(count: int = 6) -> list[Passage]:
    return [Passage(record["prompt"] + "\n", record["target"]) for record in dialogs(count)]


def test_labels_are_the_tokens_of_the_target_with_its_end(loaded: Loaded) -> None:
    model = loaded()
    (example,) = TASK.examples(model.reader, 16, [Passage("the day\n", "great road")], [0])
    assert example["input_ids"] == model.reader("the day")["input_ids"]
    assert example["labels"] == model.reader("great road")["input_ids"]
    assert example["labels"][-1] == END
    batch = TASK.collator(model.module, model.reader, CPU)([example])
    assert batch["decoder_input_ids"].tolist() == [[3, *example["labels"][:-1]]], "behind the start token, one place later"


def test_prompts_and_targets_are_cut_by_themselves(loaded: Loaded) -> None:
    model = loaded()
    records = [Passage("the " * 20, "day"), Passage("the", "day " * 20), Passage("the", "day")]
    examples = TASK.examples(model.reader, 8, records, [0] * 3)
    assert [(len(each["input_ids"]), len(each["labels"])) for each in examples] == [(8, 2), (2, 8), (2, 2)]
    assert (TASK.cut(model.reader, 8, records), TASK.lost(model.reader, 8, records)) == (2, 0)
    assert [TASK.bucket(each, 8) for each in examples] == [8, 8, 8]


@pytest.mark.parametrize("kind", PAIRED)
def test_losses_are_those_of_transformers_one_record_at_a_time(loaded: Loaded, kind: str) -> None:
    model = loaded(kind)
    examples = TASK.examples(model.reader, 16, passages(), [0] * 6)
    collate = TASK.collator(model.module, model.reader, CPU)
    together = TASK.losses(model.module, collate(examples, 16, 8))
    for example, loss in zip(examples, together, strict=False):
        ids = torch.tensor([example["input_ids"]])
        expected = model.module(input_ids=ids, labels=torch.tensor([example["labels"]])).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert together[6:].tolist() == [0.0, 0.0], "slots without a record"


@pytest.mark.parametrize("kind", PAIRED)
def test_what_is_padded_reaches_nothing_to_the_bit(loaded: Loaded, kind: str) -> None:
    """In one shape a record's losses are the same, whatever stands beside it and behind its target."""
    model = loaded(kind)
    examples = TASK.examples(model.reader, 16, passages(6), [0] * 6)
    collate = TASK.collator(model.module, model.reader, CPU)
    alone = TASK.losses(model.module, collate(examples[:1], 16, 8))[0]
    beside = TASK.losses(model.module, collate(examples, 16, 8))[0]
    assert torch.equal(alone, beside)
    batch = collate(examples[:1], 16, 8)
    behind = batch["labels"][0] == IGNORED
    batch["decoder_input_ids"][0, 1:][behind[1:]] = 7
    assert torch.equal(TASK.losses(model.module, batch)[0], alone)
