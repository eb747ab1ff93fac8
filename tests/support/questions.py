"""Questions about made-up texts, whose answers are the words that mean something."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.support.datasets import FILLERS, WORDS
from tests.support.text_tasks import PRIVATE


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The answer is the one word of the context that is good."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = [rng.choice(FILLERS) for _ in range(rng.randint(3, 6))]
        good = rng.choice(WORDS["good"])
        words.insert(rng.randint(0, len(words)), good)
        found.append({"context": " ".join(words), "question": "is it " + rng.choice(FILLERS), "answers": [good]})
    return found


def write_questions(file: Path, count: int = 200, seed: int = 0) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in questions(count, seed)), encoding="utf-8")
    return file


def questions_table(base: Path, source: Path) -> dict[str, Any]:
    """A plan that learns something within seconds."""
    return {
        "name": "questions",
        "task": "question-answering",
        "train": "lora",
        "rounds": 2,
        "privacy": PRIVATE,
        "model": {"base": str(base), "max_length": 24, "precision": "float32"},
        "data": {"source": str(source)},
        "lora": {"rank": 4, "factors": "ab"},
        "local": {"learning_rate": 0.05, "optimizer": "adam", "batch_size": 0.5, "steps": 6, "physical_batch_size": 96},
        "simulation": {"clients": 2, "partition": "iid", "min_examples": 10, "baselines": ["alone"]},
    }
