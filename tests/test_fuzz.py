"""Damaged files of every kind: read right, or refused; never a crash, a hang or a full memory.

SIMMIM_FUZZ_MINUTES=30 pytest tests/test_fuzz.py -m exhaustive: as long for all kinds together,
from a seed that is new each time. What it finds, cut down by hand, belongs into FOUND.
"""

import io
import json
import os
import secrets
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save

from fuzzing import READERS, pack_up, read_damaged, read_files
from simmim import SimMIM
from simmim.data.pack import pack
from simmim.data.shards import Packed
from support.files import dicom, encoded, npy, written
from support.folders import make_classes
from support.processes import in_processes

MINUTES = float(os.environ.get("SIMMIM_FUZZ_MINUTES", "0"))
EXAMPLES = {"image": 1500, "weights": 150, "packed": 200}  # others: 300; a minute in all


def images() -> dict[str, bytes]:
    """Small images of all formats, options that change their structure among them."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
    smooth = rgb.resize((40, 24), Image.Resampling.BOX, (0, 0, 8, 8))
    deep = Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [smooth.rotate(90)]}
    variants: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "a.jpg": (smooth, "JPEG", {"exif": exif}),
        "progressive.jpg": (smooth, "JPEG", {"progressive": True, "restart_marker_rows": 1}),
        "cmyk.jpg": (smooth.convert("CMYK"), "JPEG", {}),
        "a.png": (rgb, "PNG", {"exif": exif}),
        "palette.png": (smooth.quantize(16), "PNG", {"transparency": bytes(range(16))}),
        "deep.png": (deep, "PNG", {}),
        "moving.png": (smooth, "PNG", frames),
        "raw.tif": (smooth, "TIFF", {}),
        "lzw.tif": (smooth, "TIFF", {"compression": "tiff_lzw"}),
        "zip.tif": (deep, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "jpeg.tif": (smooth, "TIFF", {"compression": "jpeg"}),
        "fax.tif": (smooth.convert("1"), "TIFF", {"compression": "group4"}),
        "float.tif": (Image.fromarray(np.eye(9, dtype=np.float32)), "TIFF", {}),
        "pages.tif": (smooth, "TIFF", frames),
        "a.gif": (smooth, "GIF", frames),
        "a.bmp": (smooth, "BMP", {}),
        "palette.bmp": (smooth.quantize(16), "BMP", {}),
        "a.ppm": (smooth, "PPM", {}),
        "a.webp": (smooth, "WEBP", {"exif": exif}),
        "lossless.webp": (smooth, "WEBP", {"lossless": True, **frames}),
        "a.jp2": (smooth, "JPEG2000", {}),
        "a.avif": (smooth, "AVIF", {}),
    }
    found = {
        name: encoded(image, format, **options)
        for name, (image, format, options) in variants.items()
        if format not in ("AVIF", "WEBP") or features.check(format.lower())
    }
    found |= {"a.npy": npy(np.ones((4, 5, 3), np.uint8)), "deep.npy": npy(np.eye(9))}
    tags = {"RescaleSlope": "2", "RescaleIntercept": "-1024", "BitsStored": 12, "HighBit": 11}
    scan = dicom(np.arange(120, dtype=np.uint16).reshape(12, 10), **tags)
    return found | {"a.dcm": written(scan)}


def weights() -> dict[str, bytes]:
    """Checkpoints of ours, official ones, and safetensors."""
    tiny = {"patch_size": 4, "depth": 1, "embed_dim": 8, "num_heads": 2}
    model = SimMIM("vit_tiny_patch16_224", 8, mask_patch_size=4, encoder_kwargs=tiny)
    ours = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    ours |= {"pytorch-lightning_version": "2.6.6", "global_step": 3}
    new, old, plain = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(ours, new)
    torch.save(ours, old, _use_new_zipfile_serialization=False)
    config = {"DATA": {"IMG_SIZE": 8}, "MODEL": {"TYPE": "vit", "VIT": {"NUM_HEADS": 2}}}
    names = {n.removeprefix("encoder.model."): t for n, t in model.state_dict().items()}
    torch.save({"model": names, "config": config}, plain)
    tensors = save({name: tensor.contiguous() for name, tensor in names.items()})
    files = {"new.ckpt": new, "old.ckpt": old, "official.pth": plain}
    return {n: f.getvalue() for n, f in files.items()} | {"a.safetensors": tensors}


def packed() -> dict[str, bytes]:
    """A packed folder with classes."""
    with tempfile.TemporaryDirectory() as folder:
        make_classes(Path(folder, "in"), 3, "cat dog", size=8)
        pack(f"{folder}/in", f"{folder}/out", workers=1)
        return {"a.packed": pack_up(Path(folder, "out"))}


def coco() -> bytes:
    image = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 24}
    square = [1.5, 2, 9, 2, 9, 8, 1, 8]
    found = [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 8, 6], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 3, "segmentation": [square], "area": 48.0},
        {"id": 3, "image_id": 1, "category_id": 4, "bbox": [0, 0, 9, 9], "iscrowd": 1}
        | {"segmentation": {"size": [24, 40], "counts": [3, 900, 57]}},
    ]
    categories = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    table = {"images": [image], "annotations": found, "categories": categories}
    return json.dumps(table).encode()


VOC = b"""<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.jpg</filename>
<size><width>40</width><height>24</height></size><object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"""
CLASSES = {"classes": ["road", "tree"], "ignore_index": 255, "values": [1, 4]}
CLASSES["palette_rgb"] = [[0, 0, 0], [1, 2, 3], [9, 9, 9]]


@cache
def seeds(kind: str) -> dict[str, bytes]:
    """The valid files of a kind, by name."""
    texts = {
        "coco": {"a.json": coco()},
        "voc": {"a.xml": VOC},
        "labels": {
            "a.csv": b"path,label\na.jpg,cat\nb.jpg,dog\n",
            "b.csv": b"p,x,y\na,0,1\nb,1,0\n",
        },
        "classes": {"classes.json": json.dumps(CLASSES).encode()},
    }
    if kind == "mask":
        return {n: d for n, d in images().items() if n.endswith((".png", ".tif", ".gif", ".bmp"))}
    return texts.get(kind) or {"image": images, "weights": weights, "packed": packed}[kind]()


FOUND = {  # what was found so far, made small
    "brackets.coco": b"[" * 100_000,
    "digits.coco": b'{"images": [{"id": ' + b"9" * 5000 + b"}]}",
    "height.coco": b'{"images": [{"id": 1, "file_name": "a", "height": 1' + b"0" * 400 + b"}]}",
    "unknown.voc": b'<?xml version="1.0" encoding="utf-99"?><a/>',
    "two_bytes.voc": b'<?xml version="1.0" encoding="shift_jis"?><a/>',
    "cell.labels": b'path,label\na.jpg,"' + b"x" * 200_000 + b'"\n',
    "infinity.classes": b'{"classes": ["a", "b"], "ignore_index": 1e999}',
    "values.classes": b'{"classes": ["a", "b"], "values": [1, 99999]}',
    "brackets.classes": b"[" * 100_000,
}
HEADER = (2**40).to_bytes(8, "little") + b"{}"


@pytest.mark.slow
def test_valid_files_and_what_was_found_are_read(workdir: Path) -> None:
    valid = [(kind, name, data) for kind in READERS for name, data in seeds(kind).items()]
    in_processes(1, read_files, valid)
    found = [(name.rpartition(".")[2], name, data) for name, data in FOUND.items()]
    data = bytearray(seeds("weights")["official.pth"])
    place = data.rindex(b"PK\6\6") + 48  # a table of contents that leads out of the file
    data[place : place + 8] = (2 * len(data)).to_bytes(8, "little")
    found += [("weights", "x.pth", bytes(data)), ("weights", "x.safetensors", HEADER)]
    in_processes(1, read_files, found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(workdir: Path, kind: str) -> None:
    first, minutes = secrets.randbits(40) if MINUTES else 0, MINUTES / len(READERS)
    examples = EXAMPLES.get(kind, 300)
    in_processes(1, read_damaged, kind, seeds(kind), first, examples, minutes, seconds=10**6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", ["crash", "fill", "raise", "hang"])
def test_faults_are_seen(workdir: Path, fault: str) -> None:
    with pytest.raises(AssertionError, match="MB" if fault == "fill" else "fail x"):
        in_processes(1, read_files, [("fail", "x", fault.encode())])


@pytest.mark.parametrize("name", ["../x.arrow", "a/x.arrow", "C:x.arrow", "..\\x.arrow"])
def test_a_packed_folder_names_no_file_outside(tmp_path: Path, name: str) -> None:
    table = {"file": name, "rows": 1, "size": 1, "kept": 0}
    part = {"folder": "", "classes": [], "suffixes": [], "files": 1, "shards": [table], "bad": {}}
    told = {"version": 1, "options": {}, "source": "", "complete": True, "parts": {"train": part}}
    (tmp_path / "packed.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="which is not in the folder"):
        Packed.load(tmp_path)
