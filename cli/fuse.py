"""`cotune fuse`: several finished classifiers as one model, by their predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cotune.cli.evaluate import figure, records_config, with_interval
from cotune.cli.options import AsJson, Device
from cotune.cli.plan_options import own_options
from cotune.cli.predict import Length
from cotune.cli.screen import beginning, print_json, screen
from cotune.data.readers.sources import check_new, check_source
from cotune.ensembles.fusion import METHODS, Method


def fuse(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Two or more fine-tuned models with the same classes."),
    ],
    data: Annotated[str, typer.Option(help="Labeled records that no model was trained on: what is fitted is fitted on them.")],
    method: Annotated[str, typer.Option(help=f"How predictions become one: {', '.join(METHODS)}.")] = "weighted",
    out: Annotated[Path | None, typer.Option(help="Write the fused model to this new folder; default: only measure.")] = None,
    text: Annotated[str | None, typer.Option(help='Column with the text, or with its words; default: "text".')] = None,
    image: Annotated[str | None, typer.Option(help='Column with the image; default: "image".')] = None,
    label: Annotated[str | None, typer.Option(help='Column with the class, or with the words\' tags; default: "label".')] = None,
    unit: Annotated[str | None, typer.Option(help="Column that says whose a record is: intervals then count persons.")] = None,
    encoding: Annotated[str, typer.Option(help="Of a CSV, TSV or JSON file.")] = "utf-8",
    seed: Annotated[int, typer.Option(min=0, help="Of the folds on which the fusion is measured.")] = 0,
    max_length: Length = None,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Fuse the predictions of several models, and compare the result with each of them. Nothing is sent."""
    chosen = _method(method)
    if len(models) < 2:
        raise typer.BadParameter("expected two or more models: cotune fuse MODEL MODEL --data FILE")
    check_source(data)
    if out is not None:
        check_new(out)
    beginning(f"loading PyTorch, then {len(models)} models", quiet=as_json)
    from cotune.data.record_files import read_records
    from cotune.ensembles.fit import ask_models, fit_and_write, measure_fusion
    from cotune.models.evaluation.predictor import open_predictor

    opened = [open_predictor(model, device, max_length) for model in models]
    with own_options():
        records = read_records(records_config(data, text, image, label, unit, encoding), None, opened[0].task)
    judgment = ask_models(opened, records)
    found = measure_fusion(chosen, judgment, models, seed)
    if out is not None:
        fusion = fit_and_write(chosen, judgment, opened, out.expanduser())
        found |= {"out": str(out), "temperatures": list(fusion.temperatures), "weights": list(fusion.weights)}
    if as_json:
        print_json(found)
    else:
        _show(screen(), found)


def _method(name: str) -> Method:
    for method in METHODS:
        if name == method:
            return method
    raise typer.BadParameter(f"--method {name} is not known: expected one of {', '.join(METHODS)}")


def _show(console: Console, found: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("accuracy", "macro F1", "AUROC", "ECE"):
        table.add_column(heading, justify="right")
    for each in [*found["models"], {"model": f"fused: {found['method']}", **found["fused"]}]:
        accuracy = with_interval(each["accuracy"], each["accuracy_interval"])
        others = (each["macro"]["f1"], each["auroc"], each["calibration"]["ece"])
        table.add_row(escape(each["model"]), accuracy, *map(figure, others))
    console.print(table)
    against = found["against_best"]
    low, high = against["interval"]
    answer = {"yes": "better", "no": "worse"}.get(against["better"], against["better"])
    console.print(
        f"against the best single model ({escape(against['model'])}): {answer};"
        f" difference {against['difference']:+.3f} ({low:+.3f} to {high:+.3f}), {against['test']}"
    )
    if "out" in found:
        console.print(f"the fused model: {escape(found['out'])}")
