"""DICOM files, made here: units, signs, frames, inversion, compression, damage."""

from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import torch
from pydicom import Dataset, uid
from pydicom.encaps import encapsulate

from simmim.data import ImageFolderData, pack
from simmim.data.decode import UnreadableImage, decode_image, read_image
from simmim.data.scans import Intensity
from support.files import dicom, written

ROW = np.arange(48 * 64).reshape(48, 64)


def compressed(values: np.ndarray, compress: str | None) -> Dataset:
    scan = dicom(values)
    if compress == "jpeg-ls":
        scan.PixelData = encapsulate([imagecodecs.jpegls_encode(values)])
        scan["PixelData"].is_undefined_length = True
        scan.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
    elif compress:
        scan.compress({"rle": uid.RLELossless, "jpeg2000": uid.JPEG2000Lossless}[compress])
    return scan


def decoded(scan: Dataset, in_chans: int = 1, **intensity: Any) -> torch.Tensor:
    return decode_image(written(scan), in_chans, Intensity(**intensity))


def test_values_are_those_of_the_scans_units() -> None:
    plain = dicom(ROW.astype(np.uint16))
    scan = dicom(ROW.astype(np.uint16), RescaleSlope="2.5", RescaleIntercept="-1000")
    wanted = ((ROW * 2.5 - 1000 + 160) / 400).clip(0, 1)
    np.testing.assert_allclose(decoded(scan, window=(-160, 240))[0], wanted, atol=1e-5)
    assert decoded(scan, in_chans=3).shape == (3, 48, 64)
    signed = dicom((ROW - 400).astype(np.int16))
    np.testing.assert_allclose(decoded(signed, percentiles=(0, 100))[0], ROW / ROW.max(), atol=1e-6)
    windowed = dicom(ROW.astype(np.uint16), WindowCenter="5", WindowWidth="2")
    assert torch.equal(decoded(windowed), decoded(plain))  # its window is for one look at it
    frames = np.stack([ROW, ROW[::-1]]).astype(np.uint16)
    assert torch.equal(decoded(dicom(frames)), decoded(plain))  # the first
    colour = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    image = decoded(dicom(colour), in_chans=3)  # stays 8 bits
    assert np.array_equal(image.permute(1, 2, 0).numpy(), colour)


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


@pytest.mark.parametrize("compress", ["rle", "jpeg2000", "jpeg-ls"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_compressed(compress: str, kind: type) -> None:
    values = (ROW // 16).astype(kind)
    assert torch.equal(decoded(compressed(values, compress)), decoded(dicom(values)))


def test_deflated(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = dicom((ROW // 16).astype(np.uint8))
    plain = decoded(scan)
    scan.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    assert torch.equal(decoded(scan), plain)
    monkeypatch.setattr("simmim.data.scans.MAX_VALUES", 2000)
    with pytest.raises(ValueError, match="unpacks to more than"):
        decoded(scan)


def test_damage_is_named(tmp_path: Path) -> None:
    scan, bare = dicom(ROW.astype(np.uint16)), dicom(ROW.astype(np.uint16))
    huge = dicom(ROW.astype(np.uint16), Rows=60000, Columns=60000)
    del bare.PixelData
    for data, reason in (
        (b"no scan at all" * 30, "without pixels, or no DICOM"),
        (b"", "the file is empty"),
        (written(bare), "without pixels"),
        (written(scan)[:-100], "less than expected"),
        (written(huge), "claims 60000 x 60000 pixels"),
        (written(compressed(ROW.astype(np.uint16), "jpeg2000"))[:-300], ""),
    ):
        (tmp_path / "x.dcm").write_bytes(data)
        with pytest.raises(UnreadableImage, match=rf"x\.dcm' cannot be read: .*{reason}"):
            read_image(str(tmp_path / "x.dcm"), 1, Intensity())


@pytest.mark.parametrize(
    ("encode", "syntax", "marker", "offset", "size"),
    [
        (imagecodecs.jpeg8_encode, uid.JPEGBaseline8Bit, b"\xff\xc0", 5, 2),
        (imagecodecs.jpegls_encode, uid.JPEGLSLossless, b"\xff\xf7", 5, 2),
        (
            partial(imagecodecs.jpeg2k_encode, codecformat="j2k", reversible=True),
            uid.JPEG2000Lossless, b"\xff\x51", 6, 4,
        ),
    ],
    ids=["jpeg", "jpeg-ls", "jpeg2000"],
)  # fmt: skip
def test_frames_that_claim_another_size_are_refused_before_they_are_unpacked(
    encode: Any, syntax: str, marker: bytes, offset: int, size: int
) -> None:
    values = (ROW // 16).astype(np.uint8)
    scan, frame = dicom(values), bytearray(encode(values))
    start = frame.index(marker) + offset
    frame[start : start + 2 * size] = (60_000).to_bytes(size, "big") * 2
    scan.PixelData = encapsulate([bytes(frame)])
    scan["PixelData"].is_undefined_length = True
    scan.file_meta.TransferSyntaxUID = syntax
    with pytest.raises(ValueError, match="frame claims 60000 x 60000 pixels"):
        decoded(scan)


def test_packed_they_are_what_they_were(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for i, compress in enumerate((None, "rle", "jpeg2000")):
        content = written(compressed((ROW + 9 * i).astype(np.uint16), compress))
        (tmp_path / "root" / f"{i}.dcm").write_bytes(content)
    said = pack.pack(str(tmp_path / "root"), str(tmp_path / "packed"), workers=0)
    assert "3 scans are in it as they were" in said
    images = []
    for root in ("root", "packed"):
        options = {"img_size": 16, "in_chans": 1, "batch_size": 3, "num_workers": 0}
        options |= {"val_fraction": 0.0, "percentiles_of": "dataset"}
        module = ImageFolderData(str(tmp_path / root), **options)
        module.setup("fit")
        assert module.intensity.window == pytest.approx((18, 3072), abs=15)
        images.append(next(iter(module.train_dataloader()))["image"])
    assert images[0].dtype == torch.float32
    assert torch.equal(*images)
