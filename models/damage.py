"""What is wrong with a model folder's files, looked for where it could not be loaded: libraries name a symptom, and no file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cotune.models.base_files import deciding_files

_JSON = ".json"
_WEIGHTS = ".safetensors"


def damage_of(folder: Path) -> str | None:
    """Return the first damaged file and its fault, such as "tokenizer.json, which is not JSON in UTF-8 (…)"; None without one."""
    try:
        files = deciding_files(folder)
    except OSError as error:
        return f"a folder that cannot be read ({error.strerror})"
    return next(_damages(files), None) if files else None


def _damages(files: dict[str, Path]) -> Iterator[str]:
    for name, file in files.items():
        if name.endswith(_JSON):
            yield from (f"{name}, {problem}" for problem in _of_json(name, file, files))
        elif name.endswith(_WEIGHTS):
            yield from (f"{name}, {problem}" for problem in _of_weights(file))


def _of_json(name: str, file: Path, files: dict[str, Path]) -> Iterator[str]:
    try:
        found = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        yield f"which cannot be read ({error.strerror})"
        return
    except (ValueError, RecursionError) as error:
        yield f"which is not JSON in UTF-8 without a byte order mark ({str(error).splitlines()[0][:120]})"
        return
    if name.endswith(".index.json"):
        shards = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(shards, dict):
            yield "which names no weights (weight_map)"
            return
        absent = sorted({str(shard) for shard in shards.values()} - files.keys())
        yield from (f"which names {len(absent)} files that are not there, such as {absent[0]}" for _ in absent[:1])
    elif name.endswith("config.json") and not isinstance(found, dict):
        yield f"which holds a {type(found).__name__} and no object"


def _of_weights(file: Path) -> Iterator[str]:
    try:
        with safe_open(file, framework="numpy") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        yield f"which holds no tensors ({str(error).splitlines()[0][:120]})"
