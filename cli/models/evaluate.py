"""`cotune evaluate`: how good a finished model is on labeled records."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.console import announce, open_console, print_json
from cotune.cli.models.predict import Length, ModelSource, ThresholdOption
from cotune.cli.options import Device, RecordOptions, with_options
from cotune.data.readers.sources import check_source
from cotune.reporting.measures import get_measures

_MOST_CLASSES = 25  # of a confusion matrix on a terminal
_WIDE = 24  # characters of a class name


@with_options(RecordOptions)
def evaluate(
    model: ModelSource,
    data: Annotated[str, typer.Option(help="Labeled records: a file, or for an image model a folder with one folder per class.")],
    *,
    options: RecordOptions,
    threshold: ThresholdOption = None,
    max_length: Length = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain JSON, with every threshold and bin.")] = False,
    device: Device = "auto",
) -> None:
    """Evaluate a fine-tuned model on labeled records: metrics by class, calibration, entities. Nothing is sent."""
    check_source(data)
    announce(f"loading PyTorch, then {model}, to evaluate it on {data}", quiet=as_json)
    from cotune.cli.models.generated_texts import evaluate_texts, find_writer
    from cotune.cli.models.record_predictions import evaluate_records  # loads PyTorch

    task = find_writer(model, threshold)
    if task is not None:
        result = evaluate_texts(model, task, options.config(data), max_length=max_length, device=device)
    else:
        result = evaluate_records(model, options.config(data), threshold=threshold, max_length=max_length, device=device)
    found = {"model": model, "data": data, **result}
    if as_json:
        print_json(found)
    elif "figures" in found:
        _show_figures(open_console(), found)
    else:
        _show(open_console(), found)


def _show_figures(console: Console, found: dict[str, Any]) -> None:
    """Of answers that are no classes."""
    console.print(f"{found['records']:,} records of {escape(found['data'])}, {found['not_predicted']:,} of them not predicted")
    for reason, count in found["left_out"].items():
        console.print(f"  left out, {escape(reason)}: {count:,}")
    console.print(f"  of each text {found['max_length']} tokens are read at most")
    for measure in get_measures(found["figures"]):
        value = found["figures"][measure.key]
        interval = found["figures"].get(f"{measure.key}_interval")
        console.print(f"{measure.name} {with_interval(value, interval) if interval else figure(value)}")


def _show(console: Console, found: dict[str, Any]) -> None:
    console.print(f"{found['records']:,} records of {escape(found['data'])}, {len(found['labels'])} classes")
    for reason, count in found["left_out"].items():
        console.print(f"  left out, {escape(reason)}: {count:,}")
    if found["max_length"]:
        console.print(f"  of each text {found['max_length']} tokens are read at most")
    if found["not_predicted"]:
        console.print(f"  not predicted: {found['not_predicted']:,} of {found['answers']:,}, which count as wrong")
    if found["threshold"]:
        console.print(
            f"  {escape(found['threshold']['label'])} is predicted from a probability of {found['threshold']['least']:g} on"
        )
    show_summary(console, found)
    show_classes(console, found)
    _show_confusion(console, found)
    if "entities" in found:
        _show_entities(console, found["entities"])


def show_summary(console: Console, found: dict[str, Any]) -> None:
    """Accuracy beside the constant answer, curves, calibration."""
    accuracy = with_interval(found["accuracy"], found["accuracy_interval"])
    constant = f"always {escape(found['majority']['label'])}: {figure(found['majority']['accuracy'])}"
    console.print(f"[bold]accuracy {accuracy}[/bold]; {constant}")
    console.print(
        f"AUROC {figure(found['auroc'])}, AUPRC {figure(found['auprc'])} (means over the classes, each against all others);"
        f" calibration error (ECE) {figure(found['calibration']['ece'])}"
    )


def show_classes(console: Console, found: dict[str, Any]) -> None:
    """Each class, and the means."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("class", overflow="fold")
    for heading in ("precision", "recall", "F1", "AUROC", "AUPRC", "records", "predicted"):
        table.add_column(heading, justify="right")
    for each in found["classes"]:
        figures = (figure(each[key]) for key in ("precision", "recall", "f1", "auroc", "auprc"))
        table.add_row(escape(each["label"]), *figures, f"{each['records']:,}", f"{each['predicted']:,}")
    for name in ("macro", "micro", "weighted"):
        table.add_row(f"[italic]{name}[/italic]", *(figure(found[name][key]) for key in ("precision", "recall", "f1")))
    console.print(table)


def _show_confusion(console: Console, found: dict[str, Any]) -> None:
    labels = found["labels"]
    if len(labels) > _MOST_CLASSES:
        console.print(f"the confusion matrix of {len(labels)} classes is in --json")
        return
    table = Table("true \\ predicted", box=None, header_style="bold", pad_edge=False)
    for name in (*labels, *(["not predicted"] if found["not_predicted"] else [])):
        table.add_column(escape(name[:_WIDE]), justify="right")
    for name, row in zip(labels, found["confusion"], strict=True):
        cells = row if found["not_predicted"] else row[:-1]
        table.add_row(escape(name[:_WIDE]), *(f"{count:,}" for count in cells))
    console.print(table)


def _show_entities(console: Console, found: dict[str, Any]) -> None:
    table = Table("entities", box=None, header_style="bold", pad_edge=False)
    for heading in ("precision", "recall", "F1", "actual", "predicted"):
        table.add_column(heading, justify="right")
    rows = [(each["type"], each, each["entities"], each["predicted"]) for each in found["types"]]
    rows += [("macro", found["macro"], "", ""), ("micro", found["micro"], found["entities"], found["predicted"])]
    for name, figures, there, predicted in rows:
        table.add_row(escape(name), *(figure(figures[key]) for key in ("precision", "recall", "f1")), str(there), str(predicted))
    console.print(table)


def figure(value: float | None) -> str:
    """A share, or a dash where it is not defined."""
    return "–" if value is None else f"{value:.3f}"


def with_interval(value: float, interval: list[float]) -> str:
    """Return a figure with its confidence interval, as text."""
    return f"{figure(value)} ({figure(interval[0])} to {figure(interval[1])})"
