"""Image classification: an image has one class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from cotune.data.class_names import class_name
from cotune.data.inputs.image_processor import CONFIG_FILE, ImageProcessor
from cotune.data.readers.data_file import DataFile, format_value, is_unicode
from cotune.data.readers.images import Image, open_image
from cotune.data.tasks.classes import IGNORED, ClassTargets
from cotune.data.tasks.text import Collate, map_or_none
from cotune.data.types import Input, Label
from cotune.errors import DataError, ModelError

Example = dict[str, Any]  # {"image": Image, or Tensor (3, h, w) where it is made up; "labels": int}


class ImageClassification(ClassTargets):
    """See `tasks.Task`. Images are decoded when a batch is made: decoded ones may not fit into memory together."""

    key = "image"
    described = "image classifier"
    needs = f"its {CONFIG_FILE}"
    pipeline = "image-classification"
    problem_type: str | None = "single_label_classification"
    pools = True

    def model_class(self) -> Any:
        return AutoModelForImageClassification

    def record(self, file: DataFile, number: int, given: object, label: object) -> tuple[Input, Label] | str:
        name = class_name(format_value(file, file.config.label, number, label))
        source = _source(file, number, given)
        if not source:
            return "blank image"
        if not name:
            return "missing label"
        if not is_unicode(name):
            return "broken Unicode"
        try:
            return open_image(source), name
        except DataError as error:
            raise DataError(
                f"{file.name} holds an unusable image in record {number}{_shown(source)}, {error}", code=error.code
            ) from None

    def unlabeled(self, file: DataFile, number: int, given: object) -> tuple[Input, Label] | str:
        return self.record(file, number, given, "-")

    def reader(self, folder: Path) -> ImageProcessor:
        return ImageProcessor(folder)

    def fit(self, reader: ImageProcessor, module: Any) -> None:
        settings = getattr(module.config, "vision_config", module.config)  # CLIP and SigLIP have a configuration for each half
        shape = reader.shape
        wanted = getattr(settings, "image_size", None)
        wanted = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted or shape)
        if shape != wanted:
            raise ModelError(
                f"the base model reads images of {wanted[0]} × {wanted[1]} pixels, and its {CONFIG_FILE} makes them"
                f" {shape[0]} × {shape[1]}: expected the same; correct one of the two files",
                code="model.image_size",
            )
        channels = getattr(settings, "num_channels", 3)
        if channels != 3:
            raise ModelError(
                f"the base model reads {channels} channels: expected 3 (RGB); use another base model", code="model.image_size"
            )

    def longest(self, reader: ImageProcessor, module: Any, wanted: int) -> int:
        """An image is no row of tokens."""
        return wanted

    def examples(self, reader: Any, max_length: int, inputs: Sequence[Any], targets: Sequence[Any]) -> list[Example]:
        return [{"image": image, "labels": target} for image, target in zip(inputs, targets, strict=True)]

    def cut(self, reader: ImageProcessor, max_length: int, inputs: Sequence[Any]) -> int:
        """An image is scaled as a whole."""
        return 0

    def samples(self, reader: ImageProcessor) -> list[Example]:
        """Gradients from dark to light, across, down and both."""
        height, width = reader.shape
        across = torch.linspace(-1, 1, width).expand(height, width)
        down = torch.linspace(-1, 1, height)[:, None]
        planes = (across, down.expand(height, width), across * down)
        return [{"image": plane.expand(3, height, width), "labels": k % 2} for k, plane in enumerate(planes)]

    def blank(self, reader: ImageProcessor, length: int) -> Example:
        """A black image, without a label."""
        return {"image": torch.zeros(3, *reader.shape), "labels": IGNORED}

    def bucket(self, example: Example, max_length: int, lengths: Sequence[int] = ()) -> int:
        """All images are of one size."""
        return 1

    def collator(self, module: nn.Module, reader: ImageProcessor, to: torch.device) -> Collate:
        def collate(examples: Sequence[Example], length: int | None = None, slots: int | None = None) -> dict[str, Tensor]:
            if slots is None:
                rows = [_row(reader, example) for example in examples]
            else:
                nothing = _row(reader, self.blank(reader, 1))
                rows = [row or nothing for row in map_or_none(lambda part: [_row(reader, e) for e in part], examples)]
                rows += [nothing] * (slots - len(rows))
            pixels = torch.stack([image for image, _ in rows])
            return {"pixel_values": pixels.to(to), "labels": torch.tensor([label for _, label in rows]).to(to)}

        return collate

    def order(self, example: Example) -> tuple[Any, ...]:
        return (example["image"].digest,)

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[tuple[Any, ...]]:
        return [(best,) for best in scores.argmax(dim=1).tolist()]

    def answer_scores(self, scores: Tensor, examples: Sequence[Example]) -> list[Tensor]:
        return [scores[i : i + 1] for i in range(len(examples))]

    def stand_in(self, features: Tensor, pad: int) -> dict[str, Tensor]:
        return {"pixel_values": features}


def _row(reader: ImageProcessor, example: Example) -> tuple[Tensor, int]:
    """(3, h, w) and the class. Raises DataError for an image that is not as it was."""
    image = example["image"]
    return (reader(image.pixels()) if isinstance(image, Image) else image), example["labels"]


def _source(file: DataFile, number: int, given: object) -> Path | bytes | None:
    """Where an image is: bytes, as Hugging Face's image columns have them, or a path beside the file of records."""
    if isinstance(given, dict):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, Path | bytes):
        return given
    column = file.wanted[0]
    word = format_value(file, column, number, given).strip()
    if not word:
        return None
    folder = file.path.parent.resolve()
    path = (folder / word).resolve()
    if not path.is_relative_to(folder):
        raise DataError(
            f"{file.name} has a path in record {number} of column {column!r} that leads out of its folder: expected one relative"
            " to the file",
            code="data.path_outside_folder",
        )
    return path


def _shown(source: Path | bytes) -> str:
    return f" ({source.name})" if isinstance(source, Path) else ""
