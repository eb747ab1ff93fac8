"""Records and plans of tasks whose answers are no classes: numbers and sets of labels that the words of a text decide."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.support.datasets import FILLERS, WORDS

LABELS = tuple(sorted(WORDS))
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "clip_norm": 1.0}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def rated(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with a number from 1 to 5: 3, and half a point more for each good word, and less for each bad one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        good, bad = rng.randint(0, 4), rng.randint(0, 4)
        words = [
            *rng.choices(WORDS["good"], k=good),
            *rng.choices(WORDS["bad"], k=bad),
            *rng.choices(FILLERS, k=rng.randint(1, 4)),
        ]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": 3 + (good - bad) / 2})
    return rows


def labeled(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with the name of every kind of words that is in them."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        kinds = [kind for kind in LABELS if rng.random() < 0.45]
        words = [word for kind in kinds for word in rng.choices(WORDS[kind], k=2)] + rng.choices(FILLERS, k=rng.randint(1, 4))
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": kinds})
    return rows


def table_of(task: str, base: Path, source: Path) -> dict[str, Any]:
    """A plan that learns something within seconds."""
    table: dict[str, Any] = {
        "name": task,
        "task": task,
        "train": "head",
        "rounds": 3,
        "privacy": PRIVATE,
        "model": {"base": str(base), "max_length": 16, "precision": "float32", "pooling": "mean"},
        "data": {"source": str(source)},
        "local": {"learning_rate": 1.0, "momentum": 0.9, "batch_size": 0.5, "steps": 5},
        "simulation": {"clients": 2, "partition": "iid"},
    }
    if task == "multi-label":
        table["local"]["learning_rate"] = 8.0
    if task == "regression":
        table["model"]["target_range"] = [1.0, 5.0]
    return table


ROWS = {"regression": rated, "multi-label": labeled}
