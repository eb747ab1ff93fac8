"""Distill language models of one tokenizer: teachers say what may follow at each token, or write texts, and a student learns.

It goes from files to a folder, and can be interrupted and continued, as the distillation of classifiers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cotune.data.config import TaskName
from cotune.data.inputs.chat_template import check_chat_template
from cotune.data.readers.sources import check_new
from cotune.data.types import Chat
from cotune.data.unlabeled import inputs_hash
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.sequence_lessons import SequenceLessons, has_target
from cotune.ensembles.student_training import train_in_passes
from cotune.ensembles.unfinished_distillation import begin_work, keep_pass, newest_pass, part_folder
from cotune.ensembles.written_targets import Text, write_targets
from cotune.errors import DataError
from cotune.models.base.load import load_model
from cotune.models.base.tokenizer_identity import check_same_tokenizer, tokenizer_hash, tokenizer_parts
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.device import explained_out_of_memory, pick_device
from cotune.models.export import export_model
from cotune.models.trainable import TrainableModel

RECORD = "distillation.json"  # what the student was made from, in its folder
_HELD_OUT = 10  # one prompt of this number is held out to measure the student on


@dataclass(frozen=True)
class SequenceDistillation:
    """What is to be done.

    Attributes:
        teachers: Opened language models of one task.
        names: Of the teachers, in order.
        task: Of all models.
        student: The base model that learns.
        config: How.
        inputs: Public prompts with targets; without them where `write` says so.
        out: A new folder.
        write: Most tokens of the targets that the teachers write; None: the inputs have their own.
        device: auto, cpu, cuda or cuda:N.
        license: Of the public inputs, as it is to be recorded.
        source: Where they come from, as it is to be recorded.
        left_out: How many records of the file could not be used, by the reason.
        weights: Of the teachers' probabilities, together 1; empty: all alike.
    """

    teachers: Sequence[TrainableModel]
    names: Sequence[str]
    task: TaskName
    student: ModelConfig
    config: DistillationConfig
    inputs: Sequence[Text]
    out: Path
    write: int | None = None
    device: str = "auto"
    license: str = ""
    source: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    weights: Sequence[float] = ()

    @property
    def part(self) -> Path:
        """The folder of work that is not finished."""
        return part_folder(self.out)

    @property
    def chats(self) -> bool:
        """Whether the inputs are chats: all are, or none."""
        return isinstance(self.inputs[0], Chat) if self.inputs else False


Beside = Callable[[dict[str, Any]], Mapping[str, str]]  # what was found -> name and text of further files of the student


def distill_sequences(work: SequenceDistillation, beside: Beside = lambda found: {}) -> dict[str, Any]:
    """Distill, or continue an interrupted distillation with the same settings.

    Args:
        work: What is to be done.
        beside: Makes further files for the student's folder, such as a model card.

    Returns:
        The settings and the metrics on held-out prompts, as in `distillation.json` of the new folder.

    Raises:
        RunError: If the folder, or an unfinished distillation with other settings, exists already; if the student diverges.
        ModelError: If the models have not the same tokenizer, or the student cannot be loaded.
        DataError: If there are too few inputs with a target that is read.
    """
    check_new(work.out)
    if len(work.inputs) < _HELD_OUT:
        raise _too_few(len(work.inputs))
    student = _open_student(work)
    names = student.names(work.config.train, freeze_embeddings=False)
    settings = _settings(work, student)
    begin_work(work.part, settings)
    with explained_out_of_memory("lower --max-length or --batch-size, or use fewer teachers"):
        texts, left_out = _texts(work)
        lessons, kept = _encode(work, student, [text for _, text in texts])
        learned, held = _split([texts[row][0] for row in kept])
        done, start = newest_pass(work.part)
        state = train_in_passes(
            student,
            len(learned),
            work.config,
            lambda rows: lessons.add_gradients([learned[row] for row in rows]),
            names=names,
            start=start,
            done=done,
            keep=lambda number, state: keep_pass(work.part, number, state),
        )
        student.load({})
        before = lessons.measure(held)
        student.load(state)
        after = lessons.measure(held)
    found = {
        **settings,
        "left_out": {**work.left_out, **left_out, "target not read": len(texts) - len(kept)},
        "records": len(learned),
        "held_out": {"records": len(held), **after, "before": {key: before[key] for key in ("student", "agreement", "kl")}},
    }
    export_model(student, work.out, {**beside(found), RECORD: json.dumps(found, indent=1)})
    shutil.rmtree(work.part)
    return found


def _open_student(work: SequenceDistillation) -> TrainableModel:
    """The student in its base model's state, which reads as many tokens as every teacher can."""
    loaded = load_model(work.student, (), 0, work.task)
    if work.chats:
        check_chat_template(loaded.reader)
    own = tokenizer_parts(loaded, chats=work.chats)
    for teacher, name in zip(work.teachers, work.names, strict=True):
        check_same_tokenizer(teacher.loaded, own, f"the teacher {name}", "the student", chats=work.chats)
    loaded = replace(loaded, max_length=min(loaded.max_length, *(teacher.loaded.max_length for teacher in work.teachers)))
    lora = LoraConfig(factors="ab") if work.config.train == "lora" else None
    return TrainableModel(loaded, lora, work.config.seed, pick_device(work.device))


def _settings(work: SequenceDistillation, student: TrainableModel) -> dict[str, Any]:
    """Everything that decides the student, as plain values."""
    loaded = student.loaded
    named = zip(work.names, work.teachers, strict=True)
    return {
        "task": work.task,
        "teachers": [{"model": name, "sha256": teacher.loaded.folder.content_hash} for name, teacher in named],
        "student": {"base": work.student.base, "sha256": loaded.folder.content_hash},
        "tokenizer": tokenizer_hash(tokenizer_parts(loaded, chats=work.chats)),
        "inputs": {
            "count": len(work.inputs),
            "sha256": inputs_hash(work.inputs),
            "source": work.source,
            "license": work.license,
        },
        "weights": list(work.weights),
        "written": work.write,
        "max_length": loaded.max_length,
        **asdict(work.config),
    }


def _texts(work: SequenceDistillation) -> tuple[list[tuple[int, Text]], dict[str, int]]:
    """(number of its prompt, record with its target), and how many have none."""
    if work.write is None:
        return list(enumerate(work.inputs)), {}
    return write_targets(work.part, work.teachers, work.inputs, work.write)


def _encode(work: SequenceDistillation, student: TrainableModel, texts: Sequence[Text]) -> tuple[SequenceLessons, list[int]]:
    """The lessons, and which texts they are: those with a target that is read."""
    encoded = student.loaded.encode_unlabeled(texts)
    kept = [row for row, example in enumerate(encoded) if has_target(example)]
    return SequenceLessons(student, work.teachers, [encoded[row] for row in kept], work.config, work.weights), kept


def _split(prompts: Sequence[int]) -> tuple[list[int], list[int]]:
    """The records that are learned, and those that are held out, by the prompts that they are of. Raises DataError."""
    order = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    if len(order) < _HELD_OUT:
        raise _too_few(len(order))
    held = [row for row, prompt in enumerate(prompts) if order[prompt] % _HELD_OUT == 0]
    learned = [row for row, prompt in enumerate(prompts) if order[prompt] % _HELD_OUT]
    return learned, held


def _too_few(count: int) -> DataError:
    return DataError(
        f"{count} inputs with a target that the models read are too few: expected at least {_HELD_OUT}; raise --max-length where"
        " targets are cut off",
        code="data.too_few_records",
    )
