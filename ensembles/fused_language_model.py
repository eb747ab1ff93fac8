"""A fused language model: it writes, and is judged, by the weighted mean of its members' probabilities of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cotune.data.config import TaskName
from cotune.data.inputs.batching import sorted_batches
from cotune.data.readers.sources import check_new
from cotune.data.records import Records
from cotune.data.tasks.classes import IGNORED
from cotune.data.types import Chat, Passage
from cotune.ensembles.calibration import Floats, Numbers
from cotune.ensembles.text_fusion import check_tokenizers, no_targets_error, smallest_table
from cotune.ensembles.token_distillation import mean_logs, read_states, score_parts
from cotune.models.base.folder import member_folder
from cotune.models.base.fused_folder import read_fusion_document, write_fused_folder
from cotune.models.config import TextMethod
from cotune.models.evaluation.intervals import TextAnswers
from cotune.models.evaluation.language_model import open_language_model
from cotune.models.evaluation.predictor import folder_of, unit_numbers
from cotune.models.generation import write_after
from cotune.models.trainable import TrainableModel

_BATCH = 16


@dataclass(frozen=True)
class FusedLanguageModel:
    """Language models of one tokenizer that answer as one.

    Attributes:
        members: In the order of the weights.
        weights: On the simplex.
        task: Of all members.
    """

    members: tuple[TrainableModel, ...]
    weights: tuple[float, ...]
    task: TaskName

    @property
    def max_length(self) -> int:
        """Tokens that every member reads."""
        return min(member.loaded.max_length for member in self.members)

    @property
    def size(self) -> int:
        """Tokens that are in the table of every member."""
        return smallest_table(self.members)

    def write(self, prompts: Sequence[Passage | Chat], max_new_tokens: int) -> list[str | None]:
        """Return what is written after each prompt, the most probable token of all members together each time.

        Args:
            prompts: See `generation.write_after`.
            max_new_tokens: Most tokens of a text.
        """
        first, *others = self.members
        mix = partial(mean_logs, size=self.size, shares=self.weights)
        written = write_after(first, prompts, max_new_tokens, "auto", others, mix)
        return [None if each is None else each.text for each in written]

    def evaluate(self, records: Records) -> dict[str, Any]:
        """Return loss, perplexity and token accuracy on records, with their intervals, as `evaluate_language_model` does.

        Raises:
            DataError: Where no record has a target that is read.
        """
        loaded = self.members[0].loaded
        examples = loaded.task.examples(loaded.reader, self.max_length, records.inputs, [0] * len(records))
        losses = np.zeros(len(examples))
        tokens = np.zeros(len(examples), dtype=np.int64)
        right = np.zeros(len(examples), dtype=np.int64)
        for rows in sorted_batches(range(len(examples)), lambda row: loaded.task.order(examples[row]), _BATCH):
            record, logs, hits = self._ask([examples[row] for row in rows])
            place = np.array(rows, dtype=np.int64)[record]
            np.add.at(losses, place, -logs)
            np.add.at(tokens, place, 1)
            np.add.at(right, place, hits)
        if not tokens.any():
            raise no_targets_error()
        return {
            "task": self.task,
            "labels": [],
            "max_length": self.max_length,
            "records": len(records),
            "left_out": dict(records.skipped),
            "not_predicted": int((tokens == 0).sum()),
            "figures": TextAnswers(losses, tokens, right, unit_numbers(records)).figures(),
        }

    @torch.no_grad()
    def _ask(self, examples: Sequence[Any]) -> tuple[Numbers, Floats, Numbers]:
        """Of each target token: the row of its record, the logarithm of its probability, and 1 if it is the most probable one."""
        said = []
        for member in self.members:
            collate = member.loaded.task.collator(member.module, member.loaded.reader, member.device)
            batch = collate(examples)
            said.append(read_states(member.module, batch))
        there = batch["labels"] != IGNORED
        targets = batch["labels"][there]
        record = there.nonzero()[:, 0].cpu().numpy()
        logs: list[Floats] = [np.empty(0)]
        hits: list[Numbers] = [np.empty(0, dtype=np.int64)]
        for part in score_parts(said, len(targets)):
            mixed = mean_logs([each.scores(part) for each in said], self.size, self.weights)
            logs.append(mixed.gather(1, targets[part][:, None])[:, 0].double().cpu().numpy())
            hits.append((mixed.argmax(dim=1) == targets[part]).long().cpu().numpy())
        return record, np.concatenate(logs), np.concatenate(hits)


def open_fused_language_model(
    source: str, device: str = "auto", max_length: int | None = None, *, chats: bool = False, system: str | None = None
) -> FusedLanguageModel:
    """Open a fused model whose document says that it writes.

    Args:
        source: Its folder.
        device: auto, cpu, cuda or cuda:N.
        max_length: Tokens to read of a prompt with its target; None: as many as each member in its training.
        chats: Whether it is to read chats.
        system: System message of the chats.

    Raises:
        ModelError: A member has been changed, cannot be used, or has another tokenizer than the first.
        DeviceError: When the device is not here.
    """
    folder = Path(folder_of(source)).expanduser()
    document = read_fusion_document(folder)
    paths = [str(member_folder(folder, number)) for number in range(1, document.count + 1)]
    members = [open_language_model(path, document.task, device, max_length, chats=chats, system=system) for path in paths]
    check_tokenizers(members, paths, chats=chats)
    return FusedLanguageModel(tuple(members), document.weights, document.task)


def write_fused_language_model(
    folder: Path, method: TextMethod, models: Sequence[TrainableModel], weights: Sequence[float], task: TaskName
) -> None:
    """Write copies of models, and how they answer together.

    Args:
        folder: A new folder.
        method: How the weights were found.
        models: Opened models of one tokenizer, as they are in their folders.
        weights: Of each, on the simplex.
        task: Of all models.

    Raises:
        RunError: The folder is there already.
        ModelError: A model is a fused one.
    """
    check_new(folder)
    fields = {
        "method": method,
        "task": task,
        "labels": (),
        "temperatures": (1.0,) * len(models),
        "weights": tuple(weights),
    }
    write_fused_folder(folder, [model.loaded.folder.path for model in models], fields, None)
