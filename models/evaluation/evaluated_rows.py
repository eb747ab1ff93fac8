"""The rows in which records are read where answers are wanted: one each, or several where a task reads long records in parts.

The answer of a record is that of the row which is surest of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

from torch import Tensor

from cotune.data.tasks.question import QuestionAnswering
from cotune.data.tasks.task import Target
from cotune.data.tasks.text import Example
from cotune.data.types import Input
from cotune.models.base.load import LoadedModel

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class EvaluatedRows:
    """Rows of records.

    Attributes:
        examples: What the task's collator takes, for each row.
        records: Of each row, the number of its record.
    """

    examples: list[Example]
    records: list[int]

    @classmethod
    def of(cls, loaded: LoadedModel, inputs: Sequence[Input], targets: Sequence[Target]) -> EvaluatedRows:
        """Return the rows of some records, in their order; for the arguments see `Task.examples`."""
        task = loaded.task
        if isinstance(task, QuestionAnswering):
            parts = task.windows(loaded.reader, loaded.max_length, inputs)
        else:
            parts = [[example] for example in task.examples(loaded.reader, loaded.max_length, inputs, targets)]
        return cls([each for part in parts for each in part], [number for number, part in enumerate(parts) for _ in part])

    @cached_property
    def are_records(self) -> bool:
        """Whether each record has one row."""
        return len(set(self.records)) == len(self.records)


@dataclass
class SurestAnswers(Generic[Answer]):
    """The answer of each record, from those of its rows."""

    rows: EvaluatedRows
    _found: dict[int, tuple[tuple[float, int], Answer]] = field(default_factory=dict)

    def offer(self, loaded: LoadedModel, rows: Sequence[int], scores: Tensor, answers: Sequence[Answer]) -> None:
        """Keep the answers of some rows, each unless another row of its record is surer; of equals, the first counts.

        Args:
            loaded: What has answered.
            rows: Their numbers.
            scores: As of `Task.scores`, of as many rows.
            answers: As many.
        """
        sure = [0.0] * len(rows)
        if not self.rows.are_records and isinstance(loaded.task, QuestionAnswering):
            sure = loaded.task.sureness(scores, [self.rows.examples[row] for row in rows])
        for row, sureness, answer in zip(rows, sure, answers, strict=True):
            record = self.rows.records[row]
            if record not in self._found or (sureness, -row) > self._found[record][0]:
                self._found[record] = ((sureness, -row), answer)

    def in_order(self) -> list[Answer]:
        """Return them in the order of the records."""
        return [answer for _, (_, answer) in sorted(self._found.items(), key=lambda each: each[0])]
