"""Records of two tasks, a mood and a length, of which some have one label alone; each belongs to a person.

With tags there is a third task, which says of each word whether it is a long one.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cotune.plan.load import parse_plan
from cotune.plan.plan import Plan
from tests.support.datasets import sentences

LABELS = ("mood/bad", "mood/good", "mood/so", "length/long", "length/short")
TAGGED = (*LABELS, "words/B-LONG", "words/O")
NewPlan = Callable[..., Plan]


def write_tasks(path: Path, count: int = 240, seed: int = 0, people: int = 60) -> Path:
    """CSV with the columns text, mood, length and person; every third record has no mood, every fifth no length."""
    rows = [("text", "mood", "length", "person")]
    for i, (text, mood) in enumerate(sentences(count, seed)):
        length = "long" if len(text.split()) > 5 else "short"
        rows.append((text, "" if i % 3 == 0 else mood, "" if i % 5 == 1 else length, f"person {i % people}"))
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return path


def write_tagged(path: Path, count: int = 240, seed: int = 0, people: int = 60) -> Path:
    """As `write_tasks`, with a column words: a tag for each word, missing in every fourth record."""
    plain = write_tasks(path.with_name("untagged.csv"), count, seed, people)
    with plain.open(newline="", encoding="utf-8") as stream:
        (*names,), *rows = csv.reader(stream)
    with path.open("w", newline="", encoding="utf-8") as stream:
        tags = (" ".join("B-LONG" if len(word) > 4 else "O" for word in row[0].split()) for row in rows)
        tagged = ([*row, "" if i % 4 == 2 else own] for i, (row, own) in enumerate(zip(rows, tags, strict=True)))
        csv.writer(stream).writerows([[*names, "words"], *tagged])
    return path


@pytest.fixture(scope="session")
def tagged_plan(multi_plan: NewPlan, tmp_path_factory: pytest.TempPathFactory) -> NewPlan:
    """As `multi_plan`, with a third task: a tag for each word."""
    source = write_tagged(tmp_path_factory.mktemp("tagged") / "three.csv")
    tasks = [
        {"name": "mood", "labels": ["bad", "good", "so"]},
        {"name": "length", "labels": ["long", "short"], "weight": 0.5},
        {"name": "words", "type": "token-classification", "labels": ["B-LONG", "O"], "weight": 2.0},
    ]

    def make(kind: str = "shallow-bert", **changes: Any) -> Plan:
        return multi_plan(kind, **{"tasks": tasks, "data": {"source": str(source)}, **changes})

    return make


@pytest.fixture(scope="session")
def multi_plan(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> NewPlan:
    """Changes of top-level keys -> a plan of two tasks whose adapters and heads are trained; tables are merged."""
    source = write_tasks(tmp_path_factory.mktemp("tasks") / "two.csv")

    def make(kind: str = "shallow-bert", **changes: Any) -> Plan:
        table: dict[str, Any] = {
            "name": "two",
            "tasks": [
                {"name": "mood", "labels": ["bad", "good", "so"]},
                {"name": "length", "labels": ["long", "short"], "weight": 0.5},
            ],
            "model": {"base": str(base_model(kind)), "max_length": 16, "precision": "float32"},
            "data": {"source": str(source)},
            "train": "lora",
            "rounds": 2,
            "privacy": "none",
            "local": {"learning_rate": 1.0, "batch_size": 32, "steps": 3},
            "simulation": {"clients": 2, "partition": "iid", "baselines": []},
        }
        for key, value in changes.items():
            both = isinstance(value, dict) and isinstance(table.get(key), dict)
            table[key] = {**table[key], **value} if both else value
        return parse_plan(table)

    return make
