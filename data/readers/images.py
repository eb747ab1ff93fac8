"""Images of records: decoded with limits, known again by their pixels, and found in folders.

Only PNG and JPEG are opened, by Pillow's own readers of these two; others, damaged ones and decompression bombs are refused.

Folders of image files: a folder for each class, and, one level up, a folder for each organization.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor

from cotune.errors import DataError, ModelError, reason_of

SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")
_MOST_PIXELS = 50_000_000  # decoded, 150 MB
_MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class Image:
    """An image that is decoded when it is needed.

    digest: SHA-256 of its size and pixels. source: its file, or the file's bytes.
    """

    digest: bytes
    source: Path | bytes = field(repr=False, compare=False)

    def pixels(self) -> Pillow.Image:
        """The image in RGB. Raises DataError when the file is not the one that was read at the start."""
        found = _decode(self.source)
        if _digest(found) != self.digest:
            raise DataError(
                "an image file was changed while it was in use: expected it as it was; restore it, or start a new run"
            )
        return found


def opened(source: Path | bytes) -> Image:
    """The image of a file or of its bytes, decoded once to see that it can be. Raises DataError with the reason alone."""
    return Image(_digest(_decode(source)), source)


def _digest(pixels: Pillow.Image) -> bytes:
    return hashlib.sha256(f"{pixels.width}x{pixels.height}\n".encode() + pixels.tobytes()).digest()


def _decode(source: Path | bytes) -> Pillow.Image:
    raw = _bytes(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow only warns of a smaller bomb
            with Pillow.open(io.BytesIO(raw), formats=_FORMATS) as found:
                if found.width * found.height > _MOST_PIXELS:
                    raise DataError(f"{found.width} × {found.height} pixels, expected at most {_MOST_PIXELS:,}: make it smaller")
                if found.mode.startswith(("I", "F")):
                    raise DataError("more than 8 bits per channel, expected 8: convert it, with the contrast that matters")
                return (ImageOps.exif_transpose(found) or found).convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("neither PNG nor JPEG: convert it") from None
    except Exception as error:  # damaged bytes raise anything: OSError, IndexError, struct.error, …
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise DataError(f"damaged or too large ({reason}): export it again") from None


def _bytes(source: Path | bytes) -> bytes:
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > _MOST_BYTES:
            raise DataError(f"{size:,} bytes, expected at most {_MOST_BYTES:,}: make it smaller")
        return source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise DataError(f"unreadable ({error.strerror}): check the path") from None


class ImageReader:
    """Resizes, crops and normalizes as preprocessor_config.json says: an image -> a tensor (3, height, width).

    What Hugging Face's processors of the ViT kind do, without torchvision. Raises ModelError for a configuration that asks for
    more.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "preprocessor_config.json"
        try:
            config: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("no object")
        except (OSError, ValueError, RecursionError):
            raise ModelError(
                "the base model has no readable preprocessor_config.json, which says how images are resized and normalized:"
                " download the folder again"
            ) from None
        _check_known(config)
        try:
            self._set(config)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:  # values that are none of their kind
            raise ModelError(
                f"the base model's preprocessor_config.json has a value that cannot be used ({reason_of(error)[:120]}): expected"
                " whole numbers for sizes, a filter of Pillow's, and three numbers for each mean and deviation; mend that file"
            ) from None

    def _set(self, config: dict[str, Any]) -> None:
        self.size = _size(config.get("size", 224)) if config.get("do_resize", True) else None
        self.crop = _size(config.get("crop_size", 224)) if config.get("do_center_crop") else None
        self.resample = Pillow.Resampling(config.get("resample", Pillow.Resampling.BILINEAR))
        self.scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        normal = config.get("do_normalize", True)
        self.mean, self.std = (
            torch.tensor(config.get(key, 0.5) if normal else plain).expand(3).reshape(3, 1, 1)
            for key, plain in (("image_mean", 0.0), ("image_std", 1.0))
        )
        if not (bool(self.mean.isfinite().all()) and bool((self.std > 0).all()) and 0 < self.scale < math.inf):
            raise ValueError("image_mean, image_std or rescale_factor gives no finite pixels")

    def __call__(self, pixels: Pillow.Image) -> Tensor:
        if self.size:
            pixels = pixels.resize(_resized(pixels.size, self.size), self.resample)
        if self.crop:
            pixels = _cropped(pixels, self.crop)
        values = torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1).float()
        return (values * self.scale - self.mean) / self.std

    def shape(self) -> tuple[int, int]:
        """(height, width) of every tensor. Raises ModelError when the configuration leaves it to the image."""
        for size in (self.crop, self.size):
            if size and "height" in size:
                return size["height"], size["width"]
        raise ModelError(
            "the base model's preprocessor_config.json lets the size of an image stand as it is: expected size with height and"
            " width, or a center crop"
        )

    def save_pretrained(self, folder: Path) -> None:
        shutil.copy(self.file, folder / self.file.name)


_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def _check_known(config: dict[str, Any]) -> None:
    asked = sorted(key for key, value in config.items() if key.startswith("do_") and value and key not in _STEPS)
    if config.get("crop_pct"):
        asked.append("crop_pct")
    if asked:
        raise ModelError(
            f"the base model's preprocessor_config.json asks for {asked[0]}, which is not supported: expected resizing, a center"
            " crop and normalizing only; use another base model"
        )


def _size(given: Any) -> dict[str, int]:
    """Sizes come as a number (of a square), {"height", "width"} or {"shortest_edge"}."""
    if isinstance(given, int):
        return {"height": given, "width": given}
    if isinstance(given, dict) and ({"height", "width"} <= given.keys() or "shortest_edge" in given):
        return {key: int(given[key]) for key in ("height", "width", "shortest_edge") if given.get(key)}
    raise ModelError(f"the base model's preprocessor_config.json has size {given}: expected height and width, or shortest_edge")


def _resized(size: tuple[int, int], wanted: dict[str, int]) -> tuple[int, int]:
    """(width, height) after resizing; with shortest_edge, the proportions stay."""
    if "height" in wanted:
        return wanted["width"], wanted["height"]
    width, height = size
    edge = wanted["shortest_edge"]
    return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)


def _cropped(pixels: Pillow.Image, wanted: dict[str, int]) -> Pillow.Image:
    left = (pixels.width - wanted["width"]) // 2
    top = (pixels.height - wanted["height"]) // 2
    return pixels.crop((left, top, left + wanted["width"], top + wanted["height"]))


def labeled_images(folder: Path) -> list[tuple[Path, str]]:
    """(file, class) of every image in the folder's sub-folders, which are named for their classes; sorted. Raises DataError."""
    try:
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        return [(file, path.name) for path in classes for file in sorted(path.iterdir()) if _is_image(file)]
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot be opened ({error.strerror}): check its permissions") from error


def holds_classes(folder: Path) -> bool:
    """Whether the folder is one organization's: its sub-folders hold images."""
    return folder.is_dir() and bool(labeled_images(folder))


def signature(folder: Path) -> int:
    """A number that changes when an image is added, removed, renamed or written anew."""
    digest = hashlib.sha256()
    for file, _ in labeled_images(folder):
        status = file.stat()
        digest.update(f"{file}\n{status.st_size}\n{status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big")


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
