"""The files of a base model's folder: which of them determine results, reading config.json, and diagnosing damaged files.

Weights alone do not identify a model: one more line in a tokenizer gives a word another number, and anyone who could change that
line unnoticed could find out who has the word. A chat template likewise determines how a conversation is encoded.

If a folder cannot be loaded, this module finds the damaged file, as libraries name only a symptom. config.json is untrusted: it
must be a JSON object in UTF-8, and may contain label names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cotune.data.class_names import class_name
from cotune.errors import ModelError

# Weights and their index, configuration, tokenizer, preprocessor, chat templates: whatever transformers opens. Code and pickles
# are never opened, and a README decides nothing.
_JSON = ".json"
_WEIGHTS = ".safetensors"
_INDEX = ".safetensors.index.json"  # which of several files holds which weight
_VOCABULARY = ".model"
_SUFFIXES = (_WEIGHTS, _JSON, ".txt", _VOCABULARY, ".jinja", ".spm", ".codes", ".tokenizer", ".tiktoken")
_POOLING = "1_Pooling/config.json"
ENCODER = "encoder"  # the folder of the unchanged encoder, in that of a head on its layers (see `features.layer_folder`)
FUSION_FILE = "fusion.json"  # in the folder of a fused model (see `fused_folder`), with its members in `models/`
META_MODEL = "meta_model.safetensors"
MEMBERS = "models"
_TEMPLATES = "additional_chat_templates"  # the folder of named chat templates beside chat_template.jinja
HUB_FILES = [f"*{suffix}" for suffix in _SUFFIXES]  # what is fetched from the hub; the patterns reach into folders


def is_fused(folder: Path) -> bool:
    """Whether a folder holds a fused model."""
    return (folder / FUSION_FILE).is_file()


def member_folder(folder: Path, number: int) -> Path:
    """Return where a fused model keeps a member: the first has the number 1."""
    return folder / MEMBERS / str(number)


def list_model_files(folder: Path) -> dict[str, Path]:
    """Name within the folder -> file, in the order of names; links are followed. Of a fused model, with those of its members."""
    if is_fused(folder):
        return _list_fused_files(folder)
    found = {file.name: file for file in folder.iterdir() if is_model_file(file.name) and file.is_file()}
    inside = [folder / _POOLING, *(folder / _TEMPLATES).glob("*.jinja")]
    inside += [file for file in (folder / ENCODER).glob("*") if is_model_file(file.name)]
    found |= {file.relative_to(folder).as_posix(): file for file in inside if file.is_file()}
    return dict(sorted(found.items()))


def _list_fused_files(folder: Path) -> dict[str, Path]:
    own = {name: folder / name for name in (FUSION_FILE, META_MODEL) if (folder / name).is_file()}
    members = sorted(member for member in (folder / MEMBERS).glob("*") if member.is_dir() and not is_fused(member))
    inside = {f"{MEMBERS}/{m.name}/{name}": file for m in members for name, file in list_model_files(m).items()}
    return dict(sorted({**own, **inside}.items()))


def is_model_file(name: str) -> bool:
    """Whether a file of that name at the top of a model's folder is part of the model.

    Hidden files are not, but for those that transformers finds where it looks for any vocabulary of SentencePiece.
    """
    return name.endswith(_VOCABULARY) or (name.endswith(_SUFFIXES) and not name.startswith("."))


def has_weights(folder: Path) -> bool:
    """Return whether anything in the folder is called *.safetensors, be it whole, damaged or a broken link.

    A fused model is never without the weights of its members.
    """
    return is_fused(folder) or any(folder.glob(f"*{_WEIGHTS}"))


def content_hash(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of the deciding files: equal for every copy of the folder.

    Files are streamed, and one that is unchanged by size and time is read once per process. Raises ModelError.
    """
    return _hash_files(folder, lambda name: True)


def config_hash(folder: Path) -> str:
    """Return the same hash over all of these files but the weights and their index. Raises ModelError."""
    return _hash_files(folder, lambda name: not name.endswith((_WEIGHTS, _INDEX)))


def _hash_files(folder: Path, is_wanted: Callable[[str], bool]) -> str:
    total = hashlib.sha256()
    try:
        for name, file in list_model_files(folder).items():
            if not is_wanted(name):
                continue
            status = file.stat()
            total.update(f"{name}\0{_digest(str(file), status.st_size, status.st_mtime_ns)}\n".encode())
    except OSError as error:
        raise ModelError(
            f"the base model's folder {folder} cannot be read ({error.strerror}): expected readable files; check its permissions",
            code="model.not_readable",
        ) from None
    return total.hexdigest()


@lru_cache(maxsize=1024)
def _digest(file: str, size: int, mtime_ns: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_named_weights(folder: Path) -> None:
    """Refuses a folder whose files name weights that the hash does not cover. Raises ModelError."""
    for source, name in _named_weights(folder):
        if "/" in name or "\\" in name or not name.endswith((_WEIGHTS, _INDEX)):
            raise ModelError(
                f"the base model's {source} names the weights {name[:80]!r}: expected *.safetensors in the folder itself, as"
                " the hash covers no others; save the model again with save_pretrained()",
                code="model.weights_outside_folder",
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


def get_revision(folder: Path) -> str | None:
    """The commit of a snapshot of the Hugging Face hub, which its folder is named for; None for another folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def find_damage(folder: Path) -> str | None:
    """Return the first damaged file and its fault, such as "tokenizer.json, which is not JSON in UTF-8 (…)"; None without one."""
    try:
        files = list_model_files(folder)
    except OSError as error:
        return f"a folder that cannot be read ({error.strerror})"
    return next(_damages(files), None) if files else None


def _damages(files: dict[str, Path]) -> Iterator[str]:
    for name, file in files.items():
        if name.endswith(_JSON):
            yield from (f"{name}, {problem}" for problem in _json_damages(name, file, files))
        elif name.endswith(_WEIGHTS):
            yield from (f"{name}, {problem}" for problem in _weight_damages(file))


def _json_damages(name: str, file: Path, files: dict[str, Path]) -> Iterator[str]:
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


def _weight_damages(file: Path) -> Iterator[str]:
    try:
        with safe_open(file, framework="numpy") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        yield f"which holds no tensors ({str(error).splitlines()[0][:120]})"


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        ModelError: For a file that is not one JSON object in UTF-8 without a byte order mark (which transformers cannot read).
    """
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read ({error.strerror}): expected the base model's configuration", code="model.not_readable"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} is not JSON in UTF-8 ({str(error).splitlines()[0][:120]}): expected the base model's configuration as"
            " save_pretrained() writes it; download the folder again, or save the file without a byte order mark",
            code="model.damaged_config",
        ) from None
    if not isinstance(settings, dict):
        raise ModelError(
            f"{file} holds a {type(settings).__name__}, expected a JSON object: download the folder again",
            code="model.damaged_config",
        )
    return settings


def read_base_labels(folder: Path) -> tuple[str, ...]:
    """Return the label names that config.json declares, in the order of the head; empty for generic ones.

    Of a fused model they are in fusion.json.

    Raises:
        ModelError: When `id2label` is not an object from the numbers 0, 1, … to names.
    """
    if is_fused(folder):
        return _read_fused_labels(folder)
    names = read_settings(folder).get("id2label") or {}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise ModelError(
            f"{folder / 'config.json'} has id2label = {json.dumps(names)[:80]}: expected an object from 0, 1, … to the"
            ' names of the classes, such as {"0": "bad", "1": "good"}',
            code="model.damaged_config",
        )
    ordered = tuple(class_name(str(names[str(number)])) for number in range(len(names)))
    return () if all(name.startswith("LABEL_") for name in ordered) else ordered


def _read_fused_labels(folder: Path) -> tuple[str, ...]:
    names = _read(folder / FUSION_FILE).get("labels")
    return tuple(class_name(str(name)) for name in names) if isinstance(names, list) else ()
