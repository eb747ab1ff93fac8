"""A trial of one record in every place finds what depends on place, neighbors or content."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from cotune.data.tasks.classes import IGNORED, Batch
from cotune.data.tasks.text import synthetic_rows
from cotune.models.synthetic_batches import feature_probes, mixes_records

Answer = Callable[[Batch], Sequence[Tensor]]


def scores(batch: Batch) -> Tensor:
    """16 inputs: every row of a batch begins at a multiple of 64 bytes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found: Tensor = nn.Linear(16, 3)(batch["features"])
    return found


def honest(batch: Batch) -> Sequence[Tensor]:
    return [functional.cross_entropy(scores(batch), batch["labels"], reduction="none", ignore_index=IGNORED)]


def centered(batch: Batch) -> Sequence[Tensor]:
    return [scores(batch) - scores(batch).mean(dim=0)]


def averaged_by_weight(batch: Batch) -> Sequence[Tensor]:
    """Every record counts by its share of the batch, as where a loss is averaged over the tokens of a batch."""
    return [scores(batch) / (batch["labels"] != IGNORED).sum()]


def by_place(batch: Batch) -> Sequence[Tensor]:
    return [scores(batch) * (1 + torch.arange(len(batch["labels"]))[:, None] * 2.0**-22)]


def by_parity(batch: Batch) -> Sequence[Tensor]:
    return [scores(batch) * (1 + torch.arange(len(batch["labels"]))[:, None] % 2 * 2.0**-22)]


def never_a_number(batch: Batch) -> Sequence[Tensor]:
    return [scores(batch) * torch.nan]


def told_by_the_loudest(batch: Batch) -> Sequence[Tensor]:
    """The same numbers, computed in another way where there is a long vector."""
    return [scores(batch).contiguous() if float(batch["features"].max()) < 100 else scores(batch) * 1.0]


def told_by_the_operation(batch: Batch) -> Sequence[Tensor]:
    """The same numbers, and as many operations of the same shapes."""
    found = scores(batch)
    return [found.mul(1.0) if float(batch["features"].max()) < 100 else found.div(1.0)]


@torch.library.custom_op("cotune_tests::grouped_scores", mutates_args=())
def grouped_scores(found: Tensor) -> Tensor:
    return found.clone()


def in_groups(batch: Batch) -> Sequence[Tensor]:
    """The same numbers by an operation on groups of rows, of which no one outside knows who is in them."""
    return [grouped_scores(scores(batch))]


def only_what_is_filled(batch: Batch) -> Sequence[Tensor]:
    """Blank rows are left out of the product, so that its shape depends on how many there are."""
    found = torch.zeros(len(batch["labels"]), 3)
    filled = batch["labels"] != IGNORED
    found[filled] = scores({"features": batch["features"][filled]})
    return [found]


def tried(answer: Answer) -> bool:
    return any(
        mixes_records(answer, feature_probes((16,), torch.arange(3), 16, torch.device("cpu"), number)) for number in range(2)
    )


def test_rows_that_are_computed_alike_pass() -> None:
    assert not tried(honest)


@pytest.mark.parametrize(
    "fault",
    [
        *(centered, averaged_by_weight, by_place, by_parity, never_a_number),
        *(told_by_the_loudest, told_by_the_operation, in_groups, only_what_is_filled),
    ],
)
def test_what_a_row_owes_to_others_is_found(fault: Answer) -> None:
    assert tried(fault)


def test_a_probe_is_in_every_slot_once() -> None:
    places = [place for _, held in feature_probes((33,), torch.arange(2), 16, torch.device("cpu"), 0) for place in held]
    assert sorted(places) == list(range(16))


@pytest.mark.parametrize("words", [1, 2, 5, 10, 11, 40])
def test_a_small_vocabulary_has_made_up_rows_too(words: int) -> None:
    """With fewer than eleven ordinary words the single token was none, and the model was refused."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(words))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    rows = synthetic_rows(tokenizer)
    assert len(rows) == 3
    assert all(row and set(row) <= set(range(2, 2 + words)) for row in rows)
