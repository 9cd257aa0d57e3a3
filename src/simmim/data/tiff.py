"""TIFF files that are more than a picture: many bands, deep colour, rare number types.

Pillow reads pictures and gray scans; of the rest it would read one band, or eight bits, in silence.
Channels may also be stored as pages, which ImageJ, OME-TIFF and tifffile say in the file's axes.
"""

import math
from contextlib import suppress
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from simmim.data.scans import check_size, check_values

Pixels = npt.NDArray[np.generic]

BEGINNINGS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian, classic and big
BITS, COLOURS, SAMPLES, ORIENTATION, EXTRA, KIND = 258, 262, 277, 274, 338, 339  # tags
DESCRIPTION = 270  # tag
NO_DATA = 42113  # GDAL's tag: the number that stands where nothing was measured
CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # of gray, RGB, palette, CMYK, YCbCr, Lab


def is_tiff(data: bytes) -> bool:
    """Whether a file begins like a TIFF."""
    return data[:4] in BEGINNINGS


def is_picture(image: Image.Image) -> bool:
    """Whether Pillow reads all of a TIFF: 8-bit colour, with or without alpha, or one gray band."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    colours, samples = tags.get(COLOURS, 1), tags.get(SAMPLES, 1)
    bits, kind = max(tags.get(BITS, (1,))), tags.get(KIND, (1,))[0]
    if samples == 1 and bits > 8:
        return image.mode.startswith(("I", "F")) and not (kind == 1 and bits == 32)
    alpha = tags.get(EXTRA, ()) in ((1,), (2,))
    return kind == 1 and bits <= 8 and samples == CHANNELS.get(colours, 0) + alpha


def count_pages(data: bytes, image: Image.Image) -> tuple[int, int]:
    """Count the pages that hold the channels of the first image, and all pages.

    Args:
        data: The file.
        image: The same as Pillow opened it.
    """
    try:
        image.seek(1)
    except EOFError:  # ImageJ writes one page for a stack of more than 4 GB
        if not str(image.tag_v2.get(DESCRIPTION, "")).startswith("ImageJ="):  # type: ignore[attr-defined]
            return 1, 1
    except Exception:  # a page that Pillow does not know
        pass
    if not _can_decode():
        return 1, getattr(image, "n_frames", 1)
    from tifffile import TiffFile

    try:
        with TiffFile(BytesIO(data)) as file:
            pages = sum(not (page.is_reduced or page.is_mask) for page in file.pages)
            outer = file.series[0].shape[: file.series[0].ndim - file.pages[0].ndim]
            return len(_channels(file)), max(pages, math.prod(outer))
    except Exception:  # what lies behind a readable first page is damaged
        return 1, 1


def _can_decode() -> bool:
    return all(find_spec(name) is not None for name in ("tifffile", "imagecodecs"))


def _channels(file: Any) -> list[int]:
    """Find the pages of the first image's channels, by the axes that the file names."""
    series = file.series[0]
    outer = series.shape[: series.ndim - file.pages[0].ndim]
    if "C" not in series.axes[: len(outer)]:
        return [0]
    places = np.arange(math.prod(outer)).reshape(outer)
    chosen = places[tuple(slice(None) if axis == "C" else 0 for axis in series.axes[: len(outer)])]
    return [int(place) for place in chosen]


def decode_tiff(data: bytes) -> tuple[Pixels, int]:
    """Decode the first image of a TIFF, planar or interleaved, in strips or tiles, in full depth.

    It is the first page, or the pages of its channels where the file's axes name these.

    Returns:
        Its numbers, (H, W, C), and EXIF's orientation.

    Raises:
        Exception: Of many kinds, where the file is damaged or tifffile is not installed.
    """
    if not _can_decode():
        raise ValueError("such a TIFF needs tifffile: pip install 'simmim[tiff]'")
    from tifffile import TiffFile

    with TiffFile(BytesIO(data)) as file:
        page: Any = file.pages[0]
        check_size(page.imagewidth, page.imagelength)
        places = _channels(file) if len(file.pages) > 1 or file.is_imagej else [0]
        check_values(math.prod(page.shape) * len(places))
        if places == [0]:
            pages = [page.asarray()]
        elif file.series[0].is_truncated:
            check_values(math.prod(file.series[0].shape))
            pages = list(file.series[0].asarray().reshape(-1, *page.shape)[places])
        else:
            pages = [file.series[0][place].asarray() for place in places]
        axes, orientation = page.axes, page.tags.get(ORIENTATION)
        marker = page.tags.valueof(NO_DATA)
    if axes not in ("YX", "SYX", "YXS"):
        raise ValueError(f"a TIFF with the axes {axes} is no image")
    if axes == "SYX":
        pages = [np.moveaxis(values, 0, 2) for values in pages]  # planar: CHW -> HWC
    values: Pixels = np.dstack(pages) if len(pages) > 1 else np.atleast_3d(pages[0])
    values = without_no_data(values, marker)
    if values.dtype.kind not in "buif":
        raise ValueError(f"a TIFF of {values.dtype} is no image")
    if not values.size:
        raise ValueError("its header claims an image without pixels")
    return values, int(orientation.value) if orientation else 1


def without_no_data(values: Pixels, marker: Any) -> Pixels:
    """Put NaN where nothing was measured, which would else widen the range of a scan.

    Args:
        values: Of a scan.
        marker: What GDAL's tag says; None where there is no such tag.
    """
    with suppress(TypeError, ValueError):  # no tag, or one that is no number
        absent = values == float(marker)
        if values.dtype != np.uint8 and absent.any():
            return np.where(absent, np.float32(np.nan), values.astype(np.float32))
    return values
