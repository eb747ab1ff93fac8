"""Small data sets with something to learn in them: sentences, tagged words, images."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = {
    "good": ["great", "fine", "lovely", "happy"],
    "bad": ["awful", "poor", "sad", "angry"],
    "so": ["table", "tree", "road", "day"],
}


FILLERS = ["the", "a", "is", "was", "very", "this", "it", "and", "of", "to"]


def sentences(count: int, seed: int = 0, classes: tuple[str, ...] = ("bad", "good", "so")) -> list[tuple[str, str]]:
    """(text, label) pairs: the label's own words among fillers, so that a small model can learn them."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        label = rng.choice(classes)
        words = [*rng.choices(WORDS[label], k=2), *rng.choices(FILLERS, k=rng.randint(1, 6))]
        rng.shuffle(words)
        found.append((" ".join(words), label))
    return found


def write_csv(path: Path, rows: list[tuple[str, str]], columns: tuple[str, str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


TAGS = {"good": "B-GOOD", "bad": "B-BAD", "so": "B-SO"}
COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def tagged(count: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """(words, tags): each word has the tag of its kind, a filler has O."""
    tag_of = {word: TAGS[kind] for kind, words in WORDS.items() for word in words}
    found = [text.split() for text, _ in sentences(count, seed)]
    return [(words, [tag_of.get(word, "O") for word in words]) for words in found]


def write_tagged(path: Path, count: int = 240, seed: int = 0) -> Path:
    """JSON lines of words and tags."""
    rows = [json.dumps({"text": words, "label": tags}) for words, tags in tagged(count, seed)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_images(folder: Path, count: int = 60, seed: int = 0, classes: tuple[str, ...] = tuple(COLORS)) -> Path:
    """A folder for each color, with noisy images of unlike sizes in it, PNG and JPEG in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        color = classes[i % len(classes)]
        (folder / color).mkdir(parents=True, exist_ok=True)
        shape = (int(rng.integers(12, 30)), int(rng.integers(12, 30)), 3)
        pixels = np.clip(np.array(COLORS[color]) + rng.normal(0, 30, shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / color / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder
