"""`cotune fuse`: several finished classifiers as one model, by their predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import announce, open_console, print_json
from cotune.cli.models.evaluate import figure, with_interval
from cotune.cli.models.predict import Length
from cotune.cli.options import AsJson, Device, RecordOptions, parse_choice, with_options
from cotune.data.readers.sources import check_new, check_source
from cotune.models.config import Method, TextMethod

METHODS: tuple[Method, ...] = get_args(Method)
FOR_TEXTS: tuple[TextMethod, ...] = get_args(TextMethod)
UNFITTED: tuple[Method, ...] = ("vote", "average")  # what needs no records, with probabilities as they are


@with_options(RecordOptions, without=("context", "question", "answers"))
def fuse(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Two or more models with the same classes, or language models of one tokenizer."),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Labeled records that no model was trained on: what is fitted is fitted on them. For vote and average with --out"
            " it can be left out: nothing is fitted or measured then."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=f"How predictions become one: {', '.join(METHODS)}.")] = "weighted",
    out: Annotated[Path | None, typer.Option(help="Write the fused model to this new folder; default: only measure.")] = None,
    *,
    options: RecordOptions,
    seed: Annotated[int, typer.Option(min=0, help="Of the folds on which the fusion is measured.")] = 0,
    max_length: Length = None,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Fuse the predictions of several models, and compare the result with each of them. Nothing is sent."""
    chosen = parse_choice("--method", method, METHODS)
    if len(models) < 2:
        raise typer.BadParameter("expected two or more models: cotune fuse MODEL MODEL --data FILE")
    if data is not None:
        check_source(data)
    elif out is None or chosen not in UNFITTED:
        raise typer.BadParameter(f"expected --data FILE, or --out with --method {' or '.join(UNFITTED)}")
    if out is not None:
        check_new(out)
    announce(f"loading PyTorch, then {len(models)} models", quiet=as_json)
    from cotune.cli.models.distilled_texts import find_task
    from cotune.cli.models.fused_texts import fuse_texts
    from cotune.cli.models.record_predictions import fuse_models  # loads PyTorch

    task = find_task(models)
    target = None if out is None else out.expanduser()
    records = None if data is None else options.config(data)
    how: dict[str, Any] = {"out": target, "seed": seed, "max_length": max_length, "device": device}
    if task is None:
        found = fuse_models(models, records, chosen, **how)
    else:
        found = fuse_texts(models, task, records, _for_texts(chosen), **how)
    if as_json:
        print_json(found)
    else:
        _show(open_console(), found)


def _for_texts(method: Method) -> TextMethod:
    """Raises BadParameter for a method that language models do not support."""
    if method != "average" and method != "weighted":
        raise typer.BadParameter(f"--method {method} is for classifiers: expected {' or '.join(FOR_TEXTS)} for language models")
    return method


def _show(console: Console, found: dict[str, Any]) -> None:
    if "models" in found:
        (_show_texts if "task" in found else _show_measured)(console, found)
    if "out" in found:
        console.print(f"the fused model: {escape(found['out'])}")


def _show_measured(console: Console, found: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("accuracy", "macro F1", "AUROC", "ECE"):
        table.add_column(heading, justify="right")
    for each in [*found["models"], {"model": f"fused: {found['method']}", **found["fused"]}]:
        accuracy = with_interval(each["accuracy"], each["accuracy_interval"])
        others = (each["macro"]["f1"], each["auroc"], each["calibration"]["ece"])
        table.add_row(escape(each["model"]), accuracy, *map(figure, others))
    console.print(table)
    _show_difference(console, found["against_best"])


def _show_texts(console: Console, found: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("loss (nats per token)", "perplexity", "weight"):
        table.add_column(heading, justify="right")
    weights = (*map(figure, found["fused"]["weights"]), "")
    for each, weight in zip([*found["models"], {"model": f"fused: {found['method']}", **found["fused"]}], weights, strict=True):
        table.add_row(
            escape(each["model"]), with_interval(each["loss"], each["loss_interval"]), figure(each["perplexity"]), weight
        )
    console.print(table)
    if found["not_predicted"]:
        console.print(f"without a target that is read: {found['not_predicted']:,} of {found['records']:,} records")
    _show_difference(console, found["against_best"])


def _show_difference(console: Console, against: dict[str, Any]) -> None:
    low, high = against["interval"]
    answer = {"yes": "better", "no": "worse"}.get(against["better"], against["better"])
    console.print(
        f"against the best single model ({escape(against['model'])}): {answer};"
        f" difference {against['difference']:+.3f} ({low:+.3f} to {high:+.3f}), {against['test']}"
    )
