"""Scans that are deeper than 8 bits: their units -> 0..1, and the formats that only they have."""

import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from mmap import mmap
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

Pixels = npt.NDArray[np.generic]

MAX_PIXELS = 2**30 // 12  # 89 megapixels, 256 MB of RGB: where Pillow begins to warn of bombs
MAX_VALUES = 3 * MAX_PIXELS  # of a scan with many channels; a GB as float32
DEFLATED = b"1.2.840.10008.1.2.1.99"  # DICOM's name of a file that is packed as a whole
SAMPLE = 2**18  # numbers, evenly spread, that percentiles are read from

_reported = mmap(-1, 1)  # whether pages that are left out were reported; forked workers share it


@dataclass(frozen=True)
class Intensity:
    """How the values of a scan become 0..1: linear between two values, cut off beyond them.

    The depth of a file says nothing: a 16-bit MRI may end at 278, and divided by 65535 it is black.
    So by default the two values are percentiles of the image itself. NaN becomes 0.

    Attributes:
        percentiles: The lower and the upper one.
        window: The two values themselves, in the scan's units (for CT in Hounsfield units), instead
            of percentiles: then equal values stay equal between images.
    """

    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None

    def __call__(self, values: Pixels, inverted: bool = False) -> npt.NDArray[np.float32]:
        """Map values, of any number type, to float32 in 0..1.

        Args:
            values: Of one image, all its channels on one scale.
            inverted: Whether the lowest value is white.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # a window without width is a step
            unit = values.astype(np.float32)
            low, high = self.window or self._range(unit)
            unit -= low  # in place: an enormous scan is in memory once
            unit /= max(float(high - low), 1e-30)
        np.clip(unit, 0, 1, out=unit)
        if inverted:
            np.subtract(1, unit, out=unit)
        return np.nan_to_num(unit, copy=False)

    def _range(self, values: npt.NDArray[np.float32]) -> tuple[float, float]:
        sample = finite_sample(values)
        low, high = np.percentile(sample, self.percentiles) if sample.size else (0.0, 0.0)
        if low == high:  # a few bright spots on a black ground, which the sample may have missed
            finite = values[np.isfinite(values)]
            low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        return float(low), float(high)


def finite_sample(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Take about `SAMPLE` evenly spread values of an array, and drop those that are not finite.

    The step has no divisor in common with the size: otherwise it would meet one channel alone, or
    a few columns.
    """
    flat = values.ravel()
    step = math.ceil(flat.size / SAMPLE) or 1
    while math.gcd(step, flat.size) > 1:
        step += 1
    sample = flat[::step]
    return sample[np.isfinite(sample)]


def report_pages(channels: int, pages: int) -> None:
    """Say, once for all processes that read, that pages of a file are left out.

    Args:
        channels: How many pages are read: the channels of the first image.
        pages: How many there are.
    """
    if pages <= channels or _reported[0]:
        return
    _reported[0] = 1
    read = "the first" if channels == 1 else f"one image ({channels} channels)"
    rank_zero_info(f"an image file has several pages: only {read} of {pages} pages is read")


def check_size(width: int, height: int) -> None:
    """Refuse a size that no photograph has, before memory is taken for it.

    Raises:
        ValueError: If the header claims more than `MAX_PIXELS`, or nothing.
    """
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"its header claims {width} x {height} pixels, at most {MAX_PIXELS:,} go: if it is as "
            "large as that, reduce it or cut it up"
        )


def check_values(count: int) -> None:
    """Refuse a scan of so many channels that it would fill the memory.

    Raises:
        ValueError: If it has more than `MAX_VALUES` numbers.
    """
    if count > MAX_VALUES:
        raise ValueError(f"its header claims {count:,} values, at most {MAX_VALUES:,} go")


def is_deep_png(data: bytes) -> bool:
    """Whether a file is a PNG of 16 bits with colour or alpha, which Pillow cuts to 8."""
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10" and data[25] in (2, 4, 6)


def decode_deep_png(data: bytes) -> npt.NDArray[np.uint16]:
    """Decode colour, or gray and alpha, of 16 bits; Pillow gives the bytes of a number apart.

    Returns:
        (H, W, C), with C 2 (gray, alpha), 3 (RGB) or 4 (RGBA).

    Raises:
        Exception: Of many kinds, where the file is damaged.
    """
    if data[25] == 4:  # four bytes a pixel: high and low of gray, high and low of alpha
        halves = _png_bytes(data, "RGBA")
        high, low = halves[..., ::2], halves[..., 1::2]
    else:
        high, low = (_png_bytes(data, ("RGB;16" if data[25] == 2 else "RGBA;16") + x) for x in "BL")
    return (high.astype(np.uint16) << 8 | low).astype(np.uint16, copy=False)


def _png_bytes(data: bytes, rawmode: str) -> npt.NDArray[np.uint8]:
    """Decode a PNG with the bytes of a pixel read in this manner of Pillow's."""
    with Image.open(BytesIO(data), formats=("PNG",)) as image:
        check_size(*image.size)
        image.tile = [tile._replace(args=rawmode) for tile in image.tile]
        return np.array(image)


def flatten_deep(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Put colour, (H, W, C with the last alpha), on a ground as bright as its brightest value."""
    colours, alpha = values[..., :-1].astype(np.float32), values[..., -1:] / np.float32(65535)
    return (colours * alpha + colours.max() * (1 - alpha)).round().astype(np.uint16)


def decode_npy(data: bytes | memoryview, in_chans: int, intensity: Intensity) -> Pixels:
    """Decode a NumPy array of shape (H, W), (H, W, C) or (C, H, W); pickled objects are refused.

    Three axes are (H, W, C), unless the first alone is as long as there are channels wanted. uint8
    is kept as it is, a view of the data if that is a memoryview; anything else is a scan, all its
    channels on one scale.

    Raises:
        ValueError: If it is something else, or holds less than its header claims.
    """
    start = _npy_start(data)
    shape, by_column, dtype = _npy_header(bytes(data[:start]))
    if dtype.kind not in "buif" or len(shape) not in (2, 3):
        raise ValueError(f"an array of {dtype} and shape {shape} is no image")
    if math.prod(shape) * dtype.itemsize > len(data) - start:
        raise ValueError(f"its header claims the shape {shape}, for which it is too short")
    values: Pixels = np.frombuffer(data, dtype, math.prod(shape), start)
    values = values.reshape(shape, order="F" if by_column else "C")
    if values.ndim == 2:
        values = values[..., None]
    elif values.shape[0] == in_chans != values.shape[2]:
        values = np.moveaxis(values, 0, 2)  # CHW -> HWC
    check_size(values.shape[1], values.shape[0])
    check_values(values.size)
    if values.dtype != np.uint8:
        return intensity(values)
    return values if isinstance(data, memoryview) else values.copy()  # bytes cannot be written to


def _npy_start(data: bytes | memoryview) -> int:
    """Find where the header of a NumPy array ends; version 1 writes its length in two bytes."""
    end = 10 if data[6:7] == b"\1" else 12
    return end + int.from_bytes(data[8:end], "little")


@lru_cache(maxsize=4096)  # packed images of one size have one header, whose parsing takes longest
def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, whether it is stored by columns, and type."""
    stream = BytesIO(head)
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def check_pydicom() -> None:
    """Refuse a folder of DICOM files where nothing can read them.

    Raises:
        ValueError: If pydicom is not installed.
    """
    if find_spec("pydicom") is None:
        raise ValueError("DICOM files (.dcm) need pydicom: pip install 'simmim[dicom]'")


def decode_dicom(data: bytes, intensity: Intensity) -> Pixels:
    """Decode the first frame of a DICOM file, with its rescale slope, palette and inversion.

    Its own window centre and width, which are for one look at one image, are not used.

    Returns:
        float32 in 0..1 for a scan, (H, W, 1); uint8 for colour, (H, W, 3).

    Raises:
        Exception: Of many kinds, where the file is damaged or its compression not known.
    """
    from pydicom import dcmread
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    _check_deflated(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values against the standard: they are many
        scan: Any = dcmread(BytesIO(data), force=True)
        if "PixelData" not in scan or "Rows" not in scan or "Columns" not in scan:
            raise ValueError("it is a DICOM file without pixels, or no DICOM file")
        check_size(int(scan.Columns), int(scan.Rows))
        _check_frame(scan)
        report_pages(1, int(scan.get("NumberOfFrames") or 1))
        values = pixel_array(scan, index=0)
        colors = scan.PhotometricInterpretation
        if colors == "PALETTE COLOR":
            values = apply_color_lut(values, scan)
        if values.ndim == 3:
            return values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)
        padded = values == scan.get("PixelPaddingValue")  # outside of a CT's round field
        values = apply_modality_lut(values, scan)
        values = np.where(padded, np.nan, values) if np.any(padded) else values
        # Mammograms and X-rays may say both, which means one inversion.
        shape = str(scan.get("PresentationLUTShape") or "")
        return intensity(values, colors == "MONOCHROME1" or shape == "INVERSE")[..., None]


def _check_deflated(data: bytes) -> None:
    """Refuse a deflated file that would fill the memory: pydicom unpacks it whole."""
    length = int.from_bytes(data[140:144], "little")  # of the group that names the compression
    if DEFLATED not in data[144 : 144 + length]:
        return
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    inflate.decompress(data[144 + length :], MAX_VALUES)
    if inflate.unconsumed_tail:
        raise ValueError(f"it unpacks to more than {MAX_VALUES:,} bytes")


def _check_frame(scan: Any) -> None:
    """Refuse a compressed frame that claims another size than its file: decoders believe it."""
    syntax = getattr(getattr(scan, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None or not syntax.is_encapsulated:
        return
    from pydicom.encaps import get_frame

    frame = get_frame(scan.PixelData, 0, number_of_frames=int(scan.get("NumberOfFrames") or 1))
    size, said = _frame_size(frame), (int(scan.Columns), int(scan.Rows))
    if size is not None and size != said:
        raise ValueError(
            f"its frame claims {size[0]} x {size[1]} pixels, not {said[0]} x {said[1]}"
        )


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG 2000, JPEG or JPEG-LS; None for what is none of them."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # JPEG 2000: right, lower, left, upper edge
    if start >= 0:
        right, lower, left, upper = struct.unpack_from(">4I", frame, start + 8)
        return right - left, lower - upper
    at = 2
    while frame[:2] == b"\xff\xd8" and frame[at : at + 1] == b"\xff" and at + 9 <= len(frame):
        marker = frame[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack_from(">2H", frame, at + 5)
            return width, height
        at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
