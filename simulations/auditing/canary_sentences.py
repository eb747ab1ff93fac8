"""Canary sentences: made-up texts among an organization's own, by which it shows what a model learns by heart.

Each is a few words of the organization's texts, drawn at random, so that nothing but the sentence itself can teach it. Half of
them are in, by coins. Afterwards each is ranked among sentences that were drawn in the same way and never trained on: its
*exposure* (Carlini et al., "The Secret Sharer", USENIX Security 2019, definition 7, https://arxiv.org/abs/1802.08232) is
log2(R + 1) − log2(rank), R being the number of those. A model that has learnt nothing of a sentence gives it a uniform rank, and
an exposure of 1.44 bits on average; log2(R + 1) says that nothing else is as likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cotune.data.dataset import Dataset
from cotune.data.inputs.chat_wording import ChatWording
from cotune.data.records import Records
from cotune.data.types import Chat, Input, Passage
from cotune.errors import DataError
from cotune.privacy.auditing.canaries import Coins

Losses = np.ndarray[Any, np.dtype[np.float64]]

_ASKED = 4  # words
_WRITTEN = 8  # words: more of them than a model could guess
_SPARE = 4  # times as many sentences as are wanted must be possible: else most that are drawn are there already
_SOURCE = "canary sentences"
_NO_WORDS = ChatWording()


def can_hold_sentences(dataset: Dataset) -> bool:
    """Whether the records are texts that a model learns to write."""
    return any(isinstance(given, Passage | Chat) for given in dataset.inputs()[:1])


def draw_sentences(
    dataset: Dataset, count: int, generator: np.random.Generator, wording: ChatWording = _NO_WORDS
) -> tuple[Input, ...]:
    """Draw different made-up records of the kind that a data set has, none of which it holds.

    Args:
        dataset: With at least one text.
        count: How many.
        generator: That decides them.
        wording: What the plan says in each chat.

    Raises:
        DataError: The texts have too few different words.
    """
    inputs = dataset.inputs()
    words = sorted({word for given in inputs for text in _texts(given) for word in text.split()})
    asks = any(not isinstance(given, Passage) or given.prompt for given in inputs)
    length = _WRITTEN + asks * _ASKED
    held = set(inputs)
    if len(words) ** length < _SPARE * (count + len(held)):
        raise DataError(
            f"the texts have {len(words)} different words, too few for {count:,} different canary sentences of {length} words:"
            " expected more words, or an audit without such sentences (--sentences 0)",
            code="data.too_few_words",
        )
    found: dict[Input, None] = {}
    while len(found) < count:
        drawn = [words[i] for i in generator.integers(len(words), size=_ASKED + _WRITTEN)]
        made = _make(inputs[0], wording, " ".join(drawn[:_ASKED]) if asks else "", " ".join(drawn[_ASKED:]))
        if made not in held:
            found[made] = None
    return tuple(found)


def _texts(given: Input) -> Sequence[str]:
    if isinstance(given, Chat):
        return given.own or [content for _, content in given.messages]
    return [given.prompt, given.target] if isinstance(given, Passage) else []


def _make(like: Input, wording: ChatWording, asked: str, written: str) -> Input:
    return wording.ask(asked, written) if isinstance(like, Chat) else Passage(asked, written)


def add_sentences(dataset: Dataset, sentences: Sequence[Input]) -> Dataset:
    """Return a data set with further records behind its own, each a unit by itself.

    Args:
        dataset: Of units that are known by names or are single records.
        sentences: The records.
    """
    label = dataset.held_labels[0]
    names = tuple(f"{_SOURCE} {number}" for number in range(len(sentences)))
    added = Records(tuple(sentences), (label,) * len(sentences), _SOURCE, units=names)
    return replace(dataset, parts=(*dataset.parts, (added, np.arange(len(sentences)))))


def only_sentences(dataset: Dataset, sentences: Sequence[Input]) -> Dataset:
    """Return a data set of the same kind that holds these records alone."""
    added = add_sentences(dataset, sentences)
    return replace(added, parts=added.parts[-1:])


def number_units(dataset: Dataset, own: int) -> list[int]:
    """Return which of a data set's units are the sentences behind its own records, in the order of the sentences.

    Args:
        dataset: As of `add_sentences`.
        own: How many records it had before.
    """
    places = {unit[0] - own: number for number, unit in enumerate(dataset.units) if unit[0] >= own}
    return [places[sentence] for sentence in sorted(places)]


@dataclass(frozen=True)
class Memorization:
    """What a trained model knows of the canary sentences.

    Attributes:
        planted: How many sentences were in.
        held_out: How many were not.
        references: How many others each was ranked among.
        exposure: Mean exposure of those that were in, in bits.
        highest: Of them.
        exposure_held_out: Mean exposure of those that were not in: what knowing nothing looks like.
        most: Upper limit of the exposure for this number of references, in bits.
    """

    planted: int
    held_out: int
    references: int
    exposure: float
    highest: float
    exposure_held_out: float
    most: float


def measure_memorization(losses: Losses, present: Coins, references: Losses) -> Memorization:
    """Compare sentences with others that were drawn in the same way.

    Args:
        losses: (m,), of each sentence under the trained model.
        present: (m,), whether each was in; at least one was, and one was not.
        references: (R,), of the others.
    """
    exposures = find_exposures(losses, references)
    return Memorization(
        planted=int(present.sum()),
        held_out=int((~present).sum()),
        references=len(references),
        exposure=float(exposures[present].mean()),
        highest=float(exposures[present].max()),
        exposure_held_out=float(exposures[~present].mean()),
        most=float(np.log2(len(references) + 1)),
    )


def find_exposures(losses: Losses, references: Losses) -> Losses:
    """Return log2(R + 1) − log2(rank) of each loss among R others and itself; equal ones rank before it.

    >>> find_exposures(np.array([0.5, 2.5]), np.array([1.0, 2.0, 3.0])).round(3).tolist()
    [2.0, 0.415]
    """
    ranks = 1 + np.searchsorted(np.sort(references), losses, side="right")
    found: Losses = np.log2(len(references) + 1) - np.log2(ranks)
    return found
