"""`cotune predict`: what a finished model says of texts, files and images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.plan_options import own_options
from cotune.cli.screen import beginning, screen
from cotune.data.readers.sources import check_file
from cotune.errors import DataError
from cotune.storage.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

    from cotune.data.unlabeled import Row
    from cotune.models.evaluation.predictor import Classifier
    from cotune.models.evaluation.quality import Threshold


_WIDE = 60  # characters of a text that a table shows
_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "jsonl"}

ModelSource = Annotated[
    str, typer.Argument(metavar="MODEL", help="A fine-tuned model: its folder, the folder of a run, or a Hugging Face hub id.")
]
ThresholdOption = Annotated[
    str | None,
    typer.Option(metavar="CLASS=P", help="Tell this class wherever its probability is at least P, else the best of the others."),
]
Length = Annotated[int | None, typer.Option(min=2, max=32768, help="Tokens to read of a text; default: as in training.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def predict(
    model: ModelSource,
    given: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts, in quotes; for an image model, files of images.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A CSV, TSV, JSON lines or Parquet file; for an image model also a folder of images.")
    ] = None,
    text: Annotated[str | None, typer.Option(help='Column with the text, or with its words; default: "text".')] = None,
    image: Annotated[str | None, typer.Option(help='Column with the image; default: "image".')] = None,
    encoding: Annotated[str, typer.Option(help="Of a CSV, TSV or JSON file.")] = "utf-8",
    threshold: ThresholdOption = None,
    max_length: Length = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file (.csv, .json or .jsonl) instead of the terminal.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON, with the probability of every class.")] = False,
    device: Device = "auto",
) -> None:
    """Say which class a fine-tuned model gives to texts, words or images. Nothing is sent."""
    if bool(given) == (file is not None):
        raise typer.BadParameter('expected texts after the model, or --file FILE: cotune predict MODEL "a text"')
    if text is not None and image is not None:
        raise typer.BadParameter("--text and --image both name the column of the inputs: expected one of them")
    if out is not None and out.suffix.lower() not in _FORMATS:
        raise typer.BadParameter(f"--out {out} is of no known format: expected a name ending in .csv, .json or .jsonl")
    if file is not None:
        check_file(file)
    beginning(f"loading PyTorch, then {model}", quiet=as_json)
    from cotune.data.unlabeled import read_typed, read_unlabeled
    from cotune.ensembles.predictor import open_model
    from cotune.models.evaluation.quality import parse_threshold

    predictor = open_model(model, device, max_length)
    limit = None if threshold is None else parse_threshold(threshold, predictor.labels)
    column = text if text is not None else image
    with own_options():
        rows = (
            read_typed(given or [], predictor.task)
            if file is None
            else read_unlabeled(file.expanduser(), predictor.task, column=column, encoding=encoding)
        )
    found = list(_predictions(predictor, rows, limit))
    if out is not None:
        _write(out.expanduser(), found)
        typer.echo(f"{len(found):,} rows: {out}")
    elif as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        _show(screen(), found)
    if all(each["reason"] for each in found):
        raise typer.Exit(1)


def _predictions(predictor: Classifier, rows: Sequence[Row], threshold: Threshold | None) -> Iterator[dict[str, Any]]:
    """One plain table for each row, in order."""
    probabilities = iter(predictor.probabilities([row.given for row in rows if row.given is not None]))
    for number, row in enumerate(rows, 1):
        about = {"row": number, "input": row.shown}
        if row.given is None:
            yield {**about, "label": None, "score": None, "scores": None, "reason": row.reason}
        else:
            yield {**about, **_answer(predictor, next(probabilities), threshold), "reason": ""}


def _answer(predictor: Classifier, probabilities: Tensor, threshold: Threshold | None) -> dict[str, Any]:
    """One class; of words a list of tags, None for one that was not read."""
    from cotune.models.evaluation.quality import NOT_PREDICTED, predict_classes

    numbers = predict_classes(probabilities.numpy(), predictor.labels, threshold).tolist()
    labels = [None if number == NOT_PREDICTED else predictor.labels[number] for number in numbers]
    rows = [dict(zip(predictor.labels, row, strict=True)) for row in probabilities.tolist()]
    scores = [None if label is None else row[label] for label, row in zip(labels, rows, strict=True)]
    every = [None if label is None else row for label, row in zip(labels, rows, strict=True)]
    if predictor.task == "token-classification":
        return {"label": labels, "score": scores, "scores": every}
    return {"label": labels[0], "score": scores[0], "scores": every[0]}


def _show(console: Console, found: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("label", no_wrap=True)
    table.add_column("probability", justify="right")
    table.add_column("input", overflow="fold")
    for each in found:
        if isinstance(each["label"], list):
            for word, tag, score in zip(each["input"].split(), each["label"], each["score"], strict=False):
                table.add_row(escape(tag or "–"), _number(score), escape(_on_one_line(word)))
            table.add_row("", "", "")
        else:
            shown = _on_one_line(each["input"])
            note = f" ({each['reason']})" if each["reason"] else ""
            cut = shown[:_WIDE] + ("…" if len(shown) > _WIDE else "")
            table.add_row(escape(each["label"] or "–"), _number(each["score"]), escape(cut + note))
    console.print(table)


def _on_one_line(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def _number(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}"


def _write(file: Path, found: Sequence[dict[str, Any]]) -> None:
    kind = _FORMATS[file.suffix.lower()]
    if kind == "csv":
        content = _csv(found)
    elif kind == "jsonl":
        content = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in found)
    else:
        content = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    try:
        atomic_write(file, content.encode("utf-8", "replace"))
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error.strerror}): choose another file with --out") from None


def _csv(found: Sequence[dict[str, Any]]) -> str:
    """A line for each row: tags are separated by spaces, as the readers of records take them."""
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(["row", "input", "label", "score", "reason"])
    for each in found:
        label = each["label"]
        score = each["score"]
        if isinstance(label, list):
            label = " ".join(tag or "–" for tag in label)
            score = " ".join(_number(value) for value in score)
        values = ["" if value is None else value for value in (label, score)]
        table.writerow([each["row"], each["input"], *values, each["reason"]])
    return stream.getvalue()
