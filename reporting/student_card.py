"""The model card of a distilled student: that it is not the exact model, what distilling has cost, and what is promised of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cotune.data.tasks.task import get_task
from cotune.ensembles.resumable_distillation import Distilled
from cotune.models.base.lookup import FOLDER
from cotune.reporting.model_card import escape_line, show_pipeline

_MOST_LABELS = 200


def student_card(done: Distilled) -> str:
    """Return the card of a student that has learned from public inputs."""
    task = get_task(done.task)
    lines = [
        *("---", "library_name: transformers", f"pipeline_tag: {task.pipeline}", "---", "", "# A distilled classifier", ""),
        *(_about(done.found), "", *show_pipeline(task.pipeline, "FOLDER", done.length), ""),
        *("## What distilling has cost", "", "| | |", "|---|---|", *_table(_costs(done.found)), ""),
        "Intervals are those of 95 %; counted are the answers that both can give. No ε covers these figures.",
        *("", "## Model", "", "| | |", "|---|---|", *_table(_facts(done, task.key)), ""),
        *("## Privacy", "", *_privacy(done.found)),
    ]
    return "\n".join(lines) + "\n"


def _about(found: Mapping[str, Any]) -> str:
    """Which of the two it is."""
    predict = f"{_teacher(found)} predict" + ("s" if len(found["teachers"]) == 1 else ", in the mean,")
    return (
        "**This is not the exact model.** It is a plain Hugging Face classifier that cotune has distilled: it has learned to"
        f" predict what {predict} for public inputs. How close it is stands below."
    )


def _teacher(found: Mapping[str, Any]) -> str:
    return "the exact model" if len(found["teachers"]) == 1 else f"{len(found['teachers'])} exact models"


def _costs(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    held = found["held_out"]
    inputs = "public inputs, their labels," if found["label_weight"] else "public inputs"
    yield "ε", f"none: it has learned from {inputs} and what {_teacher(found)} said of them"
    if held["agreement"] is not None:
        low, high = held["agreement_interval"]
        yield (
            "agreement",
            f"{held['agreement']:.3f} ({low:.3f} to {high:.3f}): share of {held['answers']:,} held-out answers that are those of"
            f" {_teacher(found)}; KL divergence {held['kl']:.3f} nats",
        )
    yield from _accuracies("accuracy on held-out public inputs", held)
    if found["test"] is not None:
        yield from _accuracies(f"accuracy on {Path(found['test']['source']).name}", found["test"])
        if found["test"]["agreement"] is not None:
            yield "agreement there", f"{found['test']['agreement']:.3f}"
    if held["student_accuracy"] is None and found["test"] is None:
        yield "accuracy", "not measured, as no labeled records were given"


def _accuracies(what: str, measured: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if measured["student_accuracy"] is not None:
        low, high = measured["difference_interval"]
        yield (
            what,
            f"exact {measured['teacher_accuracy']:.3f}, this one {measured['student_accuracy']:.3f}: difference"
            f" {measured['accuracy_difference']:+.3f} ({low:+.3f} to {high:+.3f}), {measured['answers']:,} answers",
        )


def _facts(done: Distilled, key: str) -> Iterator[tuple[str, str]]:
    found = done.found
    inputs = found["inputs"]
    labels = ", ".join(done.labels[:_MOST_LABELS]) + (" …" if len(done.labels) > _MOST_LABELS else "")
    yield "labels", f"{len(done.labels)}, in the order of the head: {labels}"
    if key == "text":
        yield "length", f"{done.length} tokens; the rest of a text is not read"
    for teacher in found["teachers"]:
        yield "exact model", f"{short_name(teacher['model'])}, SHA-256 {teacher['sha256']}"
    yield "base model", f"{short_name(found['student']['base'])}, SHA-256 {found['student']['sha256']}"
    yield (
        "public inputs",
        f"{inputs['count']:,}, of which one of ten was held out; source: {inputs['source'] or 'not stated'}; license:"
        f" {inputs['license'] or 'not stated'}; SHA-256 {inputs['sha256']}",
    )
    taught = f"; weight of the inputs' own labels {found['label_weight']:g}" if found["label_weight"] else ""
    yield "training", f"train = {found['train']}, loss {found['loss']}, passes: {found['epochs']}{taught}"


def short_name(model: str) -> str:
    """A folder by its last names alone: where it is on a machine is nobody's business."""
    path = Path(model.removeprefix(FOLDER)).expanduser()
    return path.name if path.is_absolute() or path.exists() else str(path)


def _table(rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    return (f"| {escape_line(name)} | {escape_line(value)} |" for name, value in rows)


def _privacy(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Distilling is post-processing, and has spent no ε: what is promised for {_teacher(found)} above and for the base model"
        " holds for this one, too, and nothing more; their cards say it. An exact model that was trained without privacy hands on"
        " what it remembers of single records."
    )
    yield from (
        "",
        "That rests on the inputs being public, as those say who have distilled: with the records of an organization among them,"
        " this model may reveal those.",
    )
