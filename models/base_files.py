"""The files of a base model's folder that decide what a record becomes and what is computed with it, known by one hash.

Weights alone do not identify a model: one more line in a tokenizer gives a word another number, and whoever may change that line
without anybody seeing it can ask who holds the word.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from cotune.models.errors import ModelError

# Weights and their index, configuration, tokenizer, preprocessor, chat templates: whatever transformers opens. Code and pickles
# are never opened, and a README decides nothing.
_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".spm", ".codes", ".tokenizer", ".tiktoken")
_POOLING = "1_Pooling/config.json"
HUB_FILES = [f"*{suffix}" for suffix in _SUFFIXES]  # what is fetched from the hub; the patterns reach into folders


def deciding_files(folder: Path) -> dict[str, Path]:
    """Name within the folder -> file, in the order of names; links are followed."""
    found = {file.name: file for file in folder.iterdir() if decides(file.name) and file.is_file()}
    if (folder / _POOLING).is_file():
        found[_POOLING] = folder / _POOLING
    return dict(sorted(found.items()))


def decides(name: str) -> bool:
    """Whether a file of that name at the top of a model's folder is part of the model."""
    return name.endswith(_SUFFIXES) and not name.startswith(".")


def content_hash(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of the deciding files: equal for every copy of the folder.

    Files are streamed, and one that is unchanged by size and time is read once per process. Raises ModelError.
    """
    total = hashlib.sha256()
    try:
        for name, file in deciding_files(folder).items():
            status = file.stat()
            total.update(f"{name}\0{_digest(str(file), status.st_size, status.st_mtime_ns)}\n".encode())
    except OSError as error:
        raise ModelError(
            f"the base model's folder {folder} cannot be read ({error.strerror}): expected readable files; check its permissions"
        ) from None
    return total.hexdigest()


@lru_cache(maxsize=1024)
def _digest(file: str, size: int, mtime_ns: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_named_weights(folder: Path) -> None:
    """Refuses a folder whose files name weights that the hash does not cover. Raises ModelError."""
    for source, name in _named_weights(folder):
        if "/" in name or "\\" in name or not name.endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(
                f"the base model's {source} names the weights {name[:80]!r}: expected *.safetensors in the folder itself, as"
                " the hash covers no others; save the model again with save_pretrained()"
            )


def _named_weights(folder: Path) -> list[tuple[str, str]]:
    """(file that names them, name), of config.json and of the indexes; what cannot be read is refused by who loads it."""
    found = [("config.json", _read(folder / "config.json").get("transformers_weights"))]
    for index in sorted(folder.glob("*.index.json")):
        shards = _read(index).get("weight_map")
        found += [(index.name, name) for name in (shards.values() if isinstance(shards, dict) else ())]
    return [(source, str(name)) for source, name in found if name is not None]


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def revision_of(folder: Path) -> str | None:
    """The commit of a snapshot of the Hugging Face hub, which its folder is named for; None for another folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
