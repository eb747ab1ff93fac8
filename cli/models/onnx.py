"""`cotune onnx`: the head of a finished model as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cotune.cli.console import announce
from cotune.cli.models.predict import ModelSource


def onnx(
    model: ModelSource,
    out: Annotated[Path | None, typer.Option(help="Write to this new file; default: head.onnx in the model's folder.")] = None,
) -> None:
    """Write the head of a model on frozen layers as an ONNX file, which needs neither PyTorch nor cotune."""
    announce(f"loading PyTorch, then the head of {model}")
    from cotune.models.evaluation.predictor import folder_of  # loads PyTorch
    from cotune.models.features.onnx_head import write_onnx_head

    written = write_onnx_head(folder_of(model), None if out is None else out.expanduser())
    typer.echo(f"the head: {written}")
