"""A head on layers as an ONNX file: features go in, logits and probabilities come out.

ONNX runtimes apply the file without PyTorch and without cotune. Its graph is what `LayerClassifier` computes behind its encoder,
with the tensors of `head.safetensors` under their names:

    features (n, d) - center → · matrixᵀ → · weightᵀ + bias = logits (n, classes) → softmax = probabilities

Without a map, the first two steps are left out. What the features are, the label names, and the hashes of the head and of the
encoder that it belongs to, are in the file's metadata. Operators are those of ONNX's operator set 13, which every runtime since
2021 knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from cotune.data.readers.sources import get_base_path
from cotune.errors import ModelError
from cotune.models.base.finished import speaking_of_models
from cotune.models.base.folder import ENCODER, content_hash
from cotune.models.base.lookup import find_base
from cotune.models.config import ModelConfig
from cotune.models.features.layer_folder import HEAD_FILE, LayerDocument, is_layer_model, read_layer_model
from cotune.storage.files import atomic_write

ONNX_FILE = "head.onnx"  # its name beside head.safetensors
_OPERATORS = 13  # the first set in which a softmax is along one axis
_MOST_BYTES = 2**31 - 2**20  # of a protocol buffer, less room for all but the tensors
_READABLE = 0o644  # as the other files of a model


def write_onnx_head(source: str, file: Path | None = None) -> Path:
    """Write the head of a finished model as an ONNX file.

    Args:
        source: The model's folder, or a hub id.
        file: Where to, a new file; None: `head.onnx` beside `head.safetensors`; in the working directory for a hub id.

    Returns:
        The file.

    Raises:
        ModelError: The package onnx is not installed; the model has no head on layers, or is damaged; the head is too large for
            ONNX; the file exists, or cannot be written.
    """
    _check_installed()
    folder = _find_folder(source)
    target = file or (Path() if get_base_path(source) is None else folder) / ONNX_FILE
    if target.exists() or target.is_symlink():
        raise ModelError(
            f"{target} is there already: expected the name of a new file, as nothing is overwritten", code="model.file_exists"
        )
    document, tensors = read_layer_model(folder)
    built = build_onnx_head(tensors, describe_features(document), _facts(folder, document))
    try:
        atomic_write(target, built.SerializeToString())
        target.chmod(_READABLE)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error.strerror}): choose another file with --out", code="model.not_writable"
        ) from None
    return target


def _find_folder(source: str) -> Path:
    with speaking_of_models():
        folder = find_base(ModelConfig(base=source)).path
    if not is_layer_model(folder):
        raise ModelError(
            f"{source} has no head on layers: expected a model with {HEAD_FILE}, from a plan with model.feature; a plain model of"
            " Hugging Face is exported with its own tools",
            code="model.no_head_file",
        )
    return folder


def build_onnx_head(tensors: Mapping[str, Tensor], features: str, facts: Mapping[str, str]) -> Any:
    """Return the graph of a head as an `onnx.ModelProto`.

    Args:
        tensors: `weight` (classes, d) and `bias` (classes), and for a map `center` (d) and `matrix` (d, d), in float32.
        features: What the features are, in words.
        facts: Metadata, text by key.

    Raises:
        ModelError: The tensors are larger than an ONNX file can be.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    _check_size(tensors)
    classes, width = tensors["weight"].shape
    nodes = [
        helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    if "matrix" in tensors:
        nodes[0].input[0] = "mapped"
        nodes[:0] = [
            helper.make_node("Sub", ["features", "center"], ["centered"]),
            helper.make_node("Gemm", ["centered", "matrix"], ["mapped"], transB=1),
        ]
    given = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", width], doc_string=features)
    found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", classes]) for name in ("logits", "probabilities")]
    constants = [numpy_helper.from_array(tensor.contiguous().numpy(), name) for name, tensor in tensors.items()]
    graph = helper.make_graph(nodes, "head", [given], found, constants)
    operators = [helper.make_opsetid("", _OPERATORS)]
    version = helper.find_min_ir_version_for(operators)
    model = helper.make_model(graph, opset_imports=operators, ir_version=version, producer_name="cotune", doc_string=features)
    helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model, full_check=True)
    return model


def describe_features(document: LayerDocument) -> str:
    """Return what a head reads, in words."""
    first = ", and the first token's vector in the last layer" if document.cls else ""
    layers = ", ".join(map(str, document.layers))
    return f"of a text, side by side: the means of the token vectors of layers {layers} (0: the embeddings){first}"


def _facts(folder: Path, document: LayerDocument) -> dict[str, str]:
    """The file's metadata; JSON is ASCII, whatever the names of classes are."""
    return {
        "labels": json.dumps(document.labels),
        "layers": json.dumps(document.layers),
        "cls": json.dumps(document.cls),
        "head_sha256": hashlib.sha256((folder / HEAD_FILE).read_bytes()).hexdigest(),
        "encoder_sha256": content_hash(folder / ENCODER),
    }


def _check_installed() -> None:
    if find_spec("onnx") is None:
        raise ModelError(
            f'{ONNX_FILE} is written with the Python package onnx, which is not installed: run `pip install "cotune[onnx]"`;'
            f" {HEAD_FILE} holds the same head and needs none",
            code="model.missing_package",
        )


def _check_size(tensors: Mapping[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > _MOST_BYTES:
        raise ModelError(
            f"the head takes {size:,} bytes, and an ONNX file at most {_MOST_BYTES:,}: use {HEAD_FILE}",
            code="model.onnx_too_large",
        )
