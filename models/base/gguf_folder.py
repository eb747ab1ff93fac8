"""Convert a GGUF file in a Python package to an ordinary model folder in cotune's cache.

GGUF is the format of llama.cpp: quantized weights, configuration, tokenizer and chat template in one file. transformers extracts
all of them, weights as float32, which represents each quantized value exactly. The folder is written once per content of the
file, and atomically.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cotune.data.inputs.declared_counts import check_declared_counts
from cotune.errors import ModelError, RunError, reason_of
from cotune.storage.files import exclusive_lock

_FORMAT = "1"  # of the folders, to be raised where what is written changes
_SAID_BY_LIBRARIES = ("transformers_version", "quantization_config", "_model_name_or_path")  # of config.json: no part of a model


def find_gguf(folder: Path) -> Path | None:
    """Return the only GGUF file in a folder; None where there is none, or more than one."""
    found = sorted(folder.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def get_converted(file: Path) -> Path:
    """Return a folder with configuration, safetensors, tokenizer and chat template of a GGUF file; it is made if there is none.

    Raises:
        ModelError: Where the file cannot be read or is of no causal language model, or the cache cannot be written.
    """
    if find_spec("gguf") is None:
        raise ModelError(
            f'{file.name} is a GGUF file, which needs the Python package gguf: run `pip install "cotune[text-demo]"`',
            code="model.missing_package",
        )
    from cotune.models.check_cache import cache_folder  # loads PyTorch, which commands that load no model need not wait for

    with file.open("rb") as stream:
        name = hashlib.sha256(_FORMAT.encode() + hashlib.file_digest(stream, "sha256").digest()).hexdigest()
    target = cache_folder() / "models" / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.parent.chmod(0o700)
        with exclusive_lock(target.with_suffix(".lock")):
            if not _is_whole(target):
                _make(file, target)
    except (OSError, RunError) as error:
        raise ModelError(
            f"the folder {target.parent} for converted models cannot be written ({reason_of(error)}): expected one of your own;"
            " name another with the environment variable COTUNE_CACHE",
            code="model.not_writable",
        ) from None
    return target


def _is_whole(folder: Path) -> bool:
    """Folders get their name as the last step; one that another user may have written to is none."""
    from cotune.models.check_cache import is_own

    try:
        return is_own(folder) and is_own(folder / "config.json")
    except OSError:
        return False


def _make(file: Path, target: Path) -> None:
    """Under the lock, so that what a killed process has left is removed."""
    parts = target.with_suffix(".part")
    for leftover in (target, parts):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        parts.mkdir(mode=0o700)
        _convert(file, parts)
        parts.rename(target)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cotune.models.base.bounded_parts import bounded_parts, count_entries
    from cotune.models.base.silence import silence_transformers

    _check_counts(file)
    given: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with silence_transformers(), bounded_parts(count_entries(file.parent)):
            read = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype="float32", **given)
            plain = AutoModelForCausalLM.from_config(_own_settings(read.config))  # saving the one that was read raises
            plain.load_state_dict(read.state_dict())
            plain.save_pretrained(folder)
            AutoTokenizer.from_pretrained(str(file.parent), **given).save_pretrained(folder)
    except Exception as error:  # each architecture and each damage has its own
        if isinstance(error, OSError) and error.errno is not None:  # the disk, and not what a library says of the file
            raise
        raise ModelError(
            f"{file.name} cannot be converted ({reason_of(error)[:200]}): expected a GGUF file of a causal language model that"
            " transformers reads; install its package again, or name another base model",
            code="model.not_loadable",
        ) from None
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _drop(folder / name, _SAID_BY_LIBRARIES)


def _check_counts(file: Path) -> None:
    """Check the numbers of layers and the like that a file says. One that cannot be read is left to transformers."""
    from gguf import GGUFReader, GGUFValueType

    try:
        fields = GGUFReader(file).fields.values()
    except Exception:  # whatever a damaged file makes it raise
        return
    whole = [field for field in fields if len(field.types) == 1 and field.types[0] is not GGUFValueType.STRING]
    check_declared_counts({field.name: field.parts[-1].tolist()[0] for field in whole})


def _own_settings(config: Any) -> Any:
    for name in _SAID_BY_LIBRARIES:
        with contextlib.suppress(AttributeError):
            delattr(config, name)
    return config


def _drop(file: Path, keys: tuple[str, ...]) -> None:
    """So that two versions of a library write the same folder, as far as they agree on the model."""
    if file.is_file():
        settings = json.loads(file.read_bytes())
        file.write_text(json.dumps({k: v for k, v in settings.items() if k not in keys}, indent=2, sort_keys=True) + "\n")
