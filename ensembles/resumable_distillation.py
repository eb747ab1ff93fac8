"""Distill models from files to a folder: teachers predict, and a student learns. It can be interrupted and continued.

The teachers' predictions are kept beside what `unfinished_distillation` keeps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from cotune.data.readers.sources import check_new
from cotune.data.types import Input, answer_count
from cotune.data.unlabeled import inputs_hash
from cotune.ensembles.calibration import Floats, Numbers
from cotune.ensembles.config import DistillationConfig
from cotune.ensembles.fusion import weighted_mean
from cotune.ensembles.predictor import aligned_probabilities, check_same_kind
from cotune.ensembles.student_training import Lessons, train_student
from cotune.ensembles.unfinished_distillation import begin_work, keep_pass, newest_pass, part_folder, read_tensors
from cotune.errors import DataError
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

    @property
    def part(self) -> Path:
        """The folder of work that is not finished."""
        return part_folder(self.out)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the student, as plain values."""
        return {
            "teachers": [{"model": n, "sha256": t.content_hash} for n, t in zip(self.names, self.teachers, strict=True)],
            "student": {"base": self.student.base, "sha256": find_base(self.student).content_hash},
            "inputs": {"count": len(self.inputs), "sha256": inputs_hash(self.inputs), "license": self.license},
            "labels": self.truth is not None,
            **asdict(self.config),
        }


def distill(work: Distillation) -> dict[str, Any]:
    """Distill, or continue an interrupted distillation with the same settings.

    Returns:
        The settings and the metrics on held-out inputs, as in `distillation.json` of the new folder.

    Raises:
        RunError: If the folder, or an unfinished distillation with other settings, exists already.
        ModelError: If teachers differ in task or classes, or the student cannot be loaded.
        DataError: If there are fewer than ten inputs.
    """
    check_new(work.out)
    if len(work.inputs) < _HELD_OUT:
        raise DataError(f"{len(work.inputs)} inputs are too few: expected at least {_HELD_OUT}", code="data.too_few_records")
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
    found = {**settings, "held_out": measure_student(student, work.teachers[0], lessons.select(held))}
    export_model(student, work.out, {RECORD: json.dumps(found, indent=1)})
    shutil.rmtree(work.part)
    return found


def measure_student(student: TrainableModel, teacher: Classifier, lessons: Lessons) -> dict[str, float | int | None]:
    """Compare a student with what it was taught, on inputs that it has not learned from.

    Args:
        student: In the state that is measured.
        teacher: Whose task and classes the student has.
        lessons: The inputs and what was taught.

    Returns:
        `answers`; `agreement`, the share of answers with the same most probable class; `kl`, the mean KL(teacher ‖ student) in
        nats; `teacher_accuracy` and `student_accuracy`, None without labels.
    """
    theirs = np.concatenate(lessons.taught)
    ours = torch.cat(Predictor(student, teacher.labels, teacher.task).probabilities(lessons.inputs)).numpy()
    both = np.flatnonzero(np.isfinite(theirs).all(axis=1) & np.isfinite(ours).all(axis=1))
    logs = np.log(np.maximum(theirs[both], 1e-12)) - np.log(np.maximum(ours[both], 1e-12))
    found: dict[str, float | int | None] = {
        "answers": len(both),
        "agreement": float((theirs[both].argmax(axis=1) == ours[both].argmax(axis=1)).mean()),
        "kl": float((theirs[both] * logs).sum(axis=1).mean()),
        "teacher_accuracy": None,
        "student_accuracy": None,
    }
    if lessons.truth is not None:
        truth = np.concatenate(lessons.truth)[both]
        found["teacher_accuracy"] = float((theirs[both].argmax(axis=1) == truth).mean())
        found["student_accuracy"] = float((ours[both].argmax(axis=1) == truth).mean())
    return found


def _taught(work: Distillation) -> list[Floats]:
    """The teachers' mean probabilities, computed once."""
    file = work.part / _TAUGHT
    lengths = [answer_count(given) for given in work.inputs]
    if not file.exists():
        mean = _mean_of_teachers(work)
        atomic_write(file, save({"probabilities": torch.from_numpy(np.ascontiguousarray(mean))}))
    everything = read_tensors(file, ("probabilities",))["probabilities"].numpy()
    return np.split(everything, np.cumsum(lengths)[:-1])


def _mean_of_teachers(work: Distillation) -> Floats:
    first = work.teachers[0]
    for teacher, name in zip(work.teachers, work.names, strict=True):
        check_same_kind(teacher, first.task, first.labels, name)
    said = [np.concatenate(aligned_probabilities(teacher, first.labels, work.inputs)) for teacher in work.teachers]
    return weighted_mean(np.stack(said), np.full(len(said), 1 / len(said)))


def _student(work: Distillation) -> TrainableModel:
    config = work.config
    first = work.teachers[0]
    loaded = load_model(work.student, tuple(first.labels), parameter_seed(config.seed, "head"), first.task)
    lora = LoraConfig.model_validate({}) if config.train == "lora" else None
    return TrainableModel(loaded, lora, config.seed, pick_device(work.device))
