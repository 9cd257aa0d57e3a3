"""The bytes of an image file -> pixels, as a person expects to see them.

JPEG goes through libjpeg-turbo, in the strict mode that refuses what is damaged (others return
garbage), everything else through Pillow. No size that a header claims is believed before it was
compared with `MAX_PIXELS`.
"""

import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from io import BytesIO

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from simmim.data.index import read_file
from simmim.data.scans import (
    MAX_PIXELS,
    Intensity,
    check_size,
    decode_deep_png,
    decode_dicom,
    decode_npy,
    flatten_deep,
    is_deep_png,
    report_pages,
)
from simmim.data.tiff import NO_DATA, count_pages, decode_tiff, is_picture, is_tiff, without_no_data

Pixels = npt.NDArray[np.generic]

ORIENTATION = 0x0112  # EXIF's tag: how the camera was held
# Raster images alone: Pillow would start Ghostscript for an EPS that is called .png.
FORMATS = ("JPEG", "MPO", "PNG", "TIFF", "WEBP", "GIF", "BMP", "DIB", "PPM", "AVIF", "JPEG2000")
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)  # a JPEG's frames; below: what looks like one, and is none
NO_FRAME = (0xC4, 0xC8, 0xCC)
PIXELS_PER_BYTE = 512  # of a JPEG at most: a bit for each 8 x 8 block of a gray one
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R 601, as in JPEG and Pillow


class UnreadableImage(ValueError):
    """A file that is no image, or a damaged one; the message says which and why."""

    def __init__(self, message: str) -> None:
        # A worker's error comes with its traceback before it: the sentence is all that is wanted.
        super().__init__(message.strip().rpartition("UnreadableImage: ")[2])


def read_image(path: str, in_chans: int, intensity: Intensity) -> Tensor:
    """Read an image file.

    Args:
        path: The file.
        in_chans: Channels that are wanted.
        intensity: How a scan of more than 8 bits becomes 0..1.

    Returns:
        uint8, or float32 in 0..1 from a deeper scan, (in_chans, H, W).

    Raises:
        UnreadableImage: With the file's name and the reason.
    """
    data = b""
    try:
        data = read_file(path)
        return decode_image(data, in_chans, intensity, path)
    except Exception as error:  # decoders raise whatever they like
        raise unreadable(path, error, data) from error


def unreadable(path: str, error: Exception, data: bytes | memoryview) -> UnreadableImage:
    """Name a file that cannot be read, and the reason."""
    return UnreadableImage(f"{path!r} cannot be read: {reason_of(error, data)}")


def reason_of(error: Exception, data: bytes | memoryview) -> str:
    """Say in one line why the bytes of a file could not be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return _what_else(bytes(data))
    if isinstance(error, Image.DecompressionBombError):
        return f"its header claims far more than {MAX_PIXELS:,} pixels"
    return str(error).partition("\n")[0] or type(error).__name__


def decode_image(
    data: bytes | memoryview,
    in_chans: int,
    intensity: Intensity,
    name: str = "",
    whole: bool = False,
    oriented: bool = True,
) -> Tensor:
    """Decode the bytes of an image file; what they are is told by themselves, not by the name.

    Rotated as EXIF says; of an animation or a stack of pages the first; transparent parts on white.

    Args:
        data: The whole file.
        in_chans: Channels that are wanted: gray becomes three equal channels, colour its luminance,
            and four keep the transparency. Other numbers must be the file's own.
        intensity: How a scan of more than 8 bits becomes 0..1.
        name: Of the file; only a DICOM file without its preamble is told by it.
        whole: Whether the pixels must be the file's own. Otherwise a JPEG of more than `MAX_PIXELS`
            is decoded at a half, a quarter or an eighth of its sides, which takes no memory for
            the rest; other files of such a size are refused.
        oriented: Whether EXIF's orientation is applied. Otherwise the pixels are as they are
            stored, which is how some tools that annotate images count them.

    Returns:
        uint8, or float32 in 0..1 from a deeper scan, (in_chans, H, W).

    Raises:
        Exception: Of many kinds, where the file is no image, or a damaged one.
    """
    pixels = decode_pixels(data, in_chans, intensity, name, whole)
    if not oriented and (orientation := _orientation(bytes(data))) != 1:
        pixels = _rotate(pixels, {6: 8, 8: 6}.get(orientation, orientation))  # back
    pixels = np.ascontiguousarray(_to_channels(pixels, in_chans))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # HWC -> CHW


def decode_pixels(
    data: bytes | memoryview,
    in_chans: int,
    intensity: Intensity,
    name: str = "",
    whole: bool = False,
) -> Pixels:
    """Decode an image file as `decode_image` does, but leave it the channels that it has.

    Returns:
        uint8, or what `intensity` makes of a deeper scan, (H, W, C). Where the data is a memoryview
        of an uncompressed array, so are they: nothing is copied.
    """
    if data[:6] == b"\x93NUMPY":
        return decode_npy(data, in_chans, intensity)
    data, pixels = bytes(data), None
    if data[:3] == b"\xff\xd8\xff":
        pixels = _decode_jpeg(data, in_chans, whole)
    elif is_dicom(data, name):
        pixels = decode_dicom(data, intensity)
    elif is_deep_png(data):
        pixels = _decode_deep_png(data, in_chans, intensity)
    elif is_tiff(data):
        pixels = _decode_tiff(data, intensity)
    return _decode_by_pillow(data, in_chans, intensity) if pixels is None else pixels


def is_dicom(data: bytes, name: str) -> bool:
    """Whether a file is DICOM; without its preamble, it is told by its name."""
    return data[128:132] == b"DICM" or (bool(data) and name.lower().endswith(".dcm"))


def _what_else(data: bytes) -> str:
    if not data.strip(b"\0"):
        return "the file is empty" if not data else "the file holds nothing but zeros"
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the image: run git lfs pull"
    return "it is no image, or its beginning is damaged"


def _decode_jpeg(data: bytes, in_chans: int, whole: bool) -> Pixels | None:
    """Decode by libjpeg-turbo; None for what it does not know (CMYK, rare subsamplings)."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    eighths = _eighths(width * height)
    if eighths == 8 or whole or not _is_one_scan(data):
        check_size(width, height)
    if width * height > PIXELS_PER_BYTE * len(data):
        raise ValueError(f"its header claims {width} x {height} pixels, for which it is too short")
    if colors in ("CMYK", "YCCK"):  # Pillow knows Adobe's inks, but passes over damage
        check_size(width, height)
        simplejpeg.decode_jpeg(data, "CMYK", strict=True)
    if colors not in ("YCbCr", "RGB", "Gray"):
        return None
    gray = colors == "Gray" or in_chans == 1
    sides = [] if eighths == 8 else [-(-side * eighths // 8) for side in (height, width)]
    pixels: Pixels = simplejpeg.decode_jpeg(
        data, "GRAY" if gray else "RGB", False, False, *sides, strict=True
    )
    return _rotate(pixels, _orientation(data)) if _has_exif(data) else pixels


def _eighths(pixels: int) -> int:
    """How many eighths of its sides a picture may keep, so as not to exceed `MAX_PIXELS`."""
    return next((n for n in (8, 4, 2) if pixels * n * n <= 64 * MAX_PIXELS), 1)


def _is_one_scan(data: bytes) -> bool:
    """Whether a JPEG comes row by row; others are in memory as a whole, whatever is made of it."""
    components = 0
    for marker, start in _segments(data):
        if marker in PROGRESSIVE:
            return False
        if 0xC0 <= marker <= 0xCF and marker not in NO_FRAME:
            components = int.from_bytes(data[start + 5 : start + 6])
        if marker == 0xDA:
            return data[start] == components
    return False


def _has_exif(data: bytes) -> bool:
    return any(m == 0xE1 and data[at : at + 6] == b"Exif\0\0" for m, at in _segments(data))


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Walk the segments before a JPEG's picture: the marker, and where its content begins.

    Marker and length have two bytes each.
    """
    at = 2
    while at + 4 < len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # filling
            at += 1
            continue
        yield data[at + 1], at + 4
        if data[at + 1] == 0xDA:
            return
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _orientation(data: bytes) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(BytesIO(data), formats=_formats()) as image:
                return int(image.getexif().get(ORIENTATION, 1))
        except Exception:  # nonsense in the EXIF block is no reason to refuse the pixels
            return 1


def _rotate(pixels: Pixels, orientation: int) -> Pixels:
    """Turn the picture as it was seen: EXIF's eight cases."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _decode_deep_png(data: bytes, in_chans: int, intensity: Intensity) -> Pixels:
    values = _rotate(decode_deep_png(data), _orientation(data)).astype(np.uint16, copy=False)
    if values.shape[2] == 3:
        return intensity(values)
    if values.shape[2] == in_chans == 4:
        colours, alpha = intensity(values[..., :3]), values[..., 3:] / np.float32(65535)
        return np.concatenate([colours, alpha], axis=2)
    return intensity(flatten_deep(values))


def _decode_tiff(data: bytes, intensity: Intensity) -> Pixels | None:
    """Decode what Pillow would read in part; None for what it reads whole."""
    with warnings.catch_warnings(), suppress(UnidentifiedImageError):
        warnings.simplefilter("ignore")
        with Image.open(BytesIO(data), formats=("TIFF",)) as image:
            check_size(*image.size)
            picture = is_picture(image)
            channels, pages = count_pages(data, image)
            report_pages(channels, pages)
            if picture and channels == 1:
                return None
    values, orientation = decode_tiff(data)
    values = _rotate(values, orientation)
    return values if values.dtype == np.uint8 else intensity(values)


def _decode_by_pillow(data: bytes, in_chans: int, intensity: Intensity) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes, which we check, and of EXIF blocks
        with Image.open(BytesIO(data), formats=_formats()) as image:
            check_size(*image.size)
            if image.format not in (
                "JPEG",
                "MPO",
                "TIFF",
            ):  # a camera's JPEG has a preview behind it
                report_pages(1, getattr(image, "n_frames", 1))
            image.load()
            with suppress(Exception):  # nonsense in the EXIF block
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith(("I", "F")):
                marker = getattr(image, "tag_v2", {}).get(NO_DATA)
                return intensity(without_no_data(np.asarray(image), marker))[..., None]
            return np.atleast_3d(np.array(_flatten(image, keep_alpha=in_chans == 4)))


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _flatten(image: Image.Image, keep_alpha: bool) -> Image.Image:
    """Bring 8-bit modes to gray or RGB, on white where they are transparent."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if keep_alpha:
            return rgba
        white = Image.new("RGBA", rgba.size, "white")
        flat = Image.alpha_composite(white, rgba)
        return flat.convert("L" if image.mode == "LA" else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _to_channels(pixels: Pixels, in_chans: int) -> Pixels:
    """Turn gray into colour or colour into gray, (H, W, C)."""
    chans = pixels.shape[2]
    if chans == in_chans:
        return pixels
    if chans == 1 and in_chans == 3:
        return np.repeat(pixels, 3, axis=2)
    if chans == 3 and in_chans == 1:
        gray = pixels @ np.array(LUMINANCE, dtype=np.float32)
        gray = gray.round() if pixels.dtype == np.uint8 else gray
        return gray.astype(pixels.dtype)[..., None]
    raise ValueError(
        f"it has {chans} channels, data.in_chans is {in_chans} (of a model: --model.in_chans)"
    )
