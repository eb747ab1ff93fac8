"""`cotune distill`: one model learns from others, on public inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape

from cotune.cli.console import announce, open_console, print_json
from cotune.cli.models.evaluate import figure
from cotune.cli.options import AsJson, Device, RecordOptions, parse_choice
from cotune.data.readers.sources import check_base, check_file, check_new
from cotune.ensembles.config import DistillationConfig, Loss
from cotune.models.config import ModelConfig, TrainMode

_MODES: tuple[TrainMode, ...] = get_args(TrainMode)
_LOSSES: tuple[Loss, ...] = get_args(Loss)


def distill(
    teachers: Annotated[list[str], typer.Argument(metavar="TEACHER...", help="Models with the same classes, or a fused one.")],
    student: Annotated[str, typer.Option(help="The base model that learns: a folder, package:NAME or a hub id.")],
    data: Annotated[Path, typer.Option(help="Public inputs: a CSV, TSV, JSON lines or Parquet file; images also as a folder.")],
    out: Annotated[Path, typer.Option(help="Write the student to this new folder.")],
    text: Annotated[str | None, typer.Option(help='Column with the text, or with its words; default: "text".')] = None,
    image: Annotated[str | None, typer.Option(help='Column with the image; default: "image".')] = None,
    label: Annotated[str | None, typer.Option(help="Column with the class, where there are labels to learn from.")] = None,
    label_weight: Annotated[float, typer.Option(min=0, max=1, help="Weight of the labels; the rest is the teacher's.")] = 0.5,
    encoding: Annotated[str, typer.Option(help="Of a CSV, TSV or JSON file.")] = "utf-8",
    train: Annotated[str, typer.Option(help="What of the student is trained: head, lora or full.")] = "full",
    loss: Annotated[str, typer.Option(help="kl: divergence at a temperature; mse: of centered scores.")] = "kl",
    temperature: Annotated[float, typer.Option(min=0.1, max=100, help="Of kl: above 1, unlikely classes count for more.")] = 2.0,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Passes over the inputs.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Inputs of a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=1e-8, max=10, help="Of AdamW, at first; it falls to 0.")] = 5e-5,
    max_length: Annotated[int, typer.Option(min=2, max=32768, help="Tokens that the student reads of a text.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of a new head, adapters and the order of the inputs.")] = 0,
    source: Annotated[
        str | None, typer.Option(help="Where the public inputs come from, to be recorded with the student; default: the file.")
    ] = None,
    license: Annotated[str, typer.Option(help="License of the public inputs, to be recorded with the student.")] = "",
    test: Annotated[
        Path | None,
        typer.Option(
            help='Labeled records that student and teachers are also measured on; their class is in --label or "label".'
        ),
    ] = None,
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Train a model to predict what others predict: big into small, or several into one. An interrupted one goes on."""
    config = DistillationConfig(
        train=parse_choice("--train", train, _MODES),
        loss=parse_choice("--loss", loss, _LOSSES),
        temperature=temperature,
        label_weight=label_weight if label is not None else 0.0,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    columns = RecordOptions(text=text, image=image, label=label, encoding=encoding)
    check_file(data)
    if test is not None:
        check_file(test)
    check_base(student)
    check_new(out)
    announce(f"loading PyTorch, then {len(teachers)} teachers", quiet=as_json)
    from cotune.cli.models.record_predictions import distill_models  # loads PyTorch

    base = ModelConfig.model_validate({"base": student, "max_length": max_length})
    found = distill_models(
        teachers,
        base,
        config,
        data.expanduser(),
        columns,
        out=out.expanduser(),
        device=device,
        license=license,
        source=data.name if source is None else source,
        test=None if test is None else test.expanduser(),
    )
    if as_json:
        print_json(found)
    else:
        _show(open_console(), found, out)


def _show(console: Console, found: dict[str, Any], out: Path) -> None:
    held = found["held_out"]
    console.print(
        f"on {held['answers']:,} held-out answers the student agrees with its teacher in"
        f" [bold]{figure(held['agreement'])}[/bold]; KL {figure(held['kl'])} nats"
    )
    for where, measured in (("held-out inputs", held), ("the test set", found["test"])):
        if measured is not None and measured["student_accuracy"] is not None:
            low, high = measured["difference_interval"]
            console.print(
                f"accuracy on {where}: teacher {figure(measured['teacher_accuracy'])}, student"
                f" {figure(measured['student_accuracy'])}; difference {measured['accuracy_difference']:+.3f}"
                f" ({low:+.3f} to {high:+.3f}), {measured['answers']:,} answers"
            )
    console.print(f"the student, with its card: {escape(str(out))}")
