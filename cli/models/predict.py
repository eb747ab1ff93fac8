"""`cotune predict`: what a finished model says of texts, files and images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import announce, open_console, print_json
from cotune.cli.options import Device
from cotune.data.readers.sources import check_file
from cotune.errors import DataError, ModelError
from cotune.storage.files import atomic_write

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
    question: Annotated[
        str | None,
        typer.Option(help='What is asked about each text; with --file the column of the questions; default: "question".'),
    ] = None,
    messages: Annotated[str | None, typer.Option(help="Column with chats, which a language model answers.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Each text is what a user says in a chat with the model.")] = False,
    encoding: Annotated[str, typer.Option(help="Of a CSV, TSV or JSON file.")] = "utf-8",
    threshold: ThresholdOption = None,
    max_length: Length = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Of a text that a language model writes.")] = 64,
    instruction: Annotated[
        str | None, typer.Option(help="What a chat model is to do with each text, as in training (data.instruction).")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of each chat, as in training (data.system).")] = None,
    separator: Annotated[str, typer.Option(help="What a language model reads behind a prompt, as in training.")] = "\n",
    out: Annotated[Path | None, typer.Option(help="Write to this file (.csv, .json or .jsonl) instead of the terminal.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON, with the probability of every class.")] = False,
    device: Device = "auto",
) -> None:
    """Predict classes, labels or numbers, or write texts, with a fine-tuned model. Nothing is sent."""
    if bool(given) == (file is not None):
        raise typer.BadParameter('expected texts after the model, or --file FILE: cotune predict MODEL "a text"')
    named = {"--text": text, "--image": image, "--messages": messages}
    several = [option for option, value in named.items() if value is not None]
    if len(several) > 1:
        raise typer.BadParameter(f"{' and '.join(several)} all name the column of the inputs: expected one of them")
    if chat and file is not None:
        raise typer.BadParameter("--chat is for texts after the model: expected --messages COLUMN for the chats of a file")
    if instruction is not None and (chat or messages is not None):
        raise typer.BadParameter(
            "--instruction precedes a single prompt, and --chat and --messages give complete chats: expected one of them"
        )
    if out is not None and out.suffix.lower() not in _FORMATS:
        raise typer.BadParameter(f"--out {out} is of no known format: expected a name ending in .csv, .json or .jsonl")
    if file is not None:
        check_file(file)
    announce(f"loading PyTorch, then {model}", quiet=as_json)
    from cotune.cli.models.generated_texts import find_writer, write_rows
    from cotune.cli.models.record_predictions import predict_rows  # loads PyTorch
    from cotune.data.inputs.chat_wording import ChatWording

    column = next((named[option] for option in several), None)
    chats = chat or messages is not None
    inputs = given or [] if file is None else file.expanduser()
    given_so: dict[str, Any] = {"column": column, "encoding": encoding, "max_length": max_length, "device": device}
    task = find_writer(model, threshold)
    if task is not None and question is not None:
        raise ModelError(f"{model} answers no questions: leave --question out", code="model.no_question_answering")
    if task is not None:
        given_so |= {"chats": chats, "max_new_tokens": max_new_tokens, "separator": separator}
        given_so["wording"] = ChatWording(system, instruction)
        found = write_rows(model, task, inputs, **given_so)
    elif chats or instruction is not None or system is not None:
        raise ModelError(
            f"{model} is no language model, and --chat, --messages, --instruction and --system are for those: leave them out",
            code="model.no_chat_template",
        )
    else:
        found = predict_rows(model, inputs, question=question, threshold=threshold, **given_so)
    if out is not None:
        _write(out.expanduser(), found)
        typer.echo(f"{len(found):,} rows: {out}")
    elif as_json:
        print_json(found)
    else:
        _show(open_console(), found)
    if all(each["reason"] for each in found):
        raise typer.Exit(1)


def _show(console: Console, found: Sequence[dict[str, Any]]) -> None:
    if found and "label" not in found[0]:
        _show_answers(console, found)
        return
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


def _show_answers(console: Console, found: Sequence[dict[str, Any]]) -> None:
    """Written texts, numbers, or several labels with the probability of each."""
    if "text" in found[0]:
        for each in found:
            console.print(f"[bold]{escape(_on_one_line(each['input'])[:_WIDE])}[/bold]")
            console.print(escape(each["text"] if each["text"] is not None else f"– ({each['reason']})"))
        return
    is_number = "value" in found[0]
    table = Table("value" if is_number else "labels", "input", box=None, header_style="bold", pad_edge=False)
    for each in found:
        predicted = _number(each["value"]) if is_number else _labels(each)
        note = f" ({each['reason']})" if each["reason"] else ""
        table.add_row(escape(predicted), escape(_on_one_line(each["input"])[:_WIDE] + note))
    console.print(table)


def _labels(each: dict[str, Any]) -> str:
    if each["labels"] is None:
        return "–"
    return ", ".join(f"{label} ({each['scores'][label]:.3f})" for label in each["labels"]) or "none"


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
        raise DataError(
            f"{file} cannot be written ({error.strerror}): choose another file with --out", code="data.unwritable_output"
        ) from None


def _cell(value: object) -> object:
    return "" if value is None else ",".join(value) if isinstance(value, list) else value


def _csv(found: Sequence[dict[str, Any]]) -> str:
    """A line for each row: tags are separated by spaces, as the readers of records take them."""
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    if found and "label" not in found[0]:
        names = [name for name in found[0] if name != "scores"]
        table.writerow(names)
        table.writerows([_cell(each[name]) for name in names] for each in found)
        return stream.getvalue()
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
