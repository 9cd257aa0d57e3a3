"""Decoding: the right pixels of every kind of file, and one sentence for what is none."""

import io
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from simmim.data import DetectionData, ImageFolderData, SegmentationData
from simmim.data.decode import UnreadableImage, decode_image, read_image
from simmim.data.scans import Intensity

SHARED = Path(__file__).parents[2] / "shared" / "data"


def scene(width: int = 96, height: int = 64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 2, y * 3, 255 - x - y], axis=-1).clip(0, 255).astype(np.uint8)
    pixels[8:20, 60:80] = (250, 20, 20)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def decoded(data: bytes, in_chans: int = 3) -> np.ndarray:
    image = decode_image(data, in_chans, Intensity())
    assert image.shape[0] == in_chans
    return image.permute(1, 2, 0).numpy()  # CHW -> HWC


def off_by(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).max())


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "PPM", "WEBP"])
def test_lossless_formats(format: str) -> None:
    image = scene().quantize(200).convert("RGB") if format == "GIF" else scene()
    data = encoded(image, format, **({"lossless": True} if format == "WEBP" else {}))
    assert off_by(decoded(data), np.asarray(image)) == 0


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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_as_exif_says(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert off_by(decoded(data), wanted) <= 1
    assert wanted.shape[:2] == ((96, 64) if orientation > 4 else (64, 96))


def test_nonsense_in_exif_is_no_reason() -> None:
    nonsense = b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff\xff\xff"
    assert decoded(encoded(scene(), "JPEG", exif=nonsense)).shape == (64, 96, 3)


def test_cmyk_looks_like_its_picture() -> None:
    data = encoded(scene().convert("CMYK"), "JPEG", quality=100)
    assert off_by(decoded(data), np.asarray(scene())) < 12


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


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_pictures_the_first(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (decoded(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    for format in ("PNG", "JPEG"):
        assert decoded(encoded(Image.new("RGB", size, "navy"), format)).shape == (*size[::-1], 3)


def test_contents_count_and_not_names(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded(scene(), "PNG"))
    image = read_image(str(tmp_path / "x.jpg"), 3, Intensity())
    assert off_by(image.permute(1, 2, 0).numpy(), np.asarray(scene())) == 0


def _damaged() -> dict[str, tuple[bytes, str]]:
    noise = Image.effect_noise((320, 240), 60)
    jpeg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    middle, bomb = bytearray(jpeg), bytearray(jpeg)
    middle[len(jpeg) // 2 : len(jpeg) // 2 + 400] = np.random.default_rng(2).bytes(400)
    start = jpeg.index(b"\xff\xc0")
    bomb[start + 5 : start + 9] = b"\xff\xdc" * 2  # 65,500 x 65,500
    crc = bytearray(png)
    crc[len(png) // 2] ^= 0xFF
    return {
        "empty.jpg": (b"", "the file is empty"),
        "zeros.jpg": (bytes(9000), "nothing but zeros"),
        "text.jpg": (b"no picture" * 30, "it is no image"),
        "lfs.png": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "Premature end"),
        "no_end.jpg": (jpeg[:-2], "Premature end"),
        "middle.jpg": (bytes(middle), "Corrupt JPEG data"),
        "bomb.jpg": (bytes(bomb), "claims 65500 x 65500 pixels, for which it is too"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "crc.png": (bytes(crc), "broken|truncated|data stream"),
    }


@pytest.mark.parametrize("name", _damaged())
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    data, reason = _damaged()[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableImage, match=rf"{name}' cannot be read: .*({reason})"):
        read_image(str(tmp_path / name), 3, Intensity())


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


def test_boxes_and_masks_are_for_the_files_own_pixels(
    least: None, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
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


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"gone.jpg' cannot be read: .*No such file"):
        read_image(str(tmp_path / "gone.jpg"), 3, Intensity())


def test_a_sentence_survives_the_way_out_of_a_worker() -> None:
    wrapped = "Caught UnreadableImage in DataLoader worker process 0.\nTraceback ...\n" + (
        "simmim.data.decode.UnreadableImage: 'x.jpg' cannot be read: the file is empty\n"
    )
    assert str(UnreadableImage(wrapped)) == "'x.jpg' cannot be read: the file is empty"


def depth16(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.uint16)), "PNG")


def test_deep_scans_are_spread_over_their_own_range() -> None:
    ramp = np.arange(64 * 64).reshape(64, 64)
    for values in (ramp, ramp * 16, ramp // 16 + 20):  # 12 bit, 16 bit, an MRI that ends at 275
        image = decode_image(depth16(values), 1, Intensity())
        assert image.dtype == torch.float32
        assert (image.min(), image.max()) == (0, 1)
        assert image.mean() == pytest.approx(0.5, abs=0.01)


def test_percentiles_by_hand() -> None:
    values = np.arange(1000).reshape(20, 50)
    image = decode_image(depth16(values), 1, Intensity(percentiles=(10, 90)))[0].numpy()
    low, high = np.percentile(values, [10, 90])
    np.testing.assert_allclose(image, ((values - low) / (high - low)).clip(0, 1), atol=1e-6)


def test_a_window_keeps_values_comparable() -> None:
    intensity = Intensity(window=(100, 300))
    image = decode_image(depth16(np.array([[0, 100, 150, 300, 9000]])), 1, intensity)
    assert image.flatten().tolist() == [0, 0, 0.25, 1, 1]


@pytest.mark.parametrize("in_chans", [1, 3])
def test_float_tiff(in_chans: int) -> None:
    values = np.linspace(-3, 5, 4096, dtype=np.float32).reshape(64, 64)
    values[0, :5] = np.nan
    data = encoded(Image.fromarray(values), "TIFF")
    image = decode_image(data, in_chans, Intensity(percentiles=(0, 100)))
    assert image.shape == (in_chans, 64, 64)
    assert image[0, 0, :5].tolist() == [0] * 5
    assert image[:, -1, -1].tolist() == [1] * in_chans


def test_big_endian_and_little_endian_tiff_agree() -> None:
    values = np.arange(300, dtype=np.uint16).reshape(10, 30)
    little = decode_image(encoded(Image.fromarray(values), "TIFF"), 1, Intensity())
    big = Image.frombytes("I;16B", (30, 10), values.astype(">u2").tobytes())
    assert torch.equal(decode_image(encoded(big, "TIFF"), 1, Intensity()), little)


def test_few_bright_spots_and_constant_scans() -> None:
    spots = np.zeros((100, 100))
    spots[50, 50:53] = 4000
    assert decode_image(depth16(spots), 1, Intensity()).max() == 1
    flat = decode_image(depth16(np.full((8, 8), 700)), 1, Intensity())
    assert (flat == 0).all()


@pytest.mark.parametrize(
    "shape", [(512, 512, 1), (512, 1024, 4), (256, 1032, 5), (2**17, 8, 1), (600, 700, 13)]
)
def test_percentiles_are_of_all_channels_and_columns(shape: tuple[int, int, int]) -> None:
    values = np.random.default_rng(0).random(shape, np.float32)
    values += np.arange(shape[2], dtype=np.float32) ** 2 * 100  # bands of unlike ranges
    values *= 1 + np.arange(shape[1], dtype=np.float32)[:, None] % 8
    stream = io.BytesIO()
    np.save(stream, values)
    image = decode_image(stream.getvalue(), shape[2], Intensity())
    low, high = np.percentile(values, (0.5, 99.5))
    wanted = ((values - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(image.permute(1, 2, 0), wanted, atol=2e-3)


def test_spots_that_a_sample_misses() -> None:
    values = np.zeros((1024, 1024), np.uint16)
    values[7, 7] = 4000
    assert decode_image(depth16(values), 1, Intensity()).max() == 1


def as_tiff(values: np.ndarray, axes: str = "", **options: Any) -> bytes:
    stream = io.BytesIO()
    about = {"metadata": {"axes": axes} if axes else None, "photometric": "minisblack"}
    tifffile.imwrite(stream, values, **about, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("axes", ["CYX", "ZCYX", "CZYX", "TCYX"])
@pytest.mark.parametrize(
    "options",
    [{"imagej": True}, {"imagej": True, "truncate": True}, {"ome": True}, {"compression": "zlib"}],
    ids=["imagej", "one page", "ome", "tifffile"],
)
def test_channels_that_are_pages(kind: str, axes: str, options: dict[str, Any]) -> None:
    values = (np.random.default_rng(0).random((4, 2, 20, 30)) * 200).astype(kind)
    wanted = values[0] / (np.float32(200) if kind == "u2" else 1)
    if axes == "CZYX" and "imagej" in options:  # which has one order
        axes = "ZCYX"
    stored = {"CYX": values[0], "CZYX": values.swapaxes(0, 1)}.get(axes, values)
    image = decode_image(as_tiff(stored, axes, **options), 2, Intensity(window=(0, 200)))
    np.testing.assert_allclose(image.numpy(), wanted, atol=1e-6)
    with pytest.raises(ValueError, match=r"it has 2 channels, data\.in_chans is 3"):
        decode_image(as_tiff(stored, axes, **options), 3, Intensity())


@pytest.mark.parametrize("axes", ["", "ZYX", "TYX"])
def test_pages_that_are_left_out_are_reported_once(
    axes: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("simmim.data.scans._reported", [0])
    values = np.random.default_rng(0).integers(0, 200, (3, 20, 30), np.uint8)
    for _ in range(2):
        image = decode_image(as_tiff(values, axes, contiguous=False), 1, Intensity())
        assert np.array_equal(image[0].numpy(), values[0])
    assert caplog.text.count("only the first of 3 pages is read") == 1
    caplog.clear()
    decode_image(as_tiff(values, "CYX"), 3, Intensity())
    assert not caplog.text


@pytest.mark.parametrize("kind", ["u1", "u2", "<f4", "f2", "f8", "u4", "i2", "i1"])
@pytest.mark.parametrize("bands", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_of_many_bands(kind: str, bands: int, planar: str) -> None:
    values = (np.random.default_rng(0).random((20, 32, bands)) * 100).astype(kind)
    stored = values if planar == "contig" else np.moveaxis(values, 2, 0)
    stream = io.BytesIO()
    tifffile.imwrite(
        stream, stored if bands > 1 else values[..., 0], photometric="minisblack",
        planarconfig=planar if bands > 1 else None, compression="lzw", tile=(16, 16),
    )  # fmt: skip
    image = decode_image(stream.getvalue(), bands, Intensity(window=(0, 100)))
    deep = kind != "u1"
    assert image.dtype == (torch.float32 if deep else torch.uint8)
    wanted = np.moveaxis(values, 2, 0) / (np.float32(100) if deep else 1)
    np.testing.assert_allclose(image.numpy(), wanted, atol=1e-6)
    if bands == 5:
        with pytest.raises(ValueError, match=r"it has 5 channels, data\.in_chans is 3"):
            decode_image(stream.getvalue(), 3, Intensity())


def test_colour_tiff_keeps_its_depth() -> None:
    values = np.random.default_rng(0).integers(0, 4000, (20, 30, 3), dtype=np.uint16)
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, photometric="rgb")
    image = decode_image(stream.getvalue(), 3, Intensity(window=(0, 4000)))
    np.testing.assert_allclose(image.permute(1, 2, 0), values / 4000, atol=1e-6)


@pytest.mark.parametrize("bands", [1, 3])
def test_what_was_not_measured_does_not_count(bands: int) -> None:
    values = np.random.default_rng(0).random((20, 30, bands)).astype(np.float32) + 5
    values[:10] = -9999
    stream = io.BytesIO()
    tifffile.imwrite(
        stream, values if bands > 1 else values[..., 0], photometric="minisblack",
        planarconfig="contig" if bands > 1 else None,
        extratags=[(42113, "s", 0, "-9999", True)],
    )  # fmt: skip
    image = decode_image(stream.getvalue(), bands, Intensity())
    assert (image[:, :10] == 0).all()
    assert image[:, 10:].mean() == pytest.approx(0.5, abs=0.05)


def test_without_tifffile(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    tifffile.imwrite(
        stream, np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig"
    )
    monkeypatch.setattr("simmim.data.tiff.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs tifffile: pip install 'simmim\[tiff\]'"):
        decode_image(stream.getvalue(), 5, Intensity())


def test_a_tiff_of_enormous_size() -> None:
    stream = io.BytesIO()
    tifffile.imwrite(
        stream, np.zeros((8, 8, 5), np.uint16), photometric="minisblack", planarconfig="contig"
    )
    data = stream.getvalue()
    for tag in (256, 257):  # width and length, numbers of 4 bytes
        size = struct.pack("<HHI", tag, 4, 1)
        data = data.replace(size + struct.pack("<I", 8), size + struct.pack("<I", 60_000))
    with pytest.raises(ValueError, match="claims 60000 x 60000 pixels"):
        decode_image(data, 5, Intensity())


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


def test_numpy_arrays() -> None:
    bands = np.random.default_rng(0).random((5, 8, 9))
    image = decode_image(npy(bands), 5, Intensity(window=(0, 1)))
    np.testing.assert_allclose(image.numpy(), bands, atol=1e-6)
    last = decode_image(npy(np.moveaxis(bands, 0, 2)), 5, Intensity(window=(0, 1)))
    assert torch.equal(image, last)
    gray = decode_image(npy(np.eye(7, dtype=np.uint8) * 9), 3, Intensity())
    assert (gray.dtype, gray.shape, int(gray.max())) == (torch.uint8, (3, 7, 7), 9)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(np.array([{"code": "run me"}])), "no image"),
        (npy(np.zeros(5)), "no image"),
        (npy(np.zeros((4, 4)))[:-8], "too short"),
        (npy(np.zeros((9, 9))).replace(b"(9, 9)", b"(9999999, 9)"), "too short|Header"),
    ],
)
def test_numpy_arrays_that_are_no_images(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_image(data, 1, Intensity())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = SHARED / "corrupt" / "build_corrupt.py"
    if not script.exists():
        pytest.skip("no ../shared/data")
    folder = tmp_path_factory.mktemp("zoo") / "zoo"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


def test_the_zoo(zoo: Path) -> None:
    for file in [*zoo.glob("good/*"), *zoo.glob("odd/*"), *zoo.glob("names/*")]:
        image = read_image(str(file), 3, Intensity())
        unit = image.float() / (255 if image.dtype == torch.uint8 else 1)
        assert image.shape[0] == 3, file
        if min(image.shape[1:]) > 1:
            assert 0.2 < unit.mean() < 0.8, file  # neither black nor white
            assert unit.std() > 0.02, file
    harmless = {"directory.jpg", "unreadable.jpg"}  # mode 000: root may read it
    for file in zoo.glob("bad/*"):
        if file.name not in harmless:
            with pytest.raises(UnreadableImage, match="cannot be read"):
                read_image(str(file), 3, Intensity())


def test_medical_scans_are_neither_black_nor_white() -> None:
    files = [f for f in (SHARED / "medical").rglob("*") if f.suffix in (".png", ".tif", ".jpg")]
    if not files:
        pytest.skip("no ../shared/data")
    for file in files[::3]:
        image = read_image(str(file), 1, Intensity())
        unit = image.float() / (255 if image.dtype == torch.uint8 else 1)
        assert 0.1 < unit.mean() < 0.7, file
        assert unit.std() > 0.1, file


def test_dicom() -> None:
    if not SHARED.exists():
        pytest.skip("no ../shared/data")
    folder = SHARED / "medical" / "dicom"
    images = {f.stem: read_image(str(f), 3, Intensity()) for f in folder.glob("[!M]*.dcm")}
    for name in (
        "MR_small",
        "MR_small_bigendian",
        "MR_small_implicit",
        "MR_small_RLE",
        "MR_small_jp2klossless",
        "MR_small_jpeg_ls_lossless",
    ):
        images[name] = read_image(str(folder / f"{name}.dcm"), 3, Intensity())
        assert torch.equal(images[name], images["MR_small"])
    assert images["examples_palette"].dtype == images["examples_rgb_color"].dtype == torch.uint8
    assert 0.1 < images["mr_t1_slice_256"].mean() < 0.6
    with pytest.raises(UnreadableImage, match="MR_truncated"):
        read_image(str(folder / "MR_truncated.dcm"), 3, Intensity())
