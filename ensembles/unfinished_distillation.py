"""What is kept of a distillation until it is done: its settings, and the student after the last pass.

During the distillation it is `<folder>.part` beside the new folder. After an interruption, the same command continues from there,
and gives the same student.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cotune.errors import RunError
from cotune.models.trainable import State
from cotune.storage.files import atomic_write
from cotune.storage.json_documents import JsonDocument

_SETTINGS = "settings.json"


def part_folder(out: Path) -> Path:
    """Return the folder of work on `out` that is not finished."""
    return out.with_name(f"{out.name}.part")


def begin_work(part: Path, settings: dict[str, Any]) -> None:
    """Begin in a new folder, or go on in one of the same settings.

    Args:
        part: The folder.
        settings: Everything that decides the student, as plain values.

    Raises:
        RunError: If the folder holds work with other settings.
    """
    part.mkdir(parents=True, exist_ok=True)
    document = JsonDocument(part / _SETTINGS, dict[str, Any], advice="remove the folder")
    before = document.read()
    if before is None:
        document.write(settings)
    elif before != settings:
        raise RunError(
            f"{part} holds an unfinished distillation with other settings: finish that one, or remove the folder",
            code="run.other_settings",
        )


def keep_pass(part: Path, epoch: int, state: State) -> None:
    """Keep the student after a pass, durably, and no earlier one any more.

    Args:
        part: The folder.
        epoch: Number of the pass, from 1.
        state: What is trained of the student.
    """
    file = part / f"pass-{epoch:04d}.safetensors"
    atomic_write(file, save({name: tensor.contiguous() for name, tensor in state.items()}))
    for earlier in set(part.glob("pass-*.safetensors")) - {file}:
        earlier.unlink()


def newest_pass(part: Path) -> tuple[int, State]:
    """Return the number of finished passes, and the state after them. Raises RunError."""
    kept = sorted(part.glob("pass-*.safetensors"))
    if not kept:
        return 0, {}
    return int(kept[-1].stem.removeprefix("pass-")), read_tensors(kept[-1])


def read_tensors(file: Path, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises RunError for one that is damaged, or lacks one of the names."""
    try:
        found = load_file(file)
        return {**found, **{name: found[name] for name in names}}
    except (SafetensorError, KeyError):
        raise RunError(f"{file} is damaged: remove it, and run the same command again", code="run.damaged_file") from None
