"""Images of records: decoded with limits, identified by their pixels, and found in folders.

Only PNG and JPEG are opened, by Pillow's own readers of these two; others, damaged ones and decompression bombs are refused. A
folder of images has a folder for each class and, one level up, a folder for each organization.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.errors import DataError

if TYPE_CHECKING:
    from PIL import Image as Pillow

SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")
_MAX_PIXELS = 50_000_000  # decoded, 150 MB
_MAX_BYTES = 100_000_000


@dataclass(frozen=True)
class Image:
    """An image that is decoded when it is needed.

    Attributes:
        digest: SHA-256 of its size and pixels.
        source: Its file, or the content of one.
    """

    digest: bytes
    source: Path | bytes = field(repr=False, compare=False)

    def pixels(self) -> Pillow.Image:
        """The image in RGB. Raises DataError when the file is not the one that was read at the start."""
        found = _decode(self.source)
        if _digest(found) != self.digest:
            raise DataError(
                "an image file was changed while it was in use: expected it as it was; restore it, or start a new run",
                code="data.changed",
            )
        return found


def open_image(source: Path | bytes) -> Image:
    """The image of a file or of its bytes, decoded once to see that it can be. Raises DataError with the reason alone."""
    return Image(_digest(_decode(source)), source)


def _digest(pixels: Pillow.Image) -> bytes:
    return hashlib.sha256(f"{pixels.width}x{pixels.height}\n".encode() + pixels.tobytes()).digest()


def _decode(source: Path | bytes) -> Pillow.Image:
    from PIL import Image as Pillow  # few commands read images, and all know the type of one
    from PIL import ImageOps, UnidentifiedImageError

    raw = _bytes(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow only warns of a smaller bomb
            with Pillow.open(io.BytesIO(raw), formats=_FORMATS) as found:
                if found.width * found.height > _MAX_PIXELS:
                    raise DataError(
                        f"{found.width} × {found.height} pixels, expected at most {_MAX_PIXELS:,}: make it smaller",
                        code="data.unusable_image",
                    )
                if found.mode.startswith(("I", "F")):
                    raise DataError(
                        "more than 8 bits per channel, expected 8: convert it, with the contrast that matters",
                        code="data.unusable_image",
                    )
                return (ImageOps.exif_transpose(found) or found).convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("neither PNG nor JPEG: convert it", code="data.unusable_image") from None
    except Exception as error:  # damaged bytes raise anything: OSError, IndexError, struct.error, …
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise DataError(f"damaged or too large ({reason}): export it again", code="data.unusable_image") from None


def _bytes(source: Path | bytes) -> bytes:
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > _MAX_BYTES:
            raise DataError(f"{size:,} bytes, expected at most {_MAX_BYTES:,}: make it smaller", code="data.unusable_image")
        return source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise DataError(f"unreadable ({error.strerror}): check the path", code="data.unusable_image") from None


def list_labeled_images(folder: Path) -> list[tuple[Path, str]]:
    """(file, class) of every image in the folder's sub-folders, which are named for their classes; sorted. Raises DataError."""
    try:
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        return [(file, path.name) for path in classes for file in sorted(path.iterdir()) if _is_image(file)]
    except OSError as error:
        raise DataError(
            f"{str(folder)!r} cannot be opened ({error.strerror}): check its permissions", code="data.not_readable"
        ) from error


def has_class_folders(folder: Path) -> bool:
    """Whether the folder is one organization's: its sub-folders hold images."""
    return folder.is_dir() and bool(list_labeled_images(folder))


def folder_signature(folder: Path) -> int:
    """A number that changes when an image is added, removed, renamed or written again."""
    digest = hashlib.sha256()
    for file, _ in list_labeled_images(folder):
        status = file.stat()
        digest.update(f"{file}\n{status.st_size}\n{status.st_mtime_ns}\n".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big")


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
