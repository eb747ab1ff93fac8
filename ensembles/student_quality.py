"""How close a student is to its teacher, and what distilling has cost in accuracy, on inputs that it has not learned from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cotune.ensembles.calibration import Floats, Numbers
from cotune.ensembles.student_training import Lessons
from cotune.models.evaluation.intervals import Answers, accuracy_interval, compare_paired
from cotune.models.evaluation.predictor import Classifier

_LEAST = 1e-12  # a probability in a logarithm


def measure_student(student: Classifier, lessons: Lessons) -> dict[str, Any]:
    """Compare a student with what it was to learn, on inputs that it has not learned from.

    Counted are the answers that both teacher and student can give. Intervals are those of 95 %.

    Args:
        student: With its classes in the order of what was taught.
        lessons: The inputs, what the teacher says of them, and their classes, where they are known.

    Returns:
        `answers`, how many there are. `agreement`, the share of answers with the same most probable class, and
        `agreement_interval`; `kl`, the mean KL(teacher ‖ student) in nats; None without an answer. `teacher_accuracy`,
        `student_accuracy`, `accuracy_difference` (student − teacher, on the same answers) and `difference_interval`; None
        without known classes.
    """
    theirs = np.concatenate(lessons.taught)
    ours = torch.cat(student.probabilities(lessons.inputs)).numpy()
    units = np.repeat(np.arange(len(lessons.taught)), [len(each) for each in lessons.taught])
    both = np.flatnonzero(np.isfinite(theirs).all(axis=1) & np.isfinite(ours).all(axis=1))
    truth = None if lessons.truth is None else np.concatenate(lessons.truth)[both]
    return {
        "answers": len(both),
        **_agreement(theirs[both], ours[both], units[both]),
        **_accuracy(theirs[both], ours[both], units[both], truth),
    }


def _agreement(theirs: Floats, ours: Floats, units: Numbers) -> dict[str, Any]:
    if not len(units):
        return {"agreement": None, "agreement_interval": None, "kl": None}
    same = _answers(theirs.argmax(axis=1), ours, units)  # a student is right where it says what its teacher says
    logs = np.log(np.maximum(theirs, _LEAST)) - np.log(np.maximum(ours, _LEAST))
    return {
        "agreement": same.score,
        "agreement_interval": list(accuracy_interval(same)),
        "kl": float((theirs * logs).sum(axis=1).mean()),
    }


def _accuracy(theirs: Floats, ours: Floats, units: Numbers, truth: Numbers | None) -> dict[str, Any]:
    if truth is None or not len(units):
        return dict.fromkeys(("teacher_accuracy", "student_accuracy", "accuracy_difference", "difference_interval"))
    teacher = _answers(truth, theirs, units)
    student = _answers(truth, ours, units)
    paired = compare_paired(student, teacher)
    return {
        "teacher_accuracy": teacher.score,
        "student_accuracy": student.score,
        "accuracy_difference": paired.difference,
        "difference_interval": [paired.low, paired.high],
    }


def _answers(truth: Numbers, probabilities: Floats, units: Numbers) -> Answers:
    return Answers(truth, probabilities.argmax(axis=1), units, probabilities.shape[1])
