"""The model card of a distilled language model: its teachers, its public texts, what it cost in privacy, and what it reached.

A student adds nothing to what its teachers have cost in ε, and passes on what they remember. So the card quotes what the model
card of each teacher says of its training: nothing else in a folder does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.data.config import TaskName
from cotune.data.tasks.task import get_task
from cotune.reporting.model_card import CARD, escape_line
from cotune.reporting.student_card import short_name

_MOST_BYTES = 2**18  # of a card that is read
_MOST_QUOTED = 500  # characters of what it says
_HEADING = "## Privacy"
_NOTHING = "No differential privacy"  # how a card begins that promises nothing
_PROMISE = re.compile(r"differential(ly)? priva")
_ESCAPED = re.compile(r"\\([\\`*_{}\[\]<>#|~])")
_MEASURES = ("loss", "perplexity", "accuracy")


def read_privacy(folder: Path) -> str:
    """Return what the model card in a model's folder says about privacy, as one line; "" where it says nothing."""
    try:
        with (folder / CARD).open("rb") as file:
            lines = file.read(_MOST_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    if _HEADING not in lines:
        return ""
    after = lines[lines.index(_HEADING) + 1 :]
    end = next((number for number, line in enumerate(after) if line.startswith("## ")), len(after))
    said = " ".join(_ESCAPED.sub(r"\1", " ".join(after[:end])).split())
    return said if len(said) <= _MOST_QUOTED else said[:_MOST_QUOTED] + " …"


def promises_privacy(said: str) -> bool:
    """Whether what a card says about privacy is a promise."""
    return bool(_PROMISE.search(said)) and not said.startswith(_NOTHING)


def distilled_card(name: str, found: Mapping[str, Any], privacy: Sequence[str]) -> str:
    """Return the card.

    Args:
        name: Of the student.
        found: What its `distillation.json` holds.
        privacy: For each teacher what its own card says (`read_privacy`).
    """
    task: TaskName = found["task"]
    pipeline = get_task(task).pipeline
    public = "public texts" if found["written"] is None else "texts that these wrote for public prompts"
    lines = [
        *("---", "library_name: transformers", f"pipeline_tag: {pipeline}", "---", "", f"# {escape_line(name)}", ""),
        f"Distilled with cotune from {_teachers(found)} on {public}.",
        *("", *_use(task, found["max_length"]), "", "## Model", "", "| | |", "|---|---|"),
        *(f"| {key} | {escape_line(value)} |" for key, value in _facts(found)),
        *("", _HEADING, "", "\n\n".join(map(escape_line, _about_privacy(found, privacy)))),
        *_results(found["held_out"]),
    ]
    return "\n".join(lines) + "\n"


def _teachers(found: Mapping[str, Any]) -> str:
    count = len(found["teachers"])
    return "one teacher" if count == 1 else f"{count} teachers"


def _use(task: TaskName, length: int) -> Iterator[str]:
    kind = get_task(task).model_class().__name__
    yield from ("## How to use", "", "```python", f"from transformers import {kind}, AutoTokenizer", "")
    yield f'model, reader = {kind}.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")'
    yield 'written = model.generate(**reader("a prompt\\n", return_tensors="pt"), max_new_tokens=50)'
    yield from ("print(reader.decode(written[0], skip_special_tokens=True))", "```", "")
    each = "a prompt and a target each" if task == "seq2seq" else "a prompt with its target"
    yield f"In training {each} had {length} tokens at most. `cotune predict` and `cotune evaluate` open the folder, too."


def _facts(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "task", found["task"]
    for number, teacher in enumerate(found["teachers"]):
        weight = f", weight {found['weights'][number]:g}" if found["weights"] else ""
        yield "teacher", f"{short_name(teacher['model'])}, SHA-256 {teacher['sha256']}{weight}"
    yield "base model of the student", f"{short_name(found['student']['base'])}, SHA-256 {found['student']['sha256']}"
    yield "tokenizer of all", f"SHA-256 {found['tokenizer']}"
    inputs = found["inputs"]
    yield (
        "public texts",
        f"{inputs['count']:,}; source: {inputs['source'] or 'not stated'}; license: {inputs['license'] or 'not stated'}; SHA-256"
        f" {inputs['sha256']}",
    )
    written = found["written"]
    yield "targets", "their own" if written is None else f"written by each teacher, of at most {written} tokens"
    yield "loss", _loss(found)
    yield "training", f"{found['train']}, {found['epochs']} passes over {found['records']:,} records"


def _loss(found: Mapping[str, Any]) -> str:
    weight = found["label_weight"]
    matched = "MSE of centered scores" if found["loss"] == "mse" else f"T²·KL(teacher ‖ student) at T = {found['temperature']:g}"
    parts = [(weight, "cross-entropy to the target"), (1 - weight, matched)]
    return " + ".join(f"{part:g} · {name}" for part, name in parts if part) + ", mean over a record's own target tokens"


def _about_privacy(found: Mapping[str, Any], privacy: Sequence[str]) -> Iterator[str]:
    yield (
        "The student has learned from its teachers and from texts that count as public, and from nothing else: it adds no ε to"
        " that of its teachers (post-processing), and what a teacher remembers of its own training may pass to it."
    )
    for teacher, said in zip(found["teachers"], privacy, strict=True):
        name = short_name(teacher["model"])
        if not said:
            yield f"Teacher {name}: no model card in its folder says anything about privacy. Count it as trained without."
        elif promises_privacy(said):
            yield f"Teacher {name}, as its model card says: {said}"
        else:
            yield f"Teacher {name} was trained without differential privacy, as far as its model card says: {said}"


def _results(held: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## Test", "")
    yield f"On {held['records']:,} held-out records; loss is in nats per target token. No ε covers these figures."
    yield from ("", f"| | {' | '.join(_MEASURES)} |", f"|---|{'---|' * len(_MEASURES)}")
    rows = (("teacher", held["teacher"]), ("student before", held["before"]["student"]), ("this model", held["student"]))
    for name, figures in rows:
        yield f"| {name} | {' | '.join(f'{figures[key]:.3f}' for key in _MEASURES)} |"
