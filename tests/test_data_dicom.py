"""DICOM files, made here: units, signs, frames, inversion, compression, damage."""

import io
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import torch
from pydicom import uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

from simmim.data import ImageFolderData, pack
from simmim.data.decode import UnreadableImage, decode_image, read_image
from simmim.data.scans import Intensity

ROW = np.arange(48 * 64).reshape(48, 64)


def dicom(values: np.ndarray, compress: str | None = None, **tags: Any) -> pydicom.Dataset:
    """A scan, (H, W) or (frames, H, W), or a colour one of uint8, (H, W, 3)."""
    scan, colour = pydicom.Dataset(), values.ndim == 3 and values.shape[2] == 3
    scan.file_meta = FileMetaDataset()
    scan.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    scan.file_meta.MediaStorageSOPClassUID = scan.SOPClassUID = uid.SecondaryCaptureImageStorage
    scan.file_meta.MediaStorageSOPInstanceUID = scan.SOPInstanceUID = uid.generate_uid()
    scan.Rows, scan.Columns = values.shape[:2] if colour else values.shape[-2:]
    scan.SamplesPerPixel = 3 if colour else 1
    scan.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        scan.PlanarConfiguration = 0
    elif values.ndim == 3:
        scan.NumberOfFrames = len(values)
    scan.BitsAllocated = scan.BitsStored = 8 * values.dtype.itemsize
    scan.HighBit = scan.BitsStored - 1
    scan.PixelRepresentation = int(values.dtype.kind == "i")
    scan.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(scan, name, value)
    if compress == "jpeg-ls":
        scan.PixelData = encapsulate([imagecodecs.jpegls_encode(values)])
        scan["PixelData"].is_undefined_length = True
        scan.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
    elif compress:
        scan.compress({"rle": uid.RLELossless, "jpeg2000": uid.JPEG2000Lossless}[compress])
    return scan


def written(scan: pydicom.Dataset) -> bytes:
    stream = io.BytesIO()
    scan.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def decoded(scan: pydicom.Dataset, in_chans: int = 1, **intensity: Any) -> torch.Tensor:
    return decode_image(written(scan), in_chans, Intensity(**intensity))


def test_rescaled_to_its_units() -> None:
    scan = dicom(ROW.astype(np.uint16), RescaleSlope="2.5", RescaleIntercept="-1000")
    image = decoded(scan, window=(-160, 240))[0].numpy()
    wanted = ((ROW * 2.5 - 1000 + 160) / 400).clip(0, 1)
    np.testing.assert_allclose(image, wanted, atol=1e-5)
    assert decoded(scan, in_chans=3).shape == (3, 48, 64)


def test_signed() -> None:
    image = decoded(dicom((ROW - 400).astype(np.int16)), percentiles=(0, 100))[0].numpy()
    np.testing.assert_allclose(image, ROW / ROW.max(), atol=1e-6)


def test_its_own_window_is_not_used() -> None:
    plain = dicom(ROW.astype(np.uint16))
    windowed = dicom(ROW.astype(np.uint16), WindowCenter="5", WindowWidth="2")
    assert torch.equal(decoded(windowed), decoded(plain))


@pytest.mark.parametrize(
    "tags",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ],
)
def test_white_for_the_lowest_value_is_turned_round_once(tags: dict[str, str]) -> None:
    scan = dicom(ROW.astype(np.uint16), PresentationLUTShape="IDENTITY")
    other = dicom(ROW.astype(np.uint16), **tags)
    for options in ({}, {"window": (100, 300)}):
        torch.testing.assert_close(decoded(other, **options), 1 - decoded(scan, **options))


def test_what_lies_outside_the_field_does_not_count() -> None:
    values = (ROW + 1000).astype(np.int16)
    values[:, :16] = -2000
    image = decoded(dicom(values, PixelPaddingValue=-2000), percentiles=(0, 100))
    assert (image[..., :16] == 0).all()
    assert image[0, -1, -1] == 1
    assert image[..., 16:].mean() > 0.4  # without it: above 0.9


def test_of_several_frames_the_first() -> None:
    frames = np.stack([ROW, ROW[::-1]]).astype(np.uint16)
    assert torch.equal(decoded(dicom(frames)), decoded(dicom(ROW.astype(np.uint16))))


def test_colour_stays_8_bits() -> None:
    colour = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    image = decoded(dicom(colour), in_chans=3)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), colour)


@pytest.mark.parametrize("compress", ["rle", "jpeg2000", "jpeg-ls"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_compressed(compress: str, kind: type) -> None:
    values = (ROW // 16).astype(kind)
    assert torch.equal(decoded(dicom(values, compress)), decoded(dicom(values)))


def _damaged() -> dict[str, tuple[bytes, str]]:
    scan = dicom(ROW.astype(np.uint16))
    bare, huge = dicom(ROW.astype(np.uint16)), dicom(ROW.astype(np.uint16), Rows=60000)
    del bare.PixelData
    huge.Columns = 60000
    packed = written(dicom(ROW.astype(np.uint16), "jpeg2000"))
    return {
        "text": (b"no scan at all" * 30, "without pixels, or no DICOM"),
        "empty": (b"", "the file is empty"),
        "bare": (written(bare), "without pixels"),
        "short": (written(scan)[:-100], "less than expected"),
        "huge": (written(huge), "claims 60000 x 60000 pixels"),
        "packed": (packed[:-300], ""),
    }


@pytest.mark.parametrize("name", _damaged())
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    data, reason = _damaged()[name]
    (tmp_path / f"{name}.dcm").write_bytes(data)
    with pytest.raises(UnreadableImage, match=rf"{name}\.dcm' cannot be read: .*{reason}"):
        read_image(str(tmp_path / f"{name}.dcm"), 1, Intensity())


def _bomb(kind: str) -> bytes:
    """A file of a kilobyte whose frame claims 60,000 x 60,000 pixels, or a deflated one."""
    values = (ROW // 16).astype(np.uint8)
    scan, large = dicom(values), (60_000).to_bytes(2, "big") * 2
    if kind == "deflated":
        scan.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
        scan.PixelData = bytes(300_000_000)
        return written(scan)
    if kind == "jpeg2000":
        frame = bytearray(imagecodecs.jpeg2k_encode(values, codecformat="j2k", reversible=True))
        start = frame.index(b"\xff\x51") + 6
        frame[start : start + 8] = (60_000).to_bytes(4, "big") * 2
    else:
        encode = imagecodecs.jpeg8_encode if kind == "jpeg" else imagecodecs.jpegls_encode
        frame = bytearray(encode(values))
        start = frame.index(b"\xff\xc0" if kind == "jpeg" else b"\xff\xf7") + 5
        frame[start : start + 4] = large
    scan.PixelData = encapsulate([bytes(frame)])
    scan["PixelData"].is_undefined_length = True
    syntaxes = {"jpeg": uid.JPEGBaseline8Bit, "jpeg2000": uid.JPEG2000Lossless}
    scan.file_meta.TransferSyntaxUID = syntaxes.get(kind, uid.JPEGLSLossless)
    return written(scan)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg2000", "jpeg-ls", "deflated"])
def test_bombs_are_refused_before_they_are_unpacked(kind: str) -> None:
    reason = "unpacks to more than" if kind == "deflated" else "frame claims 60000 x 60000 pixels"
    with pytest.raises(ValueError, match=reason):
        decode_image(_bomb(kind), 1, Intensity())


def test_deflated() -> None:
    scan = dicom((ROW // 16).astype(np.uint8))
    plain = decoded(scan)
    scan.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    assert torch.equal(decoded(scan), plain)


def test_packed_they_are_what_they_were(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for i, compress in enumerate((None, "rle", "jpeg2000")):
        content = written(dicom((ROW + 9 * i).astype(np.uint16), compress))
        (tmp_path / "root" / f"{i}.dcm").write_bytes(content)
    said = pack.pack(str(tmp_path / "root"), str(tmp_path / "packed"), workers=0)
    assert "3 scans are in it as they were" in said
    images = []
    for root in ("root", "packed"):
        module = ImageFolderData(
            str(tmp_path / root), img_size=16, in_chans=1, batch_size=3, val_fraction=0.0,
            percentiles_of="dataset", num_workers=0,
        )  # fmt: skip
        module.setup("fit")
        assert module.intensity.window == pytest.approx((18, 3072), abs=15)
        images.append(next(iter(module.train_dataloader()))["image"])
    assert images[0].dtype == torch.float32
    assert torch.equal(*images)
