"""A head as an ONNX file: what it computes beside the model itself, what it says of itself, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from cotune.models.base.folder import content_hash
from cotune.models.evaluation.predictor import open_predictor
from cotune.models.features import onnx_head
from cotune.models.features.layer_folder import HEAD_FILE
from cotune.models.features.onnx_head import ONNX_FILE, build_onnx_head, write_onnx_head
from tests.support.exported_models import export_random, export_random_layers
from tests.support.failures import fails_with

onnx = pytest.importorskip("onnx")
from onnx.reference import ReferenceEvaluator  # noqa: E402

LABELS = ("schlecht\n", 'gut "🙂"', "so, so", "\u202eобратно", "ok")
TEXTS = ["great table", "tree great bad great table awful lamp", "lamp lamp", "awful tree"]
LAYERS = (0, 2)


@pytest.fixture(scope="module", params=["public", "none"])
def exported(request: pytest.FixtureRequest, base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    return export_random_layers(base_model("bert"), folder, LABELS, seed=3, layers=LAYERS, whiten=request.param)


def read_features(folder: Path) -> Tensor:
    """What the documentation says the features are, with transformers alone."""
    batch = AutoTokenizer.from_pretrained(folder / "encoder")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder / "encoder").eval()(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"][:, :, None].float()
    means = [(hidden[layer] * mask).sum(1) / mask.sum(1) for layer in LAYERS]
    return torch.cat([*means, hidden[-1][:, 0]], 1)


def evaluate(file: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and probabilities of ONNX's own reference implementation."""
    found = ReferenceEvaluator(str(file) if isinstance(file, Path) else file).run(
        ["logits", "probabilities"], {"features": features.numpy()}
    )
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def test_file_computes_what_the_model_predicts(exported: Path, tmp_path: Path) -> None:
    predictor = open_predictor(str(exported), "cpu")
    logits, probabilities = evaluate(write_onnx_head(str(exported), tmp_path / "x.onnx"), read_features(exported))
    predicted = torch.cat(predictor.probabilities(TEXTS))
    torch.testing.assert_close(probabilities.double(), predicted, atol=1e-5, rtol=1e-5)
    loaded = predictor.model.loaded
    batch = loaded.task.collator(predictor.model.module, loaded.reader, predictor.model.device)(loaded.encode_unlabeled(TEXTS))
    with torch.no_grad():
        torch.testing.assert_close(logits, loaded.task.scores(predictor.model.module, batch), atol=1e-4, rtol=1e-4)


def test_file_says_what_it_is(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(write_onnx_head(str(exported), tmp_path / "x.onnx"))
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert tuple(json.loads(facts["labels"])) == open_predictor(str(exported), "cpu").labels
    assert (json.loads(facts["layers"]), json.loads(facts["cls"])) == (list(LAYERS), True)
    assert facts["encoder_sha256"] == content_hash(exported / "encoder")
    assert "layers 0, 2" in model.graph.input[0].doc_string
    assert [(s.domain, s.version) for s in model.opset_import] == [("", 13)]
    onnx.checker.check_model(model, full_check=True)


def test_file_is_the_same_each_time(exported: Path, tmp_path: Path) -> None:
    first, second = (write_onnx_head(str(exported), tmp_path / name).read_bytes() for name in ("a.onnx", "b.onnx"))
    assert first == second


def test_safetensors_say_what_they_are(exported: Path) -> None:
    with safe_open(exported / HEAD_FILE, framework="pt") as opened:
        metadata = opened.metadata()
    labels = list(open_predictor(str(exported), "cpu").labels)
    assert json.loads(metadata["head"]) == {"labels": labels, "layers": list(LAYERS), "cls": True}


def test_it_is_written_beside_the_tensors_and_changes_no_hash(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = export_random_layers(base_model("bert"), tmp_path / "model", LABELS, seed=3, layers=LAYERS, whiten="none")
    before = content_hash(folder)
    assert write_onnx_head(str(folder)) == folder / ONNX_FILE
    assert (folder / ONNX_FILE).stat().st_mode & 0o777 == 0o644
    assert content_hash(folder) == before
    assert open_predictor(str(folder), "cpu").content_hash == before
    with fails_with("model.file_exists"):
        write_onnx_head(str(folder))


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(1, 12),
    width=st.integers(1, 24),
    rows=st.integers(0, 5),
    mapped=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_any_head_is_computed_as_pytorch_does(classes: int, width: int, rows: int, mapped: bool, scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"weight": (classes, width), "bias": (classes,)} | ({"center": (width,), "matrix": (width, width)} if mapped else {})
    tensors = {name: scale * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    features = torch.randn(rows, width, generator=draw)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    x = (features.double() - wide["center"]) @ wide["matrix"].T if mapped else features.double()
    expected = x @ wide["weight"].T + wide["bias"]
    size = x.abs() @ wide["weight"].abs().T + wide["bias"].abs()  # of what is added up: float32 rounds relative to it
    if mapped:
        size += ((features.abs().double() + wide["center"].abs()) @ wide["matrix"].abs().T) @ wide["weight"].abs().T
    logits, probabilities = evaluate(build_onnx_head(tensors, "anything", {}), features)
    assert bool(((logits.double() - expected).abs() <= 1e-5 * size + 1e-30).all())
    torch.testing.assert_close(probabilities, logits.softmax(1))


def test_heads_of_many_classes_are_written() -> None:
    tensors = {"weight": torch.randn(10_000, 6), "bias": torch.randn(10_000)}
    features = torch.randn(3, 6)
    logits, _ = evaluate(build_onnx_head(tensors, "anything", {}), features)
    torch.testing.assert_close(logits, features @ tensors["weight"].T + tensors["bias"], atol=1e-4, rtol=1e-4)


def test_plain_models_are_refused(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    plain = export_random(base_model("bert"), tmp_path / "model", ("x", "y"), seed=1)
    with fails_with("model.no_head_file"):
        write_onnx_head(str(plain))


def test_damaged_heads_are_refused(base_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = export_random_layers(base_model("bert"), tmp_path / "model", LABELS, seed=3, layers=LAYERS, whiten="none")
    tensors = load_file(folder / HEAD_FILE)
    save_file({**tensors, "bias": tensors["bias"] * torch.inf}, folder / HEAD_FILE)
    with fails_with("model.layers_damaged"):
        write_onnx_head(str(folder))
    assert not (folder / ONNX_FILE).exists()


def test_heads_beyond_a_protocol_buffer_are_refused(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_head, "_MOST_BYTES", 100)
    with fails_with("model.onnx_too_large"):
        write_onnx_head(str(exported), tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_head, "find_spec", lambda name: None)
    with fails_with("model.missing_package"):
        write_onnx_head(str(exported), tmp_path / "x.onnx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(exported: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with fails_with("model.not_writable"):
        write_onnx_head(str(exported), tmp_path / "x.onnx")


def test_a_file_in_the_place_of_a_folder_is_named(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with fails_with("model.not_writable"):
        write_onnx_head(str(exported), tmp_path / "taken" / "x.onnx")
