"""The fine-tuned model as a plain Hugging Face folder: `transformers.pipeline` loads it as it is, whatever the task."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import AutoConfig

from cotune.data.tasks.multi_task import MultiTask
from cotune.errors import ModelError
from cotune.models.adapters.export import export_adapters, has_adapters_alone
from cotune.models.adapters.lora import merge_adapters
from cotune.models.base.folder import ENCODER
from cotune.models.base.load import dropout_settings
from cotune.models.base.quantized_layers import use_wide_layers
from cotune.models.base.silence import silence_transformers
from cotune.models.base.stored_precision import widen
from cotune.models.features.layer_features import LayerClassifier
from cotune.models.features.layer_folder import is_layer_model, write_layer_head
from cotune.models.features.stacked_folder import write_stack
from cotune.models.features.stacked_members import StackedClassifier
from cotune.models.multi_head import MultiHead
from cotune.models.trainable import TrainableModel

ADAPTERS = "adapter"  # the folder of adapters by themselves, in that of the model


def export_model(model: TrainableModel, folder: Path, beside: Mapping[str, str] | None = None) -> None:
    """Write safetensors, configuration with label names, and tokenizer or image processor; adapters are merged into the weights.

    Of a model that keeps its base model's head, the adapters are written by themselves, too: `adapter/`, for peft. Of several
    tasks each is a folder of its own, named for the task, and so are the adapters that they share.

    An earlier export in the folder is replaced once the new one is complete. Anyone who may enter the folder above can read it,
    whatever the umask says. The model itself is left as it is.

    Args:
        model: In the state that is to be exported.
        folder: Where to.
        beside: Name -> text of further files, such as a model card.

    Raises:
        ModelError: The base model's weights are not there.
    """
    task = model.loaded.task
    module: Any = model.loaded.module
    if not model.loaded.folder.has_weights:
        raise ModelError(
            "the model cannot be written whole, as the weights of its base model are not on this machine: expected the base"
            " model's *.safetensors here; the adapters alone can be written, and organizations have the whole model",
            code="model.weights_needed",
        )
    with _replacing(folder) as part:
        if isinstance(module, StackedClassifier):
            write_stack(module, model.loaded.folder.path, part)
        elif isinstance(module, LayerClassifier):
            write_layer_head(module, part)
            _save(model, _merged(module.encoder.base), part / ENCODER, task.problem_type)
        elif isinstance(module, MultiHead):
            merged = _merged(module)
            for name in module.tasks:
                _save(model, merged.classifier(name), part / name, cast(MultiTask, task).part(name).problem_type)
        else:
            merged = _merged(module)
            task.finish(merged)
            _save(model, merged, part, task.problem_type)
        if has_adapters_alone(model):
            export_adapters(model, part / ADAPTERS)
        for name, text in (beside or {}).items():
            (part / name).write_text(text, encoding="utf-8")


def export_adapters_alone(model: TrainableModel, folder: Path, base: str, card: str) -> None:
    """Write a model's adapters for peft, and what reads its inputs; the base model's weights need not be there.

    An earlier export in the folder is replaced once the new one is complete.

    Args:
        model: In the state that is to be exported; its adapters are of use alone (`has_adapters_alone`).
        folder: Where to.
        base: Name of the base model.
        card: Text of the model card, written as README.md.
    """
    with _replacing(folder) as part:
        export_adapters(model, part, base)
        (part / "README.md").write_text(card, encoding="utf-8")
        model.loaded.reader.save_pretrained(part)
        _limit_length(part, model.loaded.max_length)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder, which takes the place of the old one after the block, and which everybody can read."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".model."))
    try:
        yield part
        _open_to_readers(part)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _merged(module: Any) -> Any:
    """A copy on the CPU, with its adapters added to its weights; those of 4 bits are widened, as they were trained on."""
    copied = _copy_to_cpu(module)
    use_wide_layers(copied)
    for parameter in copied.parameters():
        widen(parameter)
    merge_adapters(copied)
    return copied


def _save(model: TrainableModel, module: Any, folder: Path, problem_type: str | None) -> None:
    """Write a plain model of transformers, or an encoder alone, with what reads its inputs."""
    source = model.loaded.folder.path
    _restore_dropout(module.config, source / ENCODER if is_layer_model(source) else source)
    module.config.problem_type = problem_type
    with silence_transformers():
        module.save_pretrained(folder)
    model.loaded.reader.save_pretrained(folder)
    _limit_length(folder, model.loaded.max_length)


def _copy_to_cpu(module: Any) -> Any:
    """A copy on the CPU, which takes no memory of the device that the module is on."""
    copies: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        copied = tensor.detach().to("cpu", copy=True)
        copies[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return copy.deepcopy(module, copies)


def _restore_dropout(config: Any, base: Path) -> None:
    """Training here was without dropout; who fine-tunes on gets the base model's own setting."""
    original = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    for key, value in dropout_settings(original).items():
        setattr(config, key, value)


def _limit_length(folder: Path, longest: int) -> None:
    """Anyone who asks for truncation gets the length of training; a tokenizer alone (tokenizer.json) truncates by itself."""
    settings = _edit(folder / "tokenizer_config.json", {"model_max_length": longest})
    side = str(settings.get("truncation_side", "right")).capitalize()
    how = {"direction": side, "max_length": longest, "strategy": "LongestFirst", "stride": 0}
    _edit(folder / "tokenizer.json", {"truncation": how})


def _edit(file: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change keys of a JSON object, where there is one (an image processor has neither file), and return it."""
    if not file.exists():
        return {}
    content = {**json.loads(file.read_bytes()), **changes}
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return content


def _open_to_readers(folder: Path) -> None:
    """Weights come as 0600 and folders as the umask has them: another user serves the model."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
