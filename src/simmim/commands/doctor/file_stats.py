"""One image file -> what is worth knowing of it, as training would read it."""

import math
import os
import struct
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from simmim.data.decode import FORMATS, ORIENTATION, decode_image, is_dicom, reason_of
from simmim.data.draws import uniforms
from simmim.data.index import FileIndex
from simmim.data.scans import Intensity, finite_sample
from simmim.data.tiff import count_pages
from simmim.data.transforms import RandomCrop

PERCENTILES = (0, 0.5, 50, 99.5, 100)  # that are noted of a scan's own numbers
SMALL = 16  # px: side of the gray miniature that near duplicates are told by
MIDDLE = 144  # px: a multiple of 16, 8 and 9; what is larger is reduced to it first
CHUNK = 2**16  # pixels that are counted at a time
HASH = 8  # rows and columns of the difference hash, in either direction
Counts = Mapping[str, Counter[int]]  # how many images of a part have a label; -1: none
BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}  # of Pillow's modes; else 8


@dataclass(frozen=True)
class File:
    """Where an image is.

    Attributes:
        part: train, val or test.
        place: In that part's index.
        name: Path below the root.
        label: Its class; -1: none.
    """

    part: str
    place: int
    name: str
    label: int = -1


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        format: JPEG, PNG, TIFF, DICOM, NPY, ...
        mode: RGB, L (gray), CMYK, P (palette), RGBA, I;16, F, ...; of NumPy arrays the type.
        bits: Of a channel.
        turned: Whether EXIF says that it is to be turned.
        transparent: Whether parts of it may be transparent.
        frames: Whether it holds more pictures than the first.
    """

    format: str = "unknown"
    mode: str = ""
    bits: int = 8
    turned: bool = False
    transparent: bool = False
    frames: bool = False


@dataclass(frozen=True)
class Content:
    """What a decoded image holds.

    Attributes:
        height: In pixels.
        width: In pixels.
        deep: Whether it is a scan that keeps more than 8 bits.
        gray: Whether its channels are equal.
        mean: Of each channel, in 0..1.
        square: Mean of the squares of each channel.
        spread: Standard deviation of all pixels, in 0..1.
        range: Percentiles of a scan's own numbers (0, 0.5, 50, 99.5, 100); empty where not deep.
        miniature: Gray, 16 x 16, a byte each.
        likeness: Its difference hash, 128 bits.
    """

    height: int
    width: int
    deep: bool
    gray: bool
    mean: tuple[float, ...]
    square: tuple[float, ...]
    spread: float
    range: tuple[float, ...]
    miniature: bytes
    likeness: bytes


@dataclass(frozen=True)
class Record:
    """What there is to say of one file.

    Attributes:
        size: In bytes.
        digest: Hash of the bytes; equal for equal files.
        header: What the file says of itself.
        content: What was decoded; None where it could not be.
        error: Why it cannot be read; empty where it can.
        seconds: For reading, decoding and cropping it as training does.
    """

    size: int = 0
    digest: bytes = b""
    header: Header = Header()
    content: Content | None = None
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Inspector:
    """Looks at files; it is sent to the workers.

    Attributes:
        indices: The files, by part.
        in_chans: Channels that training wants.
        intensity: How a scan becomes 0..1.
        crop: What training cuts out.
    """

    indices: Mapping[str, FileIndex]
    in_chans: int
    intensity: Intensity
    crop: RandomCrop

    def __call__(self, file: File) -> Record:
        """Read a file; what is wrong with it is part of the answer."""
        index, data = self.indices[file.part], b""
        size, header = 0, Header()
        name = file.name if ".dcm" in index.suffixes else ""
        try:
            began = time.perf_counter()
            data = bytes(index.read(file.place))
            seconds = time.perf_counter() - began
            size, header = len(data), read_header(data, name)
            watched = _Watched(self.intensity.percentiles, self.intensity.window)
            began = time.perf_counter()
            image = decode_image(data, self.in_chans, watched, name)
            self.crop(image, uniforms(0, 0, file.place))
            seconds += time.perf_counter() - began
            content = look(image, tuple(watched.seen))
        except Exception as error:  # decoders raise whatever they like
            size = size or index.size(file.place)
            return Record(size, _digest(data), header, error=reason_of(error, data))
        return Record(size, _digest(data), header, content, seconds=seconds)

    def tile(self, file: File, side: int) -> npt.NDArray[np.uint8]:
        """Read a file and reduce it to a picture of at most `side` px, (H, W, 1 or 3)."""
        index = self.indices[file.part]
        image = decode_image(index.read(file.place), self.in_chans, self.intensity, file.name)
        chans = 3 if len(image) >= 3 else 1
        scale = min(side / max(image.shape[1:]), 1)
        size = [max(round(n * scale), 1) for n in image.shape[1:]]
        pixels = _unit(image[None, :chans])
        small = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0]
        small = small.clamp(0, 1).mul(255).round().byte()
        return np.ascontiguousarray(small.permute(1, 2, 0).numpy())  # CHW -> HWC


@dataclass(frozen=True)
class _Watched(Intensity):
    """Maps a scan as training does, and notes percentiles of its own numbers."""

    seen: list[float] = field(default_factory=list)

    def __call__(self, values: npt.NDArray[Any], inverted: bool = False) -> npt.NDArray[np.float32]:
        sample = finite_sample(values).astype(np.float64)
        if sample.size:
            self.seen[:] = np.percentile(sample, PERCENTILES).tolist()
        return super().__call__(values, inverted)


def look(image: Tensor, range: tuple[float, ...] = ()) -> Content:
    """Measure an image, uint8 or float in 0..1, (C, H, W)."""
    values = image.permute(1, 2, 0).numpy()  # CHW -> HWC, as it lies in memory
    white = 255 if values.dtype == np.uint8 else 1
    mean, square = _moments(values.reshape(-1, len(image)))
    spread = math.sqrt(max(square.mean() - mean.mean() ** 2, 0))  # 0 where all values are equal
    gray = _small_gray(image)
    miniature = _reduce(gray, SMALL, SMALL)
    return Content(
        height=image.shape[1],
        width=image.shape[2],
        deep=image.is_floating_point(),
        gray=len(image) > 1 and all(_is_gray(some) for some in (values[::8, ::8], values)),
        mean=tuple((mean / white).tolist()),
        square=tuple((square / white**2).tolist()),
        spread=spread / white,
        range=range,
        miniature=miniature.tobytes(),
        likeness=difference_hash(gray),
    )


def _moments(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Mean of each column of (n, C), and of its squares: of whole numbers exactly."""
    total = np.zeros(values.shape[1])
    squares = np.zeros(values.shape[1])
    for first in range(0, len(values), CHUNK):
        some = values[first : first + CHUNK].astype(np.float64)
        total += np.ones(len(some)) @ some
        squares += (some.T @ some).diagonal()
    return total / len(values), squares / len(values)


def _is_gray(values: npt.NDArray[Any]) -> bool:
    return bool((values[..., 1:] == values[..., :1]).all())


def difference_hash(gray: Tensor) -> bytes:
    """Tell where an image, gray (H, W), becomes brighter to the right and downwards: 2 x 64 bits.

    The hash of N. Krawetz (hackerfactor.com, "Kind of Like That"), in both directions. It hardly
    changes with size, compression and brightness.
    """
    across = _reduce(gray, HASH, HASH + 1).astype(np.int16)
    down = _reduce(gray, HASH + 1, HASH).astype(np.int16)
    bits = np.concatenate([(np.diff(across) > 0).ravel(), (np.diff(down, axis=0) > 0).ravel()])
    return np.packbits(bits).tobytes()


def read_header(data: bytes, name: str) -> Header:
    """Read what a file says of itself, without decoding it; what is damaged says little."""
    try:
        if data[:6] == b"\x93NUMPY":
            return _npy_header(data)
        if is_dicom(data, name):
            return _dicom_header(data)
        return _picture_header(data)
    except Exception:  # the decoder says what is wrong
        return Header()


def _npy_header(data: bytes) -> Header:
    stream = BytesIO(data)
    first = np.lib.format.read_magic(stream) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    dtype = read(stream)[2]
    return Header("NPY", dtype.name, dtype.itemsize * 8)


def _dicom_header(data: bytes) -> Header:
    from pydicom import dcmread

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scan: Any = dcmread(BytesIO(data), force=True, stop_before_pixels=True)
        frames = int(getattr(scan, "NumberOfFrames", 1) or 1) > 1
        return Header(
            "DICOM", str(scan.PhotometricInterpretation), int(scan.BitsStored), frames=frames
        )


def _picture_header(data: bytes) -> Header:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(BytesIO(data), formats=_formats()) as image:
            try:
                turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
            except Exception:  # nonsense in the EXIF block
                turned = False
            return Header(
                "JPEG" if image.format == "MPO" else str(image.format),
                image.mode,
                _bits(data, image),
                turned,
                image.has_transparency_data,
                # A camera's JPEG may have a preview behind it, which is no second picture.
                image.format not in ("JPEG", "MPO") and _has_more(data, image),
            )


def _has_more(data: bytes, image: Image.Image) -> bool:
    """Whether pages are left out; those of a TIFF may be its channels."""
    if image.format == "TIFF":
        channels, pages = count_pages(data, image)
        return pages > channels
    return bool(getattr(image, "is_animated", False))


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _bits(data: bytes, image: Image.Image) -> int:
    """Bits of a channel in the file; Pillow's mode says 8 for a PNG of 3 x 16."""
    if image.format == "PNG" and data[12:16] == b"IHDR" and image.mode != "P":
        return int(struct.unpack(">B", data[24:25])[0])
    if image.format == "TIFF" and image.mode not in ("P", "1"):
        return int(np.max(image.tag_v2.get(258, 8)))  # type: ignore[attr-defined]
    return BITS.get(image.mode, 8)


def _unit(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _small_gray(image: Tensor) -> Tensor:
    """Turn an image, (C, H, W), gray, in 0..1 and small, in one pass over its pixels."""
    size = [min(side, MIDDLE) for side in image.shape[1:]]
    small = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return _unit(small).mean(0)


def _reduce(gray: Tensor, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Reduce (H, W) in 0..1 to (height, width), a byte each."""
    small = F.interpolate(gray[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    return small.mul(255).round().clamp(0, 255).byte().numpy()


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest() if data else b""


def below(root: str, index: FileIndex, place: int) -> str:
    """Path of a file below the root, with forward slashes."""
    folder = os.path.relpath(index.root, root).replace(os.sep, "/")
    return index.name(place) if folder == "." else f"{folder}/{index.name(place)}"
