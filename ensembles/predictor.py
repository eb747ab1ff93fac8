"""Open a single or fused model for prediction, and fuse the predictions of a fused one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cotune.data.class_names import shown
from cotune.data.config import TaskName, has_classes
from cotune.data.types import Input
from cotune.ensembles.calibration import Floats
from cotune.ensembles.folder import fusion_hash, read_fused
from cotune.ensembles.fusion import PredictionFusion
from cotune.errors import ModelError
from cotune.models.base.folder import is_fused, member_folder
from cotune.models.evaluation.predictor import Classifier, Predictor, folder_of, open_predictor


@dataclass(frozen=True)
class FusedPredictor:
    """Several finished models that answer as one; the same interface as `Predictor`.

    Attributes:
        members: In the order of the fusion's weights.
        fusion: How their probabilities become one.
        labels: In the order of the fused probabilities.
        task: Of all members.
        content_hash: SHA-256 (hex) over the rule and the hashes of the members.
    """

    members: tuple[Predictor, ...]
    fusion: PredictionFusion
    labels: tuple[str, ...]
    task: TaskName
    content_hash: str

    @property
    def max_length(self) -> int:
        """Tokens of a text that the member which reads most of it reads."""
        return max(member.max_length for member in self.members)

    def probabilities(self, inputs: Sequence[Input]) -> list[Tensor]:
        """Return for each input (answers, classes) in float64; NaN for what no member could read."""
        if not inputs:
            return []
        said = [aligned_probabilities(member, self.labels, inputs) for member in self.members]
        lengths = [len(each) for each in said[0]]
        fused = self.fusion.fuse([np.concatenate(each) for each in said])
        return list(torch.split(torch.from_numpy(fused), lengths))


def open_model(source: str, device: str = "auto", max_length: int | None = None) -> Predictor | FusedPredictor:
    """Open a single or a fused model.

    Args:
        source: As `open_predictor` takes it, or the folder of a fused model or of a run that has stacked one.
        device: auto, cpu, cuda or cuda:N.
        max_length: Tokens to read of a text; None: as many as in the training of each model.

    Raises:
        ModelError: When it cannot be used.
        DeviceError: When the device is not here.
    """
    folder = Path(folder_of(source)).expanduser()
    if not is_fused(folder):
        return open_predictor(source, device, max_length)
    document, fusion = read_fused(folder)
    paths = [member_folder(folder, number) for number in range(1, len(document.members) + 1)]
    members = tuple(open_predictor(str(path), device, max_length) for path in paths)
    for member in members:
        check_same_kind(member, document.task, document.labels, source)
    return FusedPredictor(members, fusion, document.labels, document.task, fusion_hash(folder))


def require_classifiers(models: Sequence[Classifier], sources: Sequence[str]) -> None:
    """Refuse models whose answers are no classes, where the probabilities of classes are worked with. Raises ModelError."""
    for model, source in zip(models, sources, strict=True):
        if not has_classes(model.task):
            raise ModelError(
                f"{source} is for task = {model.task}, and this is for classes of which one is right: expected a classifier of"
                " sequences, tokens or images",
                code="model.no_classifier",
            )


def check_same_kind(model: Classifier, task: TaskName, labels: Sequence[str], source: str) -> None:
    """Check that a model has the same task and the same classes, in any order.

    Args:
        model: The model.
        task: Expected task.
        labels: Expected classes.
        source: Name of the model, for the error.

    Raises:
        ModelError: If it has not.
    """
    if model.task != task:
        raise ModelError(f"{source} is for {model.task}, expected {task} as of the first model", code="model.other_task")
    missing = sorted(set(labels) ^ set(model.labels))
    if missing:
        raise ModelError(
            f"{source} has other classes than the first model ({shown(missing[0])} is only in one of them): expected the same"
            " names, in any order",
            code="model.other_classes",
        )


def aligned_probabilities(model: Classifier, labels: Sequence[str], inputs: Sequence[Input]) -> list[Floats]:
    """Return a model's probabilities with its classes reordered.

    Args:
        model: The model.
        labels: All its classes, in the order of the result.
        inputs: n inputs.

    Returns:
        n arrays (answers, classes).
    """
    order = [model.labels.index(label) for label in labels]
    return [each.numpy()[:, order] for each in model.probabilities(inputs)]
