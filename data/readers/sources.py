"""What a plan names and is not there, found without PyTorch: a typo must not cost the seconds that it takes to import it.

Git LFS keeps large files elsewhere, and leaves a few lines in their place where it was not asked to fetch them.
"""

from __future__ import annotations

from pathlib import Path

from cotune.errors import DataError, ModelError, RunError

_PACKAGE = "package:"


def check_source(source: object) -> None:
    """Raise DataError for records that are not there. Whatever is no path is left to those who read it."""
    if not isinstance(source, str) or not source or source.startswith(_PACKAGE):
        return
    try:
        there = Path(source).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a path that cannot even be asked for: its reader says why
        return
    if not there:
        raise missing_source_error(source, Path(source))


def missing_source_error(name: str, file: Path) -> DataError:
    """Return the sentence about records that are not there."""
    return DataError(
        f"{name} does not exist (looked for {file.absolute()}): check data.source (or --data, --test)", code="data.missing_file"
    )


def check_file(path: Path) -> None:
    """Raise DataError for a file or folder that is not there."""
    if not path.expanduser().exists():
        raise DataError(
            f"{path} does not exist (looked for {path.expanduser().absolute()}): check the path", code="data.missing_file"
        )


def check_new(path: Path) -> None:
    """Raise RunError for a folder that is to be made and is there."""
    path = path.expanduser().absolute()
    if path.exists() or path.is_symlink():
        raise RunError(
            f"{path} is there already: expected the name of a new folder, as nothing is overwritten", code="run.folder_exists"
        )


def check_base(base: object) -> None:
    """Raise ModelError for a base model that is named as a folder and is none."""
    if not isinstance(base, str):
        return
    try:
        path = get_base_path(base)
        there = path is None or path.is_dir()
    except (OSError, RuntimeError, ValueError):
        return
    if not there:
        raise missing_base_error(base)


def get_base_path(base: str) -> Path | None:
    """Return the folder that a base model's name is the path of; None for a package or a hub id."""
    if base.startswith(_PACKAGE):
        return None
    path = Path(base).expanduser()
    return path.resolve() if path.exists() or base.startswith((".", "/", "~")) else None


def missing_base_error(name: str) -> ModelError:
    """Return the sentence about a base model that is no folder."""
    return ModelError(
        f"the base model {name} is not a folder: expected one with config.json, a tokenizer and safetensors",
        code="model.missing_base",
    )


_START = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024  # bytes of a pointer (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a pointer in place of its content."""
    return start.startswith(_START)


def find_lfs_pointer(files: dict[str, Path]) -> str | None:
    """Return the name of the first pointer among files, or None. Unreadable files are reported when they are loaded."""
    for name, file in files.items():
        try:
            if file.stat().st_size <= _MAX_POINTER_BYTES and is_lfs_pointer(file.read_bytes()):
                return name
        except OSError:
            continue
    return None
