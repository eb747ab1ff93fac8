"""The folder of a fused model: `fusion.json`, the members' folders, and for stacking `meta_model.safetensors`.

The folder is self-contained: configuration and safetensors, no code and no pickles. As it may come from an untrusted source, it
is checked when it is opened: members are identified only by number, and must have the hashes in `fusion.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cotune.data.config import TASK_FACTS, TaskName
from cotune.errors import ModelError, RunError
from cotune.models.base.folder import FUSION_FILE, MEMBERS, META_MODEL, content_hash, is_fused, list_model_files, member_folder
from cotune.models.config import Method, TextMethod
from cotune.storage.config_table import format_validation_error
from cotune.storage.files import atomic_write

Arrays = Mapping[str, NDArray[np.float64]]

_MAX_MEMBERS = 64
_MAX_TEMPERATURE = 1000.0  # far beyond what is ever fitted; scores divided by next to nothing are not finite


class FusionDocument(BaseModel):
    """The content of `fusion.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = Field(1, description="of this file")
    method: Method
    task: TaskName
    labels: tuple[str, ...] = Field(
        description="class names, in the order of the fused probabilities; of language models, whose tokens are fused, none"
    )
    members: tuple[str, ...] = Field(min_length=1, max_length=_MAX_MEMBERS, description="SHA-256 of the files of each member")
    temperatures: tuple[float, ...]
    weights: tuple[float, ...]

    @model_validator(mode="after")
    def _check_numbers(self) -> FusionDocument:
        if not len(self.members) == len(self.temperatures) == len(self.weights):
            raise ValueError("members, temperatures and weights: expected one for each member")
        if not all(1 / _MAX_TEMPERATURE <= t <= _MAX_TEMPERATURE for t in self.temperatures):
            raise ValueError(f"temperatures: expected numbers from {1 / _MAX_TEMPERATURE:g} to {_MAX_TEMPERATURE:g}")
        if not all(0 <= w <= 1 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError("weights: expected numbers from 0 to 1 that add up to 1")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: expected distinct class names")
        return self

    @model_validator(mode="after")
    def _suits_its_task(self) -> FusionDocument:
        if self.writes and (self.labels or self.method not in get_args(TextMethod) or set(self.temperatures) != {1.0}):
            raise ValueError(
                f"expected no labels, temperatures of 1 and method {' or '.join(get_args(TextMethod))} for {self.task}"
            )
        if not self.writes and len(self.labels) < 2:
            raise ValueError("labels: expected two or more class names")
        return self

    @property
    def writes(self) -> bool:
        """Whether the members are language models."""
        return TASK_FACTS[self.task].prompts != "none"

    @property
    def count(self) -> int:
        """How many members there are."""
        return len(self.members)


def write_fused_folder(folder: Path, members: Sequence[Path], fields: Mapping[str, object], meta_model: Arrays | None) -> None:
    """Copy the members and write the rule beside them; `fusion.json` is written last, so that a folder with it is complete.

    Args:
        folder: Empty, or not there yet.
        members: Folders of finished models, in the order of the rule's weights.
        fields: Of `FusionDocument`, but for the members' hashes.
        meta_model: coefficients (classes, models · classes) and intercepts (classes,); None but for stacking.

    Raises:
        ModelError: A member is a fused model itself.
        RunError: The folder cannot be written.
    """
    try:
        _write(folder, members, fields, meta_model)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror}): check the permissions and the space of {folder.parent}",
            code="run.not_writable",
        ) from None


def _write(folder: Path, members: Sequence[Path], fields: Mapping[str, object], meta_model: Arrays | None) -> None:
    for number, member in enumerate(members, 1):
        _copy(member, member_folder(folder, number))
    if meta_model is not None:
        save_file({name: np.ascontiguousarray(values) for name, values in meta_model.items()}, folder / META_MODEL)
    hashes = tuple(content_hash(member_folder(folder, number)) for number in range(1, len(members) + 1))
    document = FusionDocument.model_validate({**fields, "members": hashes})
    atomic_write(folder / FUSION_FILE, document.model_dump_json(indent=1).encode())


def _copy(source: Path, target: Path) -> None:
    if is_fused(source):
        raise nested_fusion_error(source)
    for name, file in list_model_files(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def nested_fusion_error(source: Path | str) -> ModelError:
    """Return the error for a fused model where single ones are worked with."""
    return ModelError(
        f"{source} is a fused model: expected a single one; name its members instead, which are in {source}/{MEMBERS}",
        code="model.nested_fusion",
    )


def read_fusion_document(folder: Path) -> FusionDocument:
    """Read the rule of a fused model, and check that its members are those that it was made of.

    Raises:
        ModelError: The file is damaged, or a member is not the stated one.
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
        if not _is_single(member) or content_hash(member) != expected:
            raise ModelError(
                f"{member} is not the model that the fusion was fitted for: expected the hash {expected[:16]}…; fuse the models"
                " again",
                code="model.member_changed",
            )
    return document


def _is_single(member: Path) -> bool:
    """Whether a folder is that of a model itself: what another one inside of it holds, no hash covers."""
    return (member / "config.json").is_file() and not is_fused(member)


def read_meta_model(folder: Path, document: FusionDocument) -> Arrays:
    """Return the coefficients (classes, models · classes) and intercepts (classes,) of stacking, in float64.

    Raises:
        ModelError: The file is damaged, or does not fit the document.
    """
    classes = len(document.labels)
    expected = {"coefficients": (classes, classes * document.count), "intercepts": (classes,)}
    try:
        found = load_file(folder / META_MODEL)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / META_MODEL} cannot be read ({error})", code="model.fusion_damaged") from None
    if {name: values.shape for name, values in found.items()} != expected:
        raise ModelError(f"{folder / META_MODEL} does not fit {FUSION_FILE}: fuse the models again", code="model.fusion_damaged")
    if not all(np.isfinite(values).all() for values in found.values()):
        raise ModelError(f"{folder / META_MODEL} holds numbers that are not finite", code="model.fusion_damaged")
    return {name: values.astype(np.float64) for name, values in found.items()}
