from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cotune.data.config import DataConfig
from cotune.data.dataset import Dataset, DatasetManifest, write_manifest
from cotune.data.tasks.text import encode
from cotune.errors import DataError
from cotune.models.encoding import encoded_examples, encoded_features
from cotune.models.features.cached import get_features
from cotune.models.trainable import TrainableModel
from tests.support.failures import fails_with

LABELS = ("good", "bad", "so")  # the plan's order, not the alphabet's


def csv(path: Path, *rows: tuple[str, str]) -> Path:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return csv(tmp_path / "first.csv", ("great day", "good"), ("awful", "bad"), ("a tree", "so"), ("the road", "so"))


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return csv(tmp_path / "second.csv", ("very sad", "bad"), ("happy", "good"))


def config(source: Path) -> DataConfig:
    return DataConfig(source=str(source))


@pytest.fixture
def dataset(tmp_path: Path, first: Path, second: Path) -> Dataset:
    """Three of the four records of one file, in another order, and one of the other file."""
    document = tmp_path / "site" / "data.json"
    write_manifest(document, config(first), [(None, [3, 0, 1]), (second, [1])])
    return DatasetManifest.read(document, LABELS)


def test_rows_of_several_files(dataset: Dataset) -> None:
    assert len(dataset) == 4
    assert dataset.inputs() == ["the road", "great day", "awful", "happy"]
    assert dataset.targets == [2, 0, 1, 0]
    assert dataset.label_counts() == {"good": 2, "bad": 1, "so": 1}


def test_a_document_without_row_numbers_means_all_records(tmp_path: Path, first: Path) -> None:
    document = tmp_path / "data.json"
    document.write_text(f'{{"data": {{"source": "{first}"}}, "portions": [{{"path": null}}]}}')
    assert DatasetManifest.read(document, LABELS).inputs() == ["great day", "awful", "a tree", "the road"]


def test_no_records(tmp_path: Path, first: Path, shared: Callable[..., TrainableModel]) -> None:
    write_manifest(tmp_path / "data.json", config(first), [(None, [])])
    nothing = DatasetManifest.read(tmp_path / "data.json", LABELS)
    assert len(nothing) == 0
    assert nothing.label_counts() == {"good": 0, "bad": 0, "so": 0}
    assert encoded_features(nothing, shared("bert"), {}, "float32").shape == (0, 16)


def test_examples_are_tokens_and_classes(dataset: Dataset, shared: Callable[..., TrainableModel]) -> None:
    model = shared("bert")
    ids = encode(model.loaded.reader, ["the road", "great day", "awful", "happy"], 32)
    assert encoded_examples(dataset, model) == [
        {"input_ids": row, "labels": target} for row, target in zip(ids, [2, 0, 1, 0], strict=True)
    ]


def test_features_are_computed_once_per_file(
    dataset: Dataset,
    first: Path,
    second: Path,
    tmp_path: Path,
    shared: Callable[..., TrainableModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COTUNE_CACHE", str(tmp_path / "cache"))
    model = shared("bert")
    got = encoded_features(dataset, model, {}, "float32")
    one = get_features(model, ["great day", "awful", "a tree", "the road"], {}, "float32")
    other = get_features(model, ["very sad", "happy"], {}, "float32")
    assert torch.equal(got, torch.stack([one[3], one[0], one[1], other[1]]))
    write_manifest(tmp_path / "neighbor.json", config(first), [(None, [2])])
    neighbor = encoded_features(DatasetManifest.read(tmp_path / "neighbor.json", LABELS), model, {}, "float32")
    assert torch.equal(neighbor, one[[2]])
    assert len(list((tmp_path / "cache" / "features").glob("*.safetensors"))) == 2


def test_a_class_that_the_plan_lacks(tmp_path: Path, first: Path) -> None:
    write_manifest(tmp_path / "data.json", config(first), [(None, [0, 1, 2])])
    with fails_with("data.unknown_class", "good"):
        _ = DatasetManifest.read(tmp_path / "data.json", ("good", "new")).targets


@pytest.mark.parametrize("content", ["", "{", "[]", '{"data": {}}', '{"data": {"source": "x"}, "portions": 3}'])
def test_a_damaged_document(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    with fails_with("data.damaged_manifest"):
        DatasetManifest.read(tmp_path / "data.json", LABELS)


def test_a_missing_document(tmp_path: Path) -> None:
    with fails_with("data.damaged_manifest"):
        DatasetManifest.read(tmp_path / "data.json", LABELS)


def test_missing_row_numbers(tmp_path: Path, first: Path) -> None:
    write_manifest(tmp_path / "data.json", config(first), [(None, [0])])
    (tmp_path / "data-rows-0.npy").unlink()
    with pytest.raises(DataError):
        DatasetManifest.read(tmp_path / "data.json", LABELS)


def test_row_numbers_that_are_a_pickle_are_not_opened(tmp_path: Path, first: Path) -> None:
    write_manifest(tmp_path / "data.json", config(first), [(None, [0])])
    (tmp_path / "data-rows-0.npy").write_bytes(b"\x80\x04]\x94.")
    with pytest.raises(DataError):
        DatasetManifest.read(tmp_path / "data.json", LABELS)


def test_a_file_that_has_shrunk(tmp_path: Path, first: Path) -> None:
    write_manifest(tmp_path / "data.json", config(first), [(None, [0, 3])])
    csv(first, ("great day", "good"), ("awful", "bad"))
    with pytest.raises(DataError):
        _ = DatasetManifest.read(tmp_path / "data.json", LABELS).targets


def test_a_file_that_is_gone(tmp_path: Path, first: Path) -> None:
    write_manifest(tmp_path / "data.json", config(first), [(None, [0])])
    first.unlink()
    with fails_with("data.missing_file"):
        DatasetManifest.read(tmp_path / "data.json", LABELS)
