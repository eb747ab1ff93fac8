"""What a student that writes texts learns from: encoded records, the teachers that read the same tokens, and figures on some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cotune.data.tasks.classes import IGNORED
from cotune.data.tasks.text import Example
from cotune.data.tasks.token_losses import has_plain_output
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.token_distillation import TokenStates, add_token_gradients, compare_tokens, read_states
from cotune.models.device import autocasts
from cotune.models.evaluation.intervals import TextAnswers
from cotune.models.trainable import TrainableModel

_MOST_TOKENS = 2**12  # of a batch, padding included: what activations take
_MOST_SCORES = 2**25  # entries of a batch's scores, of an architecture whose scores are made all at once


class SequenceLessons:
    """Records with targets, and the models that read them.

    All models give their tokens the same numbers, and read as many of them. Dropout is off in all.
    """

    def __init__(
        self,
        student: TrainableModel,
        teachers: Sequence[TrainableModel],
        examples: Sequence[Example],
        config: DistillationConfig,
        weights: Sequence[float] = (),
    ) -> None:
        """Create them.

        Args:
            student: That learns, in whatever state it is.
            teachers: That it learns from.
            examples: Encoded records; each has a target.
            config: How it learns.
            weights: Of the teachers' probabilities, together 1; empty: all alike.
        """
        self._weights = weights
        self._examples = examples
        self._config = config
        self._student = student
        self._teachers = teachers
        models = [student, *teachers]
        self._collate = [m.loaded.task.collator(m.module, m.loaded.reader, m.device) for m in models]
        self._most_scores = min((_MOST_SCORES // _vocabulary(m) for m in models if not has_plain_output(m.module)), default=None)

    def add_gradients(self, rows: Sequence[int]) -> bool:
        """Add the gradients of the mean loss of some records, each the mean over its own target tokens, to the student's.

        Returns:
            Whether there is such a loss: there always is.
        """
        for chosen in self._batches(rows):
            counts = torch.tensor([len(_targets(self._examples[row])) for row in chosen], device=self._student.device)
            weights = (1 / (counts * len(rows))).repeat_interleave(counts)
            with self._arithmetic():
                student, tokens = self._read(0, chosen)
                taught = [] if self._config.label_weight == 1 else self._taught(chosen)
                add_token_gradients(student, taught, tokens, weights, self._config, self._weights)
        return True

    @torch.no_grad()
    def measure(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return how the student, as it is, and its teachers predict the target tokens of some records.

        Returns:
            `student` and `teacher`: loss in nats per token, perplexity and accuracy, with intervals; `agreement`, the share of
            tokens for which both have the same most probable one; `kl`, the mean KL(teacher ‖ student) in nats per token.
        """
        sums: dict[int, dict[str, float]] = {}
        for chosen in self._batches(rows):
            with self._arithmetic():
                student, tokens = self._read(0, chosen)
                figures = compare_tokens(student, self._taught(chosen), tokens, self._weights)
            counts = [len(_targets(self._examples[row])) for row in chosen]
            split = {key: torch.split(values, counts) for key, values in figures.items()}
            for place, row in enumerate(chosen):
                sums[row] = {"tokens": counts[place], **{key: float(parts[place].sum()) for key, parts in split.items()}}
        columns = {key: np.array([sums[row][key] for row in rows]) for key in sums[rows[0]]}
        tokens_in_all = columns["tokens"].sum()
        return {
            **{who: _answers(columns, who).figures() for who in ("teacher", "student")},
            **{key: float(columns[key].sum() / tokens_in_all) for key in ("agreement", "kl")},
        }

    def _batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Rows of like lengths that fit into memory together; shapes follow the records, as these are public."""
        left = sorted(rows, key=lambda row: (-_length(self._examples[row]), row))
        while left:
            longest = _length(self._examples[left[0]])
            most = _MOST_TOKENS if self._most_scores is None else min(_MOST_TOKENS, self._most_scores)
            size = max(1, most // longest)
            yield left[:size]
            left = left[size:]

    def _read(self, number: int, rows: Sequence[int]) -> tuple[TokenStates, Tensor]:
        """What a model (0: the student) says of the records' target tokens, and those tokens."""
        batch = self._collate[number]([self._examples[row] for row in rows])
        module = self._student.module if number == 0 else self._teachers[number - 1].module
        labels = batch["labels"]
        return read_states(module, batch), labels[labels != IGNORED]

    @torch.no_grad()
    def _taught(self, rows: Sequence[int]) -> list[TokenStates]:
        return [self._read(number, rows)[0] for number in range(1, len(self._teachers) + 1)]

    def _arithmetic(self) -> AbstractContextManager[Any]:
        device = self._student.device
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts("auto", device))


def has_target(example: Example) -> bool:
    """Whether an encoded record has any target token."""
    return bool(_targets(example))


def _targets(example: Example) -> list[int]:
    return [label for label in example["labels"] if label != IGNORED]


def _length(example: Example) -> int:
    return max(len(example["input_ids"]), len(example["labels"]))


def _vocabulary(model: TrainableModel) -> int:
    module: Any = model.module
    return int(module.get_output_embeddings().weight.shape[0])


def _answers(columns: dict[str, np.ndarray[Any, Any]], who: str) -> TextAnswers:
    tokens, right = (columns[key].astype(np.int64) for key in ("tokens", f"{who}_right"))
    return TextAnswers(columns[who], tokens, right, np.arange(len(tokens)))
