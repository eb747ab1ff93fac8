"""What models write after the prompts of some test records, beside what those hold: figures, and a few texts to read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from cotune.data.dataset import Dataset
from cotune.data.inputs.chat_wording import wording_of
from cotune.data.metrics.text_metrics import check_text_metrics, compare_texts
from cotune.data.types import Chat, Passage
from cotune.models.generation import write_texts
from cotune.models.trainable import State, TrainableModel
from cotune.plan.plan import Plan

_SHOWN = 10  # records whose texts are shown
_MOST_CHARACTERS = 600  # of a text that is shown
BASE = "base"
FEDERATED = "federated"
FIRST_SENTENCE = "first_sentence"


@dataclass(frozen=True)
class WritingTest:
    """Some records of a test set, to write the targets of.

    Attributes:
        plan: Says how many records, and how long texts may become.
        model: Of the plan.
        records: Prompts with the targets that should be written, or chats with their last answer.
    """

    plan: Plan
    model: TrainableModel
    records: tuple[Passage | Chat, ...]

    @classmethod
    def of(cls, plan: Plan, model: TrainableModel, test: Dataset) -> Self | None:
        """Return the test of generated texts that a plan asks for; None if it asks for none.

        Args:
            plan: Its seed draws the records.
            model: Of the plan.
            test: The common test set.

        Raises:
            DataError: If the libraries for the metrics are not installed.
        """
        if plan.generate is None:
            return None
        check_text_metrics()
        given = test.inputs()
        chosen = np.random.default_rng(plan.seed).permutation(len(given))[: plan.generate.examples]
        return cls(plan, model, tuple(each for row in sorted(chosen.tolist()) if isinstance(each := given[row], Passage | Chat)))

    def describe(self, states: Mapping[str, Sequence[State]]) -> dict[str, Any]:
        """Return `written` of summary.json.

        Args:
            states: Column -> models on top of the base model; their figures are averaged.
        """
        assert self.plan.generate is not None
        told = {name: [self._write(state) for state in each] for name, each in states.items()}
        usable = [i for i, text in enumerate(next(iter(told.values()))[0]) if text is not None]
        if not usable:
            return {**self._about(0), "figures": {}, "shown": []}
        lead: list[list[str | None]] = [[first_sentence(self._last_prompt(each)) for each in self.records]]
        texts: dict[str, list[list[str | None]]] = {FIRST_SENTENCE: lead, **told}
        return {
            **self._about(len(usable)),
            "figures": {name: self._figures(each, usable) for name, each in texts.items()},
            "shown": [self._shown(row, texts) for row in usable[:_SHOWN]],
        }

    def _last_prompt(self, record: Passage | Chat) -> str:
        return record.prompt if isinstance(record, Passage) else wording_of(self.plan.data).prompt_of(record)

    def _about(self, used: int) -> dict[str, Any]:
        assert self.plan.generate is not None
        most = self.plan.generate.max_new_tokens
        return {"examples": used, "left_out": len(self.records) - used, "max_new_tokens": most}

    def _write(self, state: State) -> list[str | None]:
        assert self.plan.generate is not None
        self.model.load(state)
        return write_texts(self.model, self.records, self.plan.generate.max_new_tokens, self.plan.model.precision)

    def _figures(self, texts: Sequence[Sequence[str | None]], usable: Sequence[int]) -> dict[str, float]:
        """The mean over the models of a column."""
        references = [_target(self.records[row]).strip() for row in usable]
        each = [compare_texts(references, [text[row] or "" for row in usable]).as_dict() for text in texts]
        return {key: sum(table[key] for table in each) / len(each) for key in each[0]}

    def _shown(self, row: int, texts: Mapping[str, Sequence[Sequence[str | None]]]) -> dict[str, str]:
        record = self.records[row]
        columns = {name: texts[name][0][row] or "" for name in (BASE, FEDERATED) if name in texts}
        cells = {"prompt": _prompt(record), "target": _target(record), **columns}
        return {name: _cut(text.strip()) for name, text in cells.items()}


def _prompt(record: Passage | Chat) -> str:
    """As people read it: of a chat a line for each message."""
    if isinstance(record, Passage):
        return record.prompt
    return "\n".join(f"{role}: {content}" for role, content in record.asked)


def _target(record: Passage | Chat) -> str:
    return record.target if isinstance(record, Passage) else record.answer or ""


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, which often sums it up: what a model must beat to be of use.

    >>> first_sentence("It reads files. It writes them, too.")
    'It reads files.'
    """
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
