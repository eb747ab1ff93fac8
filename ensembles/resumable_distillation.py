"""Distill models from files to a folder: teachers predict, and a student learns. It can be interrupted and continued.

The teachers' predictions are kept beside what `unfinished_distillation` keeps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from cotune.data.config import TaskName
from cotune.data.readers.sources import check_new
from cotune.data.types import Input, answer_count
from cotune.data.unlabeled import inputs_hash
from cotune.ensembles.calibration import Floats, Numbers
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.fusion import weighted_mean
from cotune.ensembles.predictor import aligned_probabilities, check_same_kind
from cotune.ensembles.student_quality import measure_student
from cotune.ensembles.student_training import Lessons, train_student
from cotune.ensembles.unfinished_distillation import begin_work, keep_pass, newest_pass, part_folder, read_tensors
from cotune.errors import DataError, RunError
from cotune.models.adapters.adapter import parameter_seed
from cotune.models.base.load import load_model
from cotune.models.base.lookup import find_base
from cotune.models.config import LoraConfig, ModelConfig
from cotune.models.device import pick_device
from cotune.models.evaluation.predictor import Classifier, Predictor
from cotune.models.export import export_model
from cotune.models.trainable import TrainableModel
from cotune.storage.files import atomic_write

RECORD = "distillation.json"  # what the student was made from, in its folder
_HELD_OUT = 10  # one input of this number is held out to measure the student on
_TAUGHT = "taught.safetensors"


@dataclass(frozen=True)
class LabeledInputs:
    """Inputs whose classes are known, to measure on.

    Attributes:
        source: What they are called in the record.
        inputs: That no teacher and no student has learned from.
        truth: (answers,) class numbers of each input, in the order of the first teacher's classes.
    """

    source: str
    inputs: Sequence[Input]
    truth: Sequence[Numbers]


@dataclass(frozen=True)
class Distillation:
    """What is to be done.

    Attributes:
        teachers: Opened models of one task with the same classes.
        names: Of the teachers, in order.
        student: The base model that learns.
        config: How.
        inputs: Public inputs.
        truth: (answers,) class numbers of each input, in the order of the first teacher's classes; None without labels.
        out: A new folder.
        device: auto, cpu, cuda or cuda:N.
        license: Of the public inputs, as it is to be recorded.
        source: Where they come from, as it is to be recorded.
        test: What the student is also measured on; None: on held-out inputs alone.
    """

    teachers: Sequence[Classifier]
    names: Sequence[str]
    student: ModelConfig
    config: DistillationConfig
    inputs: Sequence[Input]
    truth: Sequence[Numbers] | None
    out: Path
    device: str = "auto"
    license: str = ""
    source: str = ""
    test: LabeledInputs | None = None

    @property
    def part(self) -> Path:
        """The folder of work that is not finished."""
        return part_folder(self.out)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the student, as plain values."""
        return {
            "teachers": [{"model": n, "sha256": t.content_hash} for n, t in zip(self.names, self.teachers, strict=True)],
            "student": {"base": self.student.base, "sha256": find_base(self.student).content_hash},
            "inputs": {
                "count": len(self.inputs),
                "sha256": inputs_hash(self.inputs),
                "source": self.source,
                "license": self.license,
            },
            "labels": self.truth is not None,
            **asdict(self.config),
        }


@dataclass(frozen=True)
class Distilled:
    """What a model card says of a student.

    Attributes:
        found: The content of `distillation.json`.
        labels: Class names in the order of the student's head.
        task: What it is for.
        length: Tokens of a text that it reads.
    """

    found: Mapping[str, Any]
    labels: tuple[str, ...]
    task: TaskName
    length: int


def distill(work: Distillation, describe: Callable[[Distilled], Mapping[str, str]] = lambda done: {}) -> dict[str, Any]:
    """Distill, or continue an interrupted distillation with the same settings.

    Args:
        work: What is to be done.
        describe: Gives name -> text of further files of the student's folder, such as a model card.

    Returns:
        The settings and the metrics on held-out inputs and on the test set, as in `distillation.json` of the new folder.

    Raises:
        RunError: If the folder, or an unfinished distillation with other settings, exists already, or cannot be written.
        ModelError: If teachers differ in task or classes, or the student cannot be loaded.
        DataError: If there are fewer than ten inputs.
    """
    check_new(work.out)
    if len(work.inputs) < _HELD_OUT:
        raise DataError(f"{len(work.inputs)} inputs are too few: expected at least {_HELD_OUT}", code="data.too_few_records")
    try:
        return _distill(work, describe)
    except OSError as error:
        raise RunError(
            f"{work.out}, or {work.part.name} beside it, cannot be written ({error.strerror or error}): expected room, and the"
            " right to write there; what is finished is kept, and the same command goes on",
            code="run.not_writable",
        ) from None


def _distill(work: Distillation, describe: Callable[[Distilled], Mapping[str, str]]) -> dict[str, Any]:
    settings = work.settings()
    begin_work(work.part, settings)
    taught = _taught(work)
    student = _student(work)
    held = list(range(0, len(work.inputs), _HELD_OUT))
    lessons = Lessons(work.inputs, taught, work.truth)
    chosen = [row for row in range(len(work.inputs)) if row % _HELD_OUT]
    done, start = newest_pass(work.part)
    train_student(
        student, lessons.select(chosen), work.config, start=start, done=done, keep=lambda n, s: keep_pass(work.part, n, s)
    )
    opened = Predictor(student, tuple(work.teachers[0].labels), work.teachers[0].task)
    found = {**settings, "held_out": measure_student(opened, lessons.select(held)), "test": _measure_on_test(work, opened)}
    beside = describe(Distilled(found, opened.labels, opened.task, student.loaded.text_length))
    export_model(student, work.out, {**beside, RECORD: json.dumps(found, indent=1)})
    shutil.rmtree(work.part)
    return found


def _measure_on_test(work: Distillation, student: Predictor) -> dict[str, Any] | None:
    if work.test is None:
        return None
    taught = np.split(_mean_of_teachers(work, work.test.inputs), _ends(work.test.inputs))
    return {"source": work.test.source, **measure_student(student, Lessons(work.test.inputs, taught, work.test.truth))}


def _ends(inputs: Sequence[Input]) -> Numbers:
    """Where the answers of each input but the last one end."""
    return np.cumsum([answer_count(given) for given in inputs])[:-1]


def _taught(work: Distillation) -> list[Floats]:
    """The teachers' mean probabilities, computed once."""
    file = work.part / _TAUGHT
    if not file.exists():
        mean = _mean_of_teachers(work, work.inputs)
        atomic_write(file, save({"probabilities": torch.from_numpy(np.ascontiguousarray(mean))}))
    everything = read_tensors(file, ("probabilities",))["probabilities"].numpy()
    return np.split(everything, _ends(work.inputs))


def _mean_of_teachers(work: Distillation, inputs: Sequence[Input]) -> Floats:
    first = work.teachers[0]
    for teacher, name in zip(work.teachers, work.names, strict=True):
        check_same_kind(teacher, first.task, first.labels, name)
    said = [np.concatenate(aligned_probabilities(teacher, first.labels, inputs)) for teacher in work.teachers]
    return weighted_mean(np.stack(said), np.full(len(said), 1 / len(said)))


def _student(work: Distillation) -> TrainableModel:
    config = work.config
    first = work.teachers[0]
    loaded = load_model(work.student, tuple(first.labels), parameter_seed(config.seed, "head"), first.task)
    lora = LoraConfig.model_validate({}) if config.train == "lora" else None
    return TrainableModel(loaded, lora, config.seed, pick_device(work.device))
