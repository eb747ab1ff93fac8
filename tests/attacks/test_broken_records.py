"""Attack: a record that makes a site fail tells that somebody holds it.

A sentence with one tag too few, or a broken image, ended the round of exactly the site that held it, before anything was
charged; so did a line that is no JSON, or one with more fields than a CSV file has columns. At a real site such a record is left out now, like one without a label; who simulates is still told of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.data.config import DataConfig, TaskName
from cotune.data.dataset import DatasetManifest, FileSlice
from cotune.errors import DataError

TAGS = ("B", "O")


def described(folder: Path, source: Path, task: TaskName, data: DataConfig) -> Path:
    file = folder / "data.json"
    file.write_text(DatasetManifest(task=task, data=data, portions=(FileSlice(path=source),)).model_dump_json())
    return file


def sentences(folder: Path, *broken: dict[str, list[str]]) -> Path:
    rows = [{"text": ["a", "road"], "label": ["O", "B"]}, {"text": ["fine"], "label": ["O"]}, *broken]
    source = folder / "tags.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return source


def test_a_wrong_number_of_tags_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    data = DataConfig(source="tags.jsonl")
    one = described(tmp_path, sentences(tmp_path), "token-classification", data)
    without = DatasetManifest.read(one, TAGS, lenient=True)
    (tmp_path / "b").mkdir()
    source = sentences(tmp_path / "b", {"text": ["two", "words"], "label": ["O"]})
    other = described(tmp_path / "b", source, "token-classification", data)
    with_it = DatasetManifest.read(other, TAGS, lenient=True)
    assert with_it.inputs() == without.inputs()
    assert with_it.targets == without.targets
    assert with_it.parts[0][0].skipped == {"unreadable": 1}
    with pytest.raises(DataError):
        DatasetManifest.read(other, TAGS)


def test_a_broken_image_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    source = tmp_path / "images.csv"
    source.write_text("image,label\ngood.png,red\nbroken.png,blue\n", encoding="utf-8")
    file = described(tmp_path, source, "image-classification", DataConfig(source="images.csv", image="image"))
    held = DatasetManifest.read(file, ("blue", "red"), lenient=True)
    assert len(held) == 1
    with pytest.raises(DataError):
        DatasetManifest.read(file, ("blue", "red"))


@pytest.mark.parametrize(
    ("name", "good", "broken"),
    [
        ("tags.jsonl", ['{"text": "a", "label": "B"}', '{"text": "b", "label": "O"}'], '{"text": "c"'),
        ("tags.jsonl", ['{"text": "a", "label": "B"}', '{"text": "b", "label": "O"}'], '["c", "O"]'),
        ("tags.csv", ["text,label", '"a ""quoted"", b",B', "b,O"], "c,d,O"),
        ("tags.csv", ["text,label", '"a ""quoted"", b",B', "b,O"], '"c,O,d'),
        ("tags.tsv", ["text\tlabel", "a\tB", "b\tO"], "c\td\tO"),
    ],
)
def test_a_malformed_line_leaves_the_others_as_they_are(tmp_path: Path, name: str, good: list[str], broken: str) -> None:
    source = tmp_path / name
    config = DataConfig(source=name)
    source.write_text("\n".join(good), encoding="utf-8")
    without = DatasetManifest.read(described(tmp_path, source, "sequence-classification", config), TAGS, lenient=True)
    source.write_text("\n".join([*good, broken]), encoding="utf-8")
    with_it = DatasetManifest.read(tmp_path / "data.json", TAGS, lenient=True)
    assert with_it.inputs() == without.inputs()
    assert with_it.targets == without.targets
    assert with_it.parts[0][0].skipped == {"unreadable": 1}
    with pytest.raises(DataError):
        DatasetManifest.read(tmp_path / "data.json", TAGS)


def test_several_malformed_lines_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "tags.csv"
    source.write_text('text,label\na,B\n1,2,O\n\n1,2,3\nb,O\n"c,O\nd,O\n', encoding="utf-8")
    held = DatasetManifest.read(
        described(tmp_path, source, "sequence-classification", DataConfig(source="x")), TAGS, lenient=True
    )
    assert list(held.inputs()) == ["a", "b", '"c', "d"]  # a stray quote is a character, where its line is a record by itself
    assert held.parts[0][0].skipped == {"unreadable": 2}
