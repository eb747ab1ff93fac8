"""`cotune distill`: one model learns from others, on public inputs."""

from __future__ import annotations

import math
from dataclasses import replace
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

_MODES: tuple[TrainMode, ...] = ("head", "lora", "full")
_LOSSES: tuple[Loss, ...] = get_args(Loss)


def distill(
    teachers: Annotated[
        list[str],
        typer.Argument(
            metavar="TEACHER...", help="Models with the same classes, a fused one, or language models of one tokenizer."
        ),
    ],
    student: Annotated[str, typer.Option(help="The base model that learns: a folder, package:NAME or a hub id.")],
    data: Annotated[Path, typer.Option(help="Public inputs: a CSV, TSV, JSON lines or Parquet file; images also as a folder.")],
    out: Annotated[Path, typer.Option(help="Write the student to this new folder.")],
    text: Annotated[str | None, typer.Option(help='Column with the text, or with its words; default: "text".')] = None,
    image: Annotated[str | None, typer.Option(help='Column with the image; default: "image".')] = None,
    label: Annotated[str | None, typer.Option(help="Column with the class, where there are labels to learn from.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Column with the prompt, for a language model; with --target.")] = None,
    target: Annotated[str | None, typer.Option(help="Column with what a language model is to write.")] = None,
    messages: Annotated[str | None, typer.Option(help="Column with a chat, for a language model, in place of these two.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What a chat model is to do with each prompt, as in training (data.instruction).")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message that each chat begins with, as in training (data.system).")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="What stands between prompt and target, as in training; default: a line break.")
    ] = None,
    write_targets: Annotated[
        int | None,
        typer.Option(min=1, max=4096, metavar="N", help="Let language models write the targets, of at most N tokens."),
    ] = None,
    teacher_weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="How much each language model counts, as `cotune fuse` finds; default: all alike."),
    ] = None,
    label_weight: Annotated[
        float, typer.Option(min=0, max=1, help="Weight of the labels, or targets; the rest is the teacher's.")
    ] = 0.5,
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
        label_weight=label_weight,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    columns = RecordOptions(
        text=text,
        image=image,
        label=label,
        prompt=prompt,
        target=target,
        messages=messages,
        instruction=instruction,
        system=system,
        separator=separator,
        encoding=encoding,
    )
    weights = _parse_weights(teacher_weights, len(teachers))
    check_file(data)
    if test is not None:
        check_file(test)
    check_base(student)
    check_new(out)
    announce(f"loading PyTorch, then {len(teachers)} teachers", quiet=as_json)
    from cotune.cli.models.distilled_texts import distill_texts, find_task
    from cotune.cli.models.record_predictions import distill_models  # loads PyTorch

    base = ModelConfig.model_validate({"base": student, "max_length": max_length})
    file, folder = data.expanduser(), out.expanduser()
    about: dict[str, Any] = {
        "out": folder,
        "device": device,
        "license": license,
        "source": data.name if source is None else source,
    }
    task = find_task(teachers)
    _check_options(columns, write_targets, test, teacher_weights, is_for_texts=task is not None)
    if task is None:
        plain = config if label is not None else replace(config, label_weight=0.0)
        tested = None if test is None else test.expanduser()
        found = distill_models(teachers, base, plain, file, columns, test=tested, **about)
    else:
        found = distill_texts(teachers, task, base, config, file, columns, write=write_targets, weights=weights, **about)
    if as_json:
        print_json(found)
    elif task is None:
        _show(open_console(), found, out)
    else:
        _show_texts(open_console(), found, out)


def _parse_weights(given: str | None, count: int) -> tuple[float, ...]:
    """The weights of all teachers, together 1; none for none. Raises BadParameter."""
    if given is None:
        return ()
    try:
        weights = [float(part) for part in given.split(",")]
    except ValueError:
        weights = []
    total = math.fsum(weights)
    if len(weights) != count or min(weights) < 0 or not 0 < total < math.inf:
        raise typer.BadParameter(f"--teacher-weights {given}: expected {count} numbers from 0 on, such as 0.7,0.3")
    return tuple(weight / total for weight in weights)


def _check_options(
    columns: RecordOptions, write: int | None, test: Path | None, weights: str | None, *, is_for_texts: bool
) -> None:
    """Raises BadParameter for an option of the other kind of models."""
    classes = {"--image": columns.image, "--label": columns.label, "--test": test}
    texts: dict[str, object] = {
        "--prompt": columns.prompt,
        "--target": columns.target,
        "--messages": columns.messages,
        "--instruction": columns.instruction,
        "--system": columns.system,
        "--separator": columns.separator,
        "--write-targets": write,
        "--teacher-weights": weights,
    }
    for option, value in (classes if is_for_texts else texts).items():
        if value is not None:
            kinds = ("a classifier", "language models") if is_for_texts else ("a language model", "classifiers")
            raise typer.BadParameter(f"{option} is for {kinds[0]}, and these teachers are {kinds[1]}: leave it out")


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


def _show_texts(console: Console, found: dict[str, Any], out: Path) -> None:
    held = found["held_out"]
    teacher, before, student = (each["loss"] for each in (held["teacher"], held["before"]["student"], held["student"]))
    for reason, count in found["left_out"].items():
        if count:
            console.print(f"left out, {escape(reason)}: {count:,}")
    console.print(
        f"on {held['records']:,} held-out records the student's loss is [bold]{figure(student)}[/bold] nats per token, before"
        f" {figure(before)}, its teacher's {figure(teacher)}"
    )
    agreed = f"the most probable token is that of its teacher in {figure(held['agreement'])} of the cases"
    console.print(f"{agreed}; KL {figure(held['kl'])} nats")
    for name in found["unprotected"]:
        console.print(
            f"the model card of the teacher {escape(name)} promises no differential privacy: what it remembers may pass to the"
            " student"
        )
    console.print(f"the student: {escape(str(out))}")
