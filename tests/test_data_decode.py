"""Decoding: the right pixels of every kind of file, and one sentence for what is none."""

import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from simmim.data import DetectionData, ImageFolderData, SegmentationData
from simmim.data.decode import UnreadableImage, decode_image
from simmim.data.scans import Intensity
from support.files import encoded, npy
from support.folders import make_images


def scene(width: int = 96, height: int = 64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 2, y * 3, 255 - x - y], axis=-1).clip(0, 255).astype(np.uint8)
    pixels[8:20, 60:80] = (250, 20, 20)
    return Image.fromarray(pixels)


def decoded(data: bytes, in_chans: int = 3) -> np.ndarray:
    image = decode_image(data, in_chans, Intensity())
    assert image.shape[0] == in_chans
    return image.permute(1, 2, 0).numpy()  # CHW -> HWC


def off_by(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).max())


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}]
)
def test_jpeg_is_pillows_to_a_grey_level(options: dict[str, object]) -> None:
    data = encoded(scene(), "JPEG", quality=90, **options)
    assert off_by(decoded(data), np.asarray(Image.open(io.BytesIO(data)))) <= 1


def test_channels() -> None:
    gray, color = scene().convert("L"), scene()
    for format in ("PNG", "JPEG"):
        three = decoded(encoded(gray, format))
        assert (three == three[..., :1]).all()
        one = decoded(encoded(color, format), in_chans=1)
        assert off_by(one[..., 0], np.asarray(gray)) <= (6 if format == "JPEG" else 1)
    with pytest.raises(ValueError, match=r"it has 3 channels, data\.in_chans is 5"):
        decoded(encoded(color, "PNG"), in_chans=5)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "PPM", "WEBP"])
def test_lossless_formats(format: str) -> None:
    image = scene().quantize(200).convert("RGB") if format == "GIF" else scene()
    data = encoded(image, format, **({"lossless": True} if format == "WEBP" else {}))
    assert off_by(decoded(data), np.asarray(image)) == 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_as_exif_says(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert off_by(decoded(data), wanted) <= 1
    assert wanted.shape[:2] == ((96, 64) if orientation > 4 else (64, 96))


def test_transparent_parts_are_white() -> None:
    image = scene().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    pixels = decoded(encoded(image, "PNG"))
    alpha = np.asarray(image)[..., 3:] / 255
    assert off_by(pixels, np.asarray(scene()) * alpha + 255 * (1 - alpha)) <= 1
    assert off_by(decoded(encoded(image, "PNG"), in_chans=4), np.asarray(image)) == 0
    gray = Image.merge("LA", (scene().convert("L"), Image.new("L", image.size, 0)))
    assert (decoded(encoded(gray, "PNG"), in_chans=1) == 255).all()


def test_palettes_and_bilevel() -> None:
    palette = scene().quantize(64)
    assert off_by(decoded(encoded(palette, "PNG")), np.asarray(palette.convert("RGB"))) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of transparency given as bytes
        data = encoded(palette, "PNG", transparency=bytes([0] * 64))
        assert (decoded(data) == 255).all()
    assert set(np.unique(decoded(encoded(scene().convert("1"), "PNG")))) == {0, 255}


# What is larger than may be decoded ---------------------------------------------------------------


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that small images reach: a quarter of the scene."""
    for module in ("decode", "scans"):
        monkeypatch.setattr(f"simmim.data.{module}.MAX_PIXELS", 96 * 64 // 4)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("times", [1, 3, 4])
def test_an_enormous_jpeg_is_read_reduced(
    least: None, options: dict[str, object], times: int
) -> None:
    enormous = scene().resize((96 * times, 64 * times), Image.Resampling.BICUBIC)
    pixels = decoded(encoded(enormous, "JPEG", quality=95, **options))
    assert pixels.shape == {1: (32, 48, 3), 3: (24, 36, 3), 4: (32, 48, 3)}[times]  # 1/2, 1/8, 1/8
    seen = enormous.resize(pixels.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(pixels.astype(float) - np.asarray(seen)).mean() < 2
    assert decoded(encoded(enormous, "JPEG", **options), in_chans=1).shape[2] == 1


def test_a_reduced_jpeg_is_turned_and_its_scans_are_looked_at(least: None) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(encoded(scene(), "JPEG", exif=exif)).shape == (48, 32, 3)
    data = encoded(Image.effect_noise((96, 64), 60), "JPEG")
    with pytest.raises(ValueError, match="Premature end"):
        decoded(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["progressive", "cmyk", "png", "tiff", "whole"])
def test_others_of_that_size_are_refused_before_they_are_in_memory(least: None, kind: str) -> None:
    image = scene().convert("CMYK") if kind == "cmyk" else scene()
    format = {"png": "PNG", "tiff": "TIFF"}.get(kind, "JPEG")
    data = encoded(image, format, **({"progressive": True} if kind == "progressive" else {}))
    with pytest.raises(ValueError, match="claims 96 x 64 pixels, at most 1,536 go: if it is as la"):
        decode_image(data, 3, Intensity(), whole=kind == "whole")


def test_boxes_and_masks_are_for_the_files_own_pixels(least: None, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 4, size=(96, 64), suffix=".jpg")
    make_images(tmp_path / "masks", 4, size=(96, 64))
    segmentation, detection = SegmentationData(str(tmp_path)), DetectionData(str(tmp_path))
    for module in (segmentation, detection):
        module.setup("predict")
        with pytest.raises(UnreadableImage, match="at most 1,536 go"):
            module.sets["predict"].read(0)
    module = ImageFolderData(str(tmp_path / "images"), img_size=16)
    module.setup("fit")
    assert module.sets["training"].read(0).shape == (3, 32, 48)


# Scans: deeper than 8 bits, or of many channels ---------------------------------------------------

RAMP = np.arange(64 * 64).reshape(64, 64)
RANDOM = np.random.default_rng(0)


def png16(values: Any) -> bytes:
    return encoded(Image.fromarray(np.asarray(values, np.uint16)), "PNG")


def tiff(values: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    if values.shape[-1:] == (1,) and "planarconfig" in options:
        values, options = values[..., 0], {**options, "planarconfig": None}
    tifffile.imwrite(stream, values, **{"photometric": "minisblack", **options})
    return stream.getvalue()


def scan(data: bytes, in_chans: int = 1, **intensity: Any) -> np.ndarray:
    """A scan that was decoded, (C, H, W)."""
    image = decode_image(data, in_chans, Intensity(**intensity))
    assert image.dtype == torch.float32
    return image.numpy()


def test_scans_are_spread_over_their_own_range() -> None:
    for values in (RAMP, RAMP * 16, RAMP // 16 + 20):  # 12 bit, 16 bit, an MRI that ends at 275
        for data in (png16(values), encoded(Image.fromarray(values.astype(np.float32)), "TIFF")):
            image = scan(data)
            assert (image.min(), image.max()) == (0, 1)
            assert image.mean() == pytest.approx(0.5, abs=0.01)
    low, high = np.percentile(RAMP, [10, 90])
    wanted = ((RAMP - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(scan(png16(RAMP), percentiles=(10, 90))[0], wanted, atol=1e-6)
    image = scan(png16([[0, 100, 150, 300, 9000]]), window=(100, 300))
    assert image.flatten().tolist() == [0, 0, 0.25, 1, 1]
    assert (scan(png16(np.full((8, 8), 700))) == 0).all()
    for size in (100, 1024):  # a bright spot, also where the sample of the percentiles misses it
        spots = np.zeros((size, size))
        spots[7, 7:9] = 4000
        assert scan(png16(spots)).max() == 1


def test_nan_is_black_and_the_order_of_bytes_is_the_files() -> None:
    values = np.linspace(-3, 5, 4096, dtype=np.float32).reshape(64, 64)
    values[0, :5] = np.nan
    image = scan(encoded(Image.fromarray(values), "TIFF"), 3, percentiles=(0, 100))
    assert image[:, 0, :5].tolist() == [[0] * 5] * 3
    assert image[:, -1, -1].tolist() == [1] * 3
    little = Image.fromarray(RAMP.astype(np.uint16))
    big = Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes())
    assert np.array_equal(scan(encoded(big, "TIFF")), scan(encoded(little, "TIFF")))


@pytest.mark.parametrize(
    "shape", [(512, 512, 1), (512, 1024, 4), (256, 1032, 5), (2**17, 8, 1), (600, 700, 13)]
)
def test_percentiles_are_of_all_channels_and_columns(shape: tuple[int, int, int]) -> None:
    values = np.random.default_rng(0).random(shape, np.float32)
    values += np.arange(shape[2], dtype=np.float32) ** 2 * 100  # bands of unlike ranges
    values *= 1 + np.arange(shape[1], dtype=np.float32)[:, None] % 8
    low, high = np.percentile(values, (0.5, 99.5))
    wanted = np.moveaxis(((values - low) / (high - low)).clip(0, 1), 2, 0)
    np.testing.assert_allclose(scan(npy(values), shape[2]), wanted, atol=2e-3)


@pytest.mark.parametrize("axes", ["CYX", "ZCYX", "CZYX", "TCYX"])
@pytest.mark.parametrize(
    "options",
    [{"imagej": True}, {"imagej": True, "truncate": True}, {"ome": True}, {"compression": "zlib"}],
    ids=["imagej", "one page", "ome", "tifffile"],
)
def test_channels_that_are_pages(axes: str, options: dict[str, Any]) -> None:
    if axes == "CZYX" and "imagej" in options:  # which has one order
        axes = "ZCYX"
    for kind in ("u1", "u2"):
        values = (RANDOM.random((4, 2, 20, 30)) * 200).astype(kind)
        stored = {"CYX": values[0], "CZYX": values.swapaxes(0, 1)}.get(axes, values)
        data = tiff(stored, metadata={"axes": axes}, **options)
        image = decode_image(data, 2, Intensity(window=(0, 200)))
        wanted = values[0] / (np.float32(200) if kind == "u2" else 1)
        np.testing.assert_allclose(image.numpy(), wanted, atol=1e-6)
        with pytest.raises(ValueError, match=r"it has 2 channels, data\.in_chans is 3"):
            decode_image(data, 3, Intensity())


def test_pages_that_are_left_out_are_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = RANDOM.integers(0, 200, (3, 20, 30), np.uint8)
    for axes in ("", "ZYX", "TYX", "CYX"):
        caplog.clear()
        monkeypatch.setattr("simmim.data.scans._reported", [0])
        data = tiff(values, metadata={"axes": axes} if axes else None, contiguous=False)
        for _ in range(2):
            image = decode_image(data, 3 if axes == "CYX" else 1, Intensity())
            assert np.array_equal(image[0].numpy(), values[0])
        assert caplog.text.count("only the first of 3 pages is read") == (axes != "CYX")


@pytest.mark.parametrize("kind", ["u1", "u2", "<f4", "f2", "f8", "u4", "i2", "i1"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_of_many_bands(kind: str, planar: str) -> None:
    for bands in (1, 2, 4, 5, 13):
        values = (RANDOM.random((20, 32, bands)) * 100).astype(kind)
        stored = values if planar == "contig" or bands == 1 else np.moveaxis(values, 2, 0)
        data = tiff(stored, planarconfig=planar, compression="lzw", tile=(16, 16))
        image = decode_image(data, bands, Intensity(window=(0, 100)))
        assert image.dtype == (torch.uint8 if kind == "u1" else torch.float32)
        wanted = np.moveaxis(values, 2, 0) / (1 if kind == "u1" else np.float32(100))
        np.testing.assert_allclose(image.numpy(), wanted, atol=1e-6)
        if bands == 5:
            with pytest.raises(ValueError, match=r"it has 5 channels, data\.in_chans is 3"):
                decode_image(data, 3, Intensity())
    colour = RANDOM.integers(0, 4000, (20, 30, 3), np.uint16)
    image = scan(tiff(colour, photometric="rgb"), 3, window=(0, 4000))
    np.testing.assert_allclose(np.moveaxis(image, 0, 2), colour / 4000, atol=1e-6)


@pytest.mark.parametrize("bands", [1, 3])
def test_what_was_not_measured_does_not_count(bands: int) -> None:
    values = RANDOM.random((20, 30, bands)).astype(np.float32) + 5
    values[:10] = -9999
    tags = [(42113, "s", 0, "-9999", True)]
    image = scan(tiff(values, planarconfig="contig", extratags=tags), bands)
    assert (image[:, :10] == 0).all()
    assert image[:, 10:].mean() == pytest.approx(0.5, abs=0.05)


def test_tiffs_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(np.zeros((8, 8, 5), np.uint16), planarconfig="contig")
    for tag in (256, 257):  # width and length, numbers of 4 bytes
        size = struct.pack("<HHI", tag, 4, 1)
        data = data.replace(size + struct.pack("<I", 8), size + struct.pack("<I", 60_000))
    with pytest.raises(ValueError, match="claims 60000 x 60000 pixels"):
        decode_image(data, 5, Intensity())
    monkeypatch.setattr("simmim.data.tiff.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'simmim\[tiff\]'"):
        decode_image(data, 5, Intensity())


def test_numpy_arrays() -> None:
    bands = RANDOM.random((5, 8, 9))
    image = scan(npy(bands), 5, window=(0, 1))
    np.testing.assert_allclose(image, bands, atol=1e-6)
    assert np.array_equal(image, scan(npy(np.moveaxis(bands, 0, 2)), 5, window=(0, 1)))
    gray = decode_image(npy(np.eye(7, dtype=np.uint8) * 9), 3, Intensity())
    assert (gray.dtype, gray.shape, int(gray.max())) == (torch.uint8, (3, 7, 7), 9)
