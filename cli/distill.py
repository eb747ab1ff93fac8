"""`cotune distill`: one model learns from others, on public inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape

from cotune.cli.evaluate import figure, records_config
from cotune.cli.options import AsJson, Device
from cotune.cli.plan_options import own_options
from cotune.cli.screen import beginning, print_json, screen
from cotune.data.readers.sources import check_base, check_file, check_new

if TYPE_CHECKING:
    from cotune.data.types import Input
    from cotune.ensembles.calibration import Numbers
    from cotune.ensembles.distillation import Loss
    from cotune.models.config import TrainMode
    from cotune.models.evaluation.predictor import Classifier

_MODES = ("head", "lora", "full")
_LOSSES = ("kl", "mse")


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
    license: Annotated[str, typer.Option(help="License of the public inputs, to be recorded beside the student.")] = "",
    as_json: AsJson = False,
    device: Device = "auto",
) -> None:
    """Train a model to predict what others predict: big into small, or several into one. An interrupted one goes on."""
    for name, value, known in (("train", train, _MODES), ("loss", loss, _LOSSES)):
        if value not in known:
            raise typer.BadParameter(f"--{name} {value} is not known: expected one of {', '.join(known)}")
    check_file(data)
    check_base(student)
    check_new(out)
    beginning(f"loading PyTorch, then {len(teachers)} teachers", quiet=as_json)
    from cotune.ensembles.distill import Distillation
    from cotune.ensembles.distill import distill as run_distillation
    from cotune.ensembles.distillation import DistillationConfig
    from cotune.ensembles.predictor import open_model
    from cotune.models.config import ModelConfig

    opened = [open_model(teacher, device) for teacher in teachers]
    with own_options():
        inputs, truth = _lessons(opened[0], data.expanduser(), text, image, label, encoding)
    config = DistillationConfig(
        train=cast("TrainMode", train),
        loss=cast("Loss", loss),
        temperature=temperature,
        label_weight=label_weight if label is not None else 0.0,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    base = ModelConfig.model_validate({"base": student, "max_length": max_length})
    work = Distillation(opened, teachers, base, config, inputs, truth, out.expanduser(), device, license)
    found = run_distillation(work)
    if as_json:
        print_json(found)
    else:
        _show(screen(), found, out)


def _lessons(
    teacher: Classifier, data: Path, text: str | None, image: str | None, label: str | None, encoding: str
) -> tuple[Sequence[Input], Sequence[Numbers] | None]:
    """The usable inputs, and their class numbers where there are labels."""
    from cotune.data.record_files import read_records
    from cotune.data.unlabeled import read_unlabeled
    from cotune.models.evaluation.predictor import class_numbers

    if label is None:
        rows = read_unlabeled(data, teacher.task, column=text if text is not None else image, encoding=encoding)
        return [row.given for row in rows if row.given is not None], None
    records = read_records(records_config(str(data), text, image, label, None, encoding), None, teacher.task)
    return records.inputs, class_numbers(records.labels, teacher.labels, records.source)


def _show(console: Console, found: dict[str, Any], out: Path) -> None:
    held = found["held_out"]
    console.print(
        f"on {held['answers']:,} held-out answers the student agrees with its teacher in"
        f" [bold]{figure(held['agreement'])}[/bold]; KL {figure(held['kl'])} nats"
    )
    if held["teacher_accuracy"] is not None:
        console.print(f"accuracy: teacher {figure(held['teacher_accuracy'])}, student {figure(held['student_accuracy'])}")
    console.print(f"the student: {escape(str(out))}")
