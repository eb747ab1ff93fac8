"""A head on the layers of an encoder as a folder: `config.json`, `head.safetensors`, and in `encoder/` the base model unchanged.

No architecture of transformers has such a head. So that nobody takes the encoder with a head that was never trained for the
finished model, `config.json` names a kind of model that transformers refuses to load; the model card says how to apply the head
with transformers and ten lines of code.

The head file says by itself what it is: its metadata hold the label names and what the features are, as one JSON object under
one key (safetensors writes several keys in an order drawn by chance). In the folder, `config.json` decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, float32

from cotune.data.class_names import class_name
from cotune.errors import ModelError
from cotune.models.features.layer_features import LayerClassifier
from cotune.storage.config_table import format_validation_error
from cotune.storage.files import atomic_write

_KIND: Literal["cotune-layers"] = "cotune-layers"  # no class of transformers is called so
HEAD_FILE = "head.safetensors"
_METADATA = "head"  # the one key of the head file's metadata


class LayerDocument(BaseModel):
    """The content of `config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["cotune-layers"] = _KIND
    architectures: tuple[Literal["LayersForSequenceClassification"]] = ("LayersForSequenceClassification",)
    problem_type: Literal["single_label_classification"] = "single_label_classification"
    id2label: dict[str, str] = Field(min_length=2)
    layers: tuple[int, ...] = Field(min_length=1, max_length=64)
    cls: bool

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the head."""
        return tuple(class_name(self.id2label[str(number)]) for number in range(len(self.id2label)))

    @model_validator(mode="after")
    def _in_order(self) -> LayerDocument:
        if self.id2label.keys() != {str(number) for number in range(len(self.id2label))}:
            raise ValueError("id2label: expected a name for each of 0, 1, …")
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError("layers: expected different numbers in ascending order")
        return self


def is_layer_model(folder: Path) -> bool:
    """Whether a folder holds a head on layers."""
    return (folder / HEAD_FILE).is_file()


def write_layer_head(module: LayerClassifier, folder: Path) -> None:
    """Write `config.json` and `head.safetensors`.

    Args:
        module: In the state that is to be written.
        folder: It is there.
    """
    encoder = module.encoder
    names = {str(number): name for number, name in module.config.id2label.items()}
    document = LayerDocument(id2label=names, layers=encoder.layers, cls=encoder.cls)
    own = {"weight": module.classifier.weight, "bias": module.classifier.bias}
    map = {"center": encoder.center, "matrix": encoder.matrix} if encoder.is_mapped else {}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in {**own, **map}.items()}
    about = {"labels": document.labels, "layers": document.layers, "cls": document.cls}
    save_file(tensors, folder / HEAD_FILE, metadata={_METADATA: json.dumps(about)})
    atomic_write(folder / "config.json", document.model_dump_json(indent=2).encode())


def read_layer_model(folder: Path) -> tuple[LayerDocument, Mapping[str, Tensor]]:
    """Return what a folder says of its head, and its tensors, of whose shapes and numbers nothing else is known to be right yet.

    Raises:
        ModelError: A file is damaged, or they do not belong together.
    """
    try:
        document = LayerDocument.model_validate_json((folder / "config.json").read_bytes())
        tensors = load_file(folder / HEAD_FILE)
    except ValidationError as error:
        raise _damaged(folder, format_validation_error(error, LayerDocument, "file config.json")) from None
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, f"{HEAD_FILE} or config.json cannot be read ({str(error).splitlines()[0][:120]})") from None
    problem = _find_problem(document, tensors)
    if problem:
        raise _damaged(folder, problem)
    return document, tensors


def _find_problem(document: LayerDocument, tensors: Mapping[str, Tensor]) -> str | None:
    if tensors.keys() not in ({"weight", "bias"}, {"weight", "bias", "center", "matrix"}):
        return f"{HEAD_FILE} holds {', '.join(sorted(tensors))[:80]}"
    weight = tensors["weight"]
    width = weight.shape[-1]
    classes = len(document.id2label)
    wanted: dict[str, tuple[int, ...]] = {
        "weight": (classes, width),
        "bias": (classes,),
        "center": (width,),
        "matrix": (width, width),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[name] or tensor.dtype != float32 or not bool(tensor.isfinite().all()):
            return (
                f"{name} in {HEAD_FILE} is {tuple(tensor.shape)} of {tensor.dtype}, or not finite, where {wanted[name]} belongs"
            )
    return None


def _damaged(folder: Path, problem: str) -> ModelError:
    return ModelError(
        f"the model in {folder} is damaged ({problem}): expected the folder as `cotune` has written it; get it again",
        code="model.layers_damaged",
    )
