"""A fused model as a folder: `fusion.json`, the members' folders, and for stacking `meta_model.safetensors`.

The folder is self-contained: configuration and safetensors, no code and no pickles. As it may come from an untrusted source, it
is checked when it is opened: members are identified only by number, and must have the hashes in `fusion.json`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cotune.data.config import TaskName
from cotune.data.readers.sources import check_new
from cotune.ensembles.config import Method
from cotune.ensembles.fusion import MetaModel, PredictionFusion
from cotune.errors import ModelError
from cotune.models.base.folder import content_hash, list_model_files
from cotune.storage.config_table import format_validation_error
from cotune.storage.files import atomic_write

FUSION_FILE = "fusion.json"
_META_MODEL = "meta_model.safetensors"
_MAX_MEMBERS = 64


class FusionDocument(BaseModel):
    """The content of `fusion.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = Field(1, description="of this file")
    method: Method
    task: TaskName
    labels: tuple[str, ...] = Field(min_length=2, description="class names, in the order of the fused probabilities")
    members: tuple[str, ...] = Field(min_length=1, max_length=_MAX_MEMBERS, description="SHA-256 of the files of each member")
    temperatures: tuple[float, ...]
    weights: tuple[float, ...]

    @model_validator(mode="after")
    def _check_numbers(self) -> FusionDocument:
        if not len(self.members) == len(self.temperatures) == len(self.weights):
            raise ValueError("members, temperatures and weights: expected one for each member")
        if not all(0 < t < np.inf for t in self.temperatures):
            raise ValueError("temperatures: expected finite numbers above 0")
        if not all(0 <= w <= 1 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError("weights: expected numbers from 0 to 1 that add up to 1")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: expected distinct class names")
        return self


def is_fused(folder: Path) -> bool:
    """Whether a folder holds a fused model."""
    return (folder / FUSION_FILE).is_file()


def fusion_hash(folder: Path) -> str:
    """Return SHA-256 (hex) over the rule of a fused model, which states the hashes of its members."""
    total = hashlib.sha256()
    for name in (FUSION_FILE, _META_MODEL):
        content = (folder / name).read_bytes() if (folder / name).exists() else b""
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def member_folder(folder: Path, number: int) -> Path:
    """Return where a fused model keeps a member: the first has the number 1."""
    return folder / "models" / str(number)


def write_fused(
    folder: Path, fusion: PredictionFusion, members: Sequence[Path], task: TaskName, labels: tuple[str, ...]
) -> FusionDocument:
    """Copy the members and write the rule beside them; `fusion.json` is written last, so that a folder with it is complete.

    Args:
        folder: A new folder.
        fusion: The fitted rule.
        members: Folders of finished models, in the order of the rule's weights.
        task: Of all members.
        labels: In the order of the fused probabilities.

    Raises:
        RunError: The folder is there already.
    """
    check_new(folder)
    for number, member in enumerate(members, 1):
        _copy(member, member_folder(folder, number))
    if fusion.meta_model is not None:
        meta = {"coefficients": fusion.meta_model.coefficients, "intercepts": fusion.meta_model.intercepts}
        save_file({name: np.ascontiguousarray(values) for name, values in meta.items()}, folder / _META_MODEL)
    document = FusionDocument(
        method=fusion.method,
        task=task,
        labels=labels,
        members=tuple(content_hash(member_folder(folder, number)) for number in range(1, len(members) + 1)),
        temperatures=fusion.temperatures,
        weights=fusion.weights,
    )
    atomic_write(folder / FUSION_FILE, document.model_dump_json(indent=1).encode())
    return document


def _copy(source: Path, target: Path) -> None:
    for name, file in list_model_files(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def read_fused(folder: Path) -> tuple[FusionDocument, PredictionFusion]:
    """Read the rule of a fused model, and check that its members are those that it was fitted for.

    Raises:
        ModelError: A file is damaged, or a member is not the stated one.
    """
    file = folder / FUSION_FILE
    try:
        document = FusionDocument.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror})", code="model.fusion_damaged") from None
    except ValidationError as error:
        problem = format_validation_error(error, FusionDocument, "fused model")
        raise ModelError(f"{file} cannot be used: {problem}", code="model.fusion_damaged") from None
    for number, expected in enumerate(document.members, 1):
        member = member_folder(folder, number)
        if not member.is_dir() or content_hash(member) != expected:
            raise ModelError(
                f"{member} is not the model that the fusion was fitted for: expected the hash {expected[:16]}…; fuse the models"
                " again",
                code="model.member_changed",
            )
    return document, PredictionFusion(
        document.method, document.temperatures, document.weights, _read_meta_model(folder, document)
    )


def _read_meta_model(folder: Path, document: FusionDocument) -> MetaModel | None:
    if document.method != "stacking":
        return None
    classes = len(document.labels)
    expected = {"coefficients": (classes, classes * len(document.members)), "intercepts": (classes,)}
    try:
        found = load_file(folder / _META_MODEL)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / _META_MODEL} cannot be read ({error})", code="model.fusion_damaged") from None
    if {name: values.shape for name, values in found.items()} != expected:
        raise ModelError(f"{folder / _META_MODEL} does not fit {FUSION_FILE}: fuse the models again", code="model.fusion_damaged")
    if not all(np.isfinite(values).all() for values in found.values()):
        raise ModelError(f"{folder / _META_MODEL} holds numbers that are not finite", code="model.fusion_damaged")
    return MetaModel(found["coefficients"].astype(np.float64), found["intercepts"].astype(np.float64))
