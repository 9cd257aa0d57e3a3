"""TIFF files that are more than a picture: many bands, deep colour, rare number types.

Pillow reads pictures and gray scans; of the rest it would read one band, or eight bits, in silence.
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


def decode_tiff(data: bytes) -> tuple[Pixels, int]:
    """Decode the first page of a TIFF, planar or interleaved, in strips or tiles, in full depth.

    Returns:
        Its numbers, (H, W, C), and EXIF's orientation.

    Raises:
        Exception: Of many kinds, where the file is damaged or tifffile is not installed.
    """
    if find_spec("tifffile") is None or find_spec("imagecodecs") is None:
        raise ValueError("such a TIFF needs tifffile: pip install 'simmim[tiff]'")
    from tifffile import TiffFile

    with TiffFile(BytesIO(data)) as file:
        page: Any = file.pages[0]
        check_size(page.imagewidth, page.imagelength)
        check_values(math.prod(page.shape))
        values: Pixels = page.asarray()
        axes, orientation = page.axes, page.tags.get(ORIENTATION)
        values = without_no_data(values, page.tags.valueof(NO_DATA))
    if axes == "YX":
        values = values[..., None]
    elif axes == "SYX":
        values = np.moveaxis(values, 0, 2)  # planar: CHW -> HWC
    elif axes != "YXS":
        raise ValueError(f"a TIFF with the axes {axes} is no image")
    if values.dtype.kind not in "buif":
        raise ValueError(f"a TIFF of {values.dtype} is no image")
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
