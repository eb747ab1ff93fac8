"""The image processor of a base model: transformers' own, on Pillow, and only where every image becomes a tensor of one shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image as Pillow
from torch import Tensor

from cotune.errors import DataError, ModelError, reason_of

CONFIG_FILE = "preprocessor_config.json"
_MAX_SIDE = 8192  # pixels; larger ones would take gigabytes before they could be refused
_TRIAL_SIZES = ((64, 48), (48, 64), (7, 90), (30, 30))  # (width, height)


class ImageProcessor:
    """Resizes, crops and normalizes an image as `preprocessor_config.json` of a base model says.

    Pixels are those of `AutoImageProcessor.from_pretrained(folder, backend="pil")`, which needs no torchvision and runs no code
    of the folder. It is tried on made-up images when it is loaded: with a shape that depends on the image, one record would
    decide the shape of a batch, and with it the kernels that compute the others.

    Attributes:
        file: The configuration.
        shape: (height, width) of every tensor.

    Raises:
        ModelError: When the configuration is missing, cannot be used, or lets the size of an image stand as it is.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / CONFIG_FILE
        _check_config(self.file)
        try:
            self._processor: Any = transformers.AutoImageProcessor.from_pretrained(
                str(folder), backend="pil", trust_remote_code=False
            )  # imported here: it takes a second
            self.shape = self._try_out()
        except ModelError:
            raise
        except Exception as error:  # a configuration with values of the wrong kind raises anything
            raise ModelError(
                f"the base model's {CONFIG_FILE} cannot be used ({reason_of(error)[:160]}): expected that of an image processor"
                " of transformers that runs on Pillow; get the file that belongs to the model",
                code="model.unsupported_image_processor",
            ) from None

    def __call__(self, pixels: Pillow.Image) -> Tensor:
        """Return an image in RGB as a float32 tensor (3, height, width).

        Raises:
            DataError: When this image would get another shape, or values that are not finite.
        """
        prepared = self._prepare(pixels)
        if tuple(prepared.shape) != (3, *self.shape) or not bool(prepared.isfinite().all()):
            raise DataError(
                f"an image of {pixels.width} × {pixels.height} pixels becomes {tuple(prepared.shape)}: expected finite numbers of"
                f" shape {(3, *self.shape)}",
                code="data.unusable_image",
            )
        return prepared

    def save_pretrained(self, folder: Path) -> None:
        """Write the unchanged configuration into the folder of a model."""
        shutil.copy(self.file, folder / self.file.name)

    def _prepare(self, pixels: Pillow.Image) -> Tensor:
        with np.errstate(all="ignore"):  # what is not finite is refused
            found: Tensor = self._processor(images=pixels, return_tensors="pt")["pixel_values"][0]
        return found.to(torch.float32)

    def _try_out(self) -> tuple[int, int]:
        """Return the one (height, width) that images of several sizes get."""
        if getattr(self._processor, "backend", None) != "pil":
            raise ModelError(
                f"the base model's {CONFIG_FILE} names {type(self._processor).__name__}, which does not run on Pillow: expected"
                " an image processor that does; use another base model",
                code="model.unsupported_image_processor",
            )
        made = [self._prepare(_made_up_image(*size)) for size in _TRIAL_SIZES]
        shapes = sorted({tuple(tensor.shape) for tensor in made})
        if len(shapes) > 1 or len(shapes[0]) != 3 or shapes[0][0] != 3:
            raise ModelError(
                f"the base model's {CONFIG_FILE} gives images the shapes {', '.join(map(str, shapes))}: expected one shape (3,"
                " height, width) for all images, as size with height and width or a center crop makes it",
                code="model.unsupported_image_processor",
            )
        if not all(bool(tensor.isfinite().all()) for tensor in made):
            raise ModelError(
                f"the base model's {CONFIG_FILE} gives no finite pixels: expected finite image_mean and rescale_factor, and"
                " image_std above 0; get the file that belongs to the model",
                code="model.unsupported_image_processor",
            )
        return int(shapes[0][1]), int(shapes[0][2])


def _check_config(file: Path) -> None:
    """Check that the file is a JSON object, without sides so long that an image would not fit into memory. Raises ModelError."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError):
        raise ModelError(
            f"the base model has no readable {CONFIG_FILE}, which says how images are resized and normalized: download the folder"
            " again",
            code="model.missing_image_processor",
        ) from None
    sides = [side for key in ("size", "crop_size", "pad_size") for side in _numbers_in(config.get(key))]
    if any(side > _MAX_SIDE for side in sides):
        raise ModelError(
            f"the base model's {CONFIG_FILE} makes images of {max(sides)} pixels: expected at most {_MAX_SIDE} on each side",
            code="model.unsupported_image_processor",
        )


def _numbers_in(size: Any) -> list[float]:
    values = size.values() if isinstance(size, dict) else size if isinstance(size, list) else [size]
    return [value for value in values if isinstance(value, int | float)]


def _made_up_image(width: int, height: int) -> Pillow.Image:
    values = np.arange(height * width * 3, dtype=np.int64) * 37 % 256
    return Pillow.fromarray(values.reshape(height, width, 3).astype(np.uint8))
