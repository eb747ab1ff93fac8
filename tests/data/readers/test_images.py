from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as Pillow

from cotune.data.inputs.image_processor import ImageProcessor
from cotune.data.readers.images import open_image
from cotune.errors import DataError, ModelError
from tests.support.failures import fails_with
from tests.support.tiny_models import PROCESSOR


def noise(width: int, height: int, seed: int = 0) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Pillow.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# --- what is opened


def test_png_and_jpeg_are_opened() -> None:
    image = noise(9, 7)
    assert np.array_equal(np.asarray(open_image(encoded(image, "PNG")).pixels()), np.asarray(image))
    assert open_image(encoded(image, "JPEG")).pixels().size == (9, 7)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_other_modes_are_read_as_rgb(mode: str) -> None:
    assert open_image(encoded(noise(5, 5).convert(mode), "PNG")).pixels().mode == "RGB"


def test_a_turned_photograph_is_turned_back() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(noise(9, 7), "JPEG", exif=exif)).pixels().size == (7, 9)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="neither PNG nor JPEG"):
        open_image(encoded(noise(16, 16), kind))


def test_what_is_no_image_is_refused() -> None:
    for raw in (b"", b"no image", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", b"\xff\xd8\xff"):
        with pytest.raises(DataError):
            open_image(raw)


def test_a_cut_off_file_is_refused() -> None:
    for kind in ("PNG", "JPEG"):
        raw = encoded(noise(64, 64), kind)
        with pytest.raises(DataError, match="damaged or too large"):
            open_image(raw[: len(raw) // 2])


def test_sixteen_bits_per_channel_are_refused() -> None:
    """Pillow would cut all values off at 255."""
    deep = Pillow.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    with fails_with("data.unusable_image", "8"):
        open_image(encoded(deep, "PNG"))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says that it is huge."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8000, 8000), (12_000, 9_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="pixels|too large"):
            open_image(bomb(*size))


def test_a_file_that_changes_while_it_is_used_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    noise(8, 8).save(file)
    image = open_image(file)
    image.pixels()
    noise(8, 8, seed=1).save(file)
    with fails_with("data.changed"):
        image.pixels()
    file.unlink()
    with pytest.raises(DataError, match="No such file"):
        image.pixels()


# --- how it is prepared


def processor(folder: Path, **changes: Any) -> ImageProcessor:
    config = {key: value for key, value in {**PROCESSOR, **changes}.items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return ImageProcessor(folder)


def reference(image: Pillow.Image, size: tuple[int, int], resample: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """Pillow and the definitions alone: (values / 255 - mean) / std of the resized image; size: (height, width)."""
    pixels = np.asarray(image.resize(size[::-1], Pillow.Resampling(resample)), dtype=np.float64)
    return torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1).float()


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(40, 30), (8, 9), (16, 16)])
def test_pixels_are_resized_and_normalized_as_defined(tmp_path: Path, size: tuple[int, int], resample: int) -> None:
    mean = [0.4, 0.5, 0.6]
    std = [0.2, 0.3, 0.25]
    made = processor(tmp_path, resample=resample, image_mean=mean, image_std=std, size={"height": 16, "width": 12})
    expected = reference(noise(*size), (16, 12), resample, mean, std)
    torch.testing.assert_close(made(noise(*size)), expected, atol=5e-7, rtol=0)
    assert made.shape == (16, 12)


CROPPING = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "resample": 3}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ViT", {}),
        ("Bit", CROPPING),
        ("CLIP", CROPPING),
        ("ConvNext", {"size": {"shortest_edge": 16}, "crop_pct": 0.875}),
        ("EfficientNet", {}),
    ],
)
@pytest.mark.parametrize("size", [(40, 30), (30, 41), (25, 25)])
def test_pixels_are_those_of_the_library(tmp_path: Path, kind: str, changes: dict[str, Any], size: tuple[int, int]) -> None:
    config = {**PROCESSOR, "image_processor_type": f"{kind}ImageProcessor", **changes}
    library = getattr(transformers, f"{kind}ImageProcessorPil")(**config)
    expected = library(images=noise(*size), return_tensors="pt")["pixel_values"][0]
    made = processor(tmp_path, **config)
    assert torch.equal(made(noise(*size)), expected)
    assert made.shape == (16, 16)


def test_pixels_without_normalizing_are_scaled_to_one(tmp_path: Path) -> None:
    made = processor(tmp_path, do_normalize=False)(noise(16, 16))
    torch.testing.assert_close(made, torch.from_numpy(np.asarray(noise(16, 16)).copy()).permute(2, 0, 1) / 255)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_mean": [0.5, float("nan"), 0.5]},
        {"image_mean": [0.5] * 4},
        {"image_mean": "x"},
        {"resample": 99},
        {"size": {"height": 16, "width": "x"}},
        {"size": {"height": 16, "width": 9000}},
        {"size": {"shortest_edge": 20}},
        {"image_processor_type": "NoImageProcessor"},
        {"image_processor_type": None, "auto_map": {"AutoImageProcessor": "code.Processor"}},
    ],
)
def test_unusable_configuration_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as error:
        processor(tmp_path, **changes)
    assert error.value.code == "model.unsupported_image_processor"


def test_image_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Every batch has one shape, whatever an image is like."""
    made = processor(tmp_path)
    made.shape = (16, 17)
    with pytest.raises(DataError) as error:
        made(noise(16, 16))
    assert error.value.code == "data.unusable_image"


@pytest.mark.parametrize("content", [None, "{", "[]", "\ufeff{}", "[" * 100_000])
def test_missing_configuration_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ModelError) as error:
        ImageProcessor(tmp_path)
    assert error.value.code == "model.missing_image_processor"
