"""The bytes of single image files: what Pillow writes, NumPy arrays, DICOM scans."""

import io
from typing import Any

import numpy as np
from PIL import Image
from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Write an image as Pillow does."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def npy(values: Any) -> bytes:
    """Write a NumPy array."""
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


def dicom(values: np.ndarray, **tags: Any) -> Dataset:
    """Make a scan, (H, W) or (frames, H, W), or a colour one of uint8, (H, W, 3)."""
    scan, colour = Dataset(), values.ndim == 3 and values.shape[2] == 3
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
    return scan


def written(scan: Dataset) -> bytes:
    """Write a scan."""
    stream = io.BytesIO()
    scan.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
