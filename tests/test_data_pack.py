"""Packing: the same samples as from the folder, nothing lost, nothing done twice."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tifffile
import torch
from filelock import FileLock
from PIL import Image

from simmim.data import ImageFolderData, pack
from simmim.data.classification import ClassificationData
from simmim.data.decode import UnreadableImage, decode_image
from simmim.data.layout import read_folder, read_parts
from simmim.data.scans import Intensity
from simmim.data.shards import Packed, join_packed, read_packed
from support.commands import refused, simmim

Make = Callable[..., Path]
SHARED = Path(__file__).parents[2] / "shared" / "data"
SAME = {"format": "original"}, {"format": "raw", "short_side": None}, {"format": "raw"}


@pytest.fixture
def root(tmp_path: Path, make_images: Make) -> Path:
    """Two classes of PNGs and JPEGs, of several sizes."""
    make_images(tmp_path / "root" / "b", 6, size=(48, 40))
    make_images(tmp_path / "root" / "a" / "deep", 6, size=(30, 44), suffix=".jpg")
    make_images(tmp_path / "root" / "a", 4, size=41, suffix=".jpg")
    return tmp_path / "root"


def packed(root: Path, name: str = "packed", **options: Any) -> Path:
    out = root.parent / name
    pack.pack(str(root), str(out), **{"workers": 0, **options})
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def module_of(root: Path, **options: Any) -> ImageFolderData:
    module = ImageFolderData(str(root), **{"img_size": 24, "batch_size": 4, **options})
    module.setup()
    return module


def batches(module: ImageFolderData) -> list[dict[str, Any]]:
    loaders = module.train_dataloader(), module.val_dataloader(), module.predict_dataloader()
    return [batch for loader in loaders for batch in (*loader, *loader)]


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def pixels_of(root: Path, part: str = "train", in_chans: int = 3) -> list[torch.Tensor]:
    files = read_parts(str(root), 0.0)[part].files
    return [
        decode_image(files.read(i), in_chans, Intensity(), files.path(i)) for i in range(len(files))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("options", SAME)
@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_those_of_the_folder(root: Path, options: dict[str, Any], workers: int) -> None:
    unpacked = module_of(root, num_workers=workers)
    module = module_of(packed(root, **options), num_workers=workers)
    assert (module.classes, module.class_counts) == (unpacked.classes, unpacked.class_counts)
    for ours, theirs in zip(batches(module), batches(unpacked), strict=True):
        assert ours.keys() == theirs.keys()
        paths = [os.path.relpath(p, root.parent / "packed") for p in ours.pop("path", [])]
        assert paths == [os.path.relpath(p, root) for p in theirs.pop("path", [])]
        assert all(equal(ours[key], theirs[key]) for key in ours)


def test_parts_are_kept(root: Path, tmp_path: Path, make_images: Make) -> None:
    split = tmp_path / "split"
    shutil.copytree(root, split / "Train")
    make_images(split / "validation" / "a", 3)
    make_images(split / "validation" / "b", 2)
    make_images(split / "test", 4)  # without classes
    out = packed(split)
    ours, theirs = read_parts(str(out), 0.1), read_parts(str(split), 0.1)
    assert ours.keys() == theirs.keys() == {"train", "val", "test"}
    for part, (one, other) in {p: (ours[p].files, theirs[p].files) for p in ours}.items():
        assert [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))]
        assert one.classes == other.classes, part
        assert (one.labels is None) == (other.labels is None) == (part == "test")
        assert one.labels is None or torch.equal(one.labels, other.labels)
        assert one.suffixes == other.suffixes
    whole, scanned = read_folder(str(out)), read_folder(str(split))
    names = [scanned.name(i) for i in range(len(scanned))]
    assert sorted(whole.name(i) for i in range(len(whole))) == sorted(names)
    place = next(i for i in range(len(whole)) if whole.name(i) == "validation/b/001.png")
    theirs_too = (split / "validation" / "b" / "001.png").read_bytes()
    stored = decode_image(whole.read(place), 3, Intensity())
    near = (stored.float() - decode_image(theirs_too, 3, Intensity()).float()).abs().mean()
    assert near < 3  # JPEG of quality 90
    assert whole.classes == ["Train", "test", "validation"]
    assert whole.labels is not None
    assert whole.labels[place] == 2


def test_images_are_reduced_and_never_enlarged(root: Path) -> None:
    sizes = [tuple(image.shape[1:]) for image in pixels_of(root)]
    assert set(sizes) == {(41, 41), (44, 30), (40, 48)}
    for form in ("jpeg", "raw"):
        small = pixels_of(packed(root, form, format=form, short_side=41))
        assert [tuple(image.shape[1:]) for image in small] == sizes
        small = pixels_of(packed(root, form + "20", format=form, short_side=20))
        assert {tuple(image.shape[1:]) for image in small} == {(20, 20), (29, 20), (20, 24)}


@pytest.mark.parametrize(("form", "within"), [("raw", 0.6), ("jpeg", 3.0)])
def test_reduced_pixels_are_pillows(
    tmp_path: Path, make_images: Make, form: str, within: float
) -> None:
    root = make_images(tmp_path / "root", 3, size=(100, 80))
    for i, image in enumerate(pixels_of(packed(root, format=form, short_side=40))):
        theirs = Image.open(root / f"{i:03d}.png").resize((50, 40), Image.Resampling.BICUBIC)
        ours = image.permute(1, 2, 0).numpy().astype(float)
        assert np.abs(ours - np.asarray(theirs)).mean() < within


def test_a_jpeg_is_not_encoded_twice_for_nothing(root: Path) -> None:
    files = read_folder(str(packed(root)))
    for i in range(len(files)):
        stored = bytes(files.read(i))
        assert stored[:3] == b"\xff\xd8\xff"
        assert (stored == root.joinpath(files.name(i)).read_bytes()) == files.name(i).endswith(
            "jpg"
        )


def test_rotated_and_flattened(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint8).reshape(60, 40, 3) // 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    root = tmp_path / "root"
    root.mkdir()
    image.save(root / "turned.jpg", exif=exif, quality=95)
    clear = Image.new("RGBA", (30, 30), (10, 20, 30, 0))
    clear.save(root / "clear.png")
    for form in ("jpeg", "raw"):
        small = pixels_of(packed(root, form, format=form, short_side=20))
        assert [tuple(image.shape) for image in small] == [(3, 20, 20), (3, 20, 30)]
        assert (small[0] == 255).all()
    as_it_is = pixels_of(packed(root))
    assert torch.equal(as_it_is[1], pixels_of(root)[1])


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Gray and multi-channel scans of every depth."""
    root, random = tmp_path / "scans", np.random.default_rng(0)
    root.mkdir()
    deep = random.integers(100, 4000, (40, 30), dtype=np.uint16)
    Image.fromarray(deep).save(root / "a16.png")
    Image.fromarray(deep).save(root / "b16.tif")
    Image.fromarray(random.normal(0, 500, (40, 30)).astype(np.float32)).save(root / "c32.tif")
    Image.fromarray((deep.astype(np.int32) << 12) + 1).save(root / "d32.tif")
    np.save(root / "e.npy", deep)
    np.save(root / "f.npy", random.integers(0, 255, (3, 20, 30), dtype=np.uint8))
    return root


@pytest.mark.parametrize(
    "options", [{"format": "jpeg", "short_side": 16}, {"format": "original"}, *SAME[1:]]
)
def test_scans_keep_their_depth(scans: Path, options: dict[str, Any]) -> None:
    ours, theirs = pixels_of(packed(scans, **options)), pixels_of(scans)
    assert [image.dtype for image in theirs] == [torch.float32] * 5 + [torch.uint8]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_reduced_scans_are_stored_in_their_own_numbers(scans: Path) -> None:
    files = read_folder(str(packed(scans, format="raw", short_side=20)))
    stored = [np.load(io.BytesIO(files.read(i))) for i in range(len(files))]
    kinds = [np.uint16, np.uint16, np.float32, np.int32, np.uint16, np.uint8]
    assert [array.dtype for array in stored] == kinds
    assert [a.shape for a in stored] == [(27, 20)] * 4 + [(40, 30), (3, 20, 30)]
    whole = np.asarray(Image.open(scans / "a16.png"))
    assert abs(stored[0].mean() - whole.mean()) < 10
    assert len(np.unique(stored[0])) > 256


def test_dicom_is_left_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    folder = SHARED / "medical" / "dicom"
    if not folder.exists():
        pytest.skip("no ../shared/data")
    shutil.copytree(folder, tmp_path / "root")
    for form in ("jpeg", "raw"):
        files = read_folder(str(packed(tmp_path / "root", form, format=form)))
        assert ".dcm" in files.suffixes
        for i in range(len(files)):
            if files.name(i).endswith(".dcm"):
                assert bytes(files.read(i)) == (tmp_path / "root" / files.name(i)).read_bytes()


@pytest.mark.slow
def test_the_shards_are_the_same_for_any_number_of_workers(root: Path) -> None:
    (root / "b" / "000.png").write_bytes(b"nothing")
    alone = contents(packed(root, "alone", format="raw", short_side=32, shard_mb=1))
    together = contents(packed(root, "two", format="raw", short_side=32, shard_mb=1, workers=2))
    assert alone == together


def noise(folder: Path) -> Path:
    """Twelve images of 0.5 MB, of which one cannot be read."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 255, (400, 420, 3), dtype=np.uint8)).save(
            folder / f"{i:02d}.png", compress_level=1
        )
    (folder / "03.png").write_bytes(b"nothing")
    return folder


@contextmanager
def packing_slowly(root: Path, out: Path, workers: int) -> Iterator[subprocess.Popen[str]]:
    """A process, in a group of its own as at a terminal, that has written three shards of 1 MB."""
    code = (
        "import signal, sys, time\nfrom simmim.cli import main\n"
        "from simmim.data.pack import Images\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job may have it ignored
        "read = Images.__getitem__\n"
        "Images.__getitem__ = lambda *args: (time.sleep(0.1), read(*args))[1]\n"
        "sys.exit(main(['pack', *sys.argv[1:]]))"
    )
    options = ["--root", root, "--out", out, "--workers", workers, "--shard_mb", 1]
    command = [sys.executable, "-c", code, *options, "--format", "raw", "--short_side", "null"]
    process = subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.time() + 60
    try:
        while not (out / "images-00002.arrow").exists() and process.poll() is None:
            assert time.time() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


SLOWLY = {"format": "raw", "short_side": None, "shard_mb": 1}  # as these options say it


@pytest.mark.exhaustive
def test_killed_it_goes_on_with_the_next_shard(tmp_path: Path) -> None:
    root, out = noise(tmp_path / "root"), tmp_path / "killed"
    with packing_slowly(root, out, workers=0) as process:
        process.kill()
        process.wait()
    with pytest.raises(ValueError, match="is packed in part only: run simmim pack again"):
        read_folder(str(out))
    first = (out / "images-00000.arrow").stat()
    said = pack.pack(str(root), str(out), workers=0, **SLOWLY)  # type: ignore[arg-type]
    assert said.startswith("packed 11 images")
    assert said.endswith(
        f"1 of 12 could not be read and were left out: see {out / 'bad_files.txt'}"
    )
    assert (out / "images-00000.arrow").stat().st_ino == first.st_ino
    assert contents(out) == contents(packed(root, "whole", **SLOWLY))
    assert not list(out.glob(".*.unfinished"))


@pytest.mark.exhaustive
@pytest.mark.skipif(os.name == "nt", reason="no process groups")
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_says_how_to_go_on_and_leaves_nothing_half_done(
    tmp_path: Path, workers: int
) -> None:
    root, out = noise(tmp_path / "root"), tmp_path / "stopped"
    with packing_slowly(root, out, workers) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
        said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130
    sentence = rf"simmim: stopped; \d+ of 12 images are in {out}: the same command goes on"
    assert re.fullmatch(sentence, said[-1])
    assert not any("Traceback" in line for line in said)
    assert {path.suffix for path in out.iterdir()} == {".arrow", ".json"}
    pack.pack(str(root), str(out), workers=0, **SLOWLY)  # type: ignore[arg-type]
    assert contents(out) == contents(packed(root, "whole", **SLOWLY))


def test_what_is_packed_is_not_packed_again(root: Path) -> None:
    out = packed(root)
    before = contents(out)
    assert "is packed already" in pack.pack(str(root), str(out))
    with pytest.raises(ValueError, match="was packed with --quality 90, not 80"):
        packed(root, quality=80)
    (root / "b" / "000.png").unlink()
    with pytest.raises(ValueError, match="was packed from other files"):
        packed(root)
    assert contents(out) == before
    again = packed(out, "again", format="raw")  # a packed folder is a folder
    assert len(read_folder(str(again))) == 16


def test_a_val_alone_is_refused_before_it_is_packed(
    tmp_path: Path, make_images: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "root" / "val" / "a", 2)
    options = ["--root", str(tmp_path / "root"), "--out", str(tmp_path / "packed")]
    said = refused(capsys, "pack", *options, status=1)
    assert "has val/, but no train/ beside it: put the training images" in said
    assert not (tmp_path / "packed").exists()
    make_images(tmp_path / "root" / "cats", 2)
    with pytest.warns(UserWarning, match="val/ in .* is taken for a class"):
        assert read_folder(str(packed(tmp_path / "root"))).classes == ["cats", "val"]


def test_two_into_one_folder(root: Path) -> None:
    out = root.parent / "packed"
    out.mkdir()
    with FileLock(out / "packing.lock"), pytest.raises(ValueError, match="another simmim pack wri"):
        packed(root)
    assert {f.name for f in packed(root).iterdir()} == {  # the lock is gone, also the other's
        "packed.json", "images.feather", "images-00000.arrow"
    }  # fmt: skip


def test_images_of_many_channels(tmp_path: Path) -> None:
    root, random = tmp_path / "bands", np.random.default_rng(0)
    root.mkdir()
    for i, kind in enumerate((np.uint8, np.uint16, np.float32)):
        bands = (random.random((40, 30, 5)) * 200).astype(kind)
        tifffile.imwrite(root / f"{i}.tif", bands, photometric="minisblack", planarconfig="contig")
        np.save(root / f"{i}.npy", bands)
    for options in ({"format": "jpeg"}, {"format": "original"}, {"format": "raw"}):
        ours = pixels_of(packed(root, options["format"], **options), in_chans=5)
        assert len(ours) == 6
        assert all(
            torch.equal(a, b) for a, b in zip(ours, pixels_of(root, in_chans=5), strict=True)
        )
    small = pixels_of(packed(root, "small", format="raw", short_side=20), in_chans=5)
    assert [tuple(image.shape) for image in small] == [(5, 40, 30), (5, 27, 20)] * 3  # .npy, .tif


def test_nothing_else_is_overwritten(root: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="holds something else: give a new or an empty folder"):
        packed(root)
    assert contents(tmp_path / "packed") == {"thesis.txt": b"years"}
    with pytest.raises(ValueError, match="holds something else"):
        pack.pack(str(root), str(root))


def test_bad_files_are_left_out_and_listed(root: Path) -> None:
    (root / "b" / "002.png").write_bytes(b"")
    (root / "a" / "001.jpg").write_bytes((root / "a" / "001.jpg").read_bytes()[:200])
    out = packed(root)
    lines = (out / "bad_files.txt").read_text().splitlines()
    assert [line.partition("\t")[0] for line in lines] == [
        str(root / "a" / "001.jpg"), str(root / "b" / "002.png")
    ]  # fmt: skip
    assert lines[1].endswith("\tthe file is empty")
    files, labels = read_folder(str(out)), []
    names = [files.name(i) for i in range(len(files))]
    assert len(names) == 14
    assert not {"b/002.png", "a/001.jpg"} & set(names)
    labels = files.labels
    assert labels is not None
    assert labels.tolist() == ["ab".index(name[0]) for name in names]
    with pytest.raises(UnreadableImage, match=r"001\.jpg' cannot be read: "):
        packed(root, "raise", bad_files="raise")
    with pytest.raises(UnreadableImage, match=r"2 of 16 images cannot be read, which is more than"):
        packed(root, "share", max_bad_share=0.1)


def test_what_others_see(root: Path) -> None:
    out = packed(root)
    table = pa.ipc.open_file(pa.memory_map(str(out / "images-00000.arrow"))).read_all()
    first = table.slice(9, 2).to_pylist()
    assert [row["image"]["path"] for row in first] == ["a/deep/005.jpg", "b/000.png"]
    assert [row["label"] for row in first] == [0, 1]
    assert Image.open(io.BytesIO(first[1]["image"]["bytes"])).size == (48, 40)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"_type": "ClassLabel", "names": ["a", "b"]}


def test_raw_pixels_are_not_copied(tmp_path: Path, make_images: Make) -> None:
    files = read_folder(str(packed(make_images(tmp_path / "root", 3), format="raw")))
    first, again = (decode_image(files.read(1), 3, Intensity()) for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
    files = pickle.loads(pickle.dumps(files))  # to a spawned worker
    assert torch.equal(decode_image(files.read(1), 3, Intensity()), first)


def test_a_damaged_shard_is_named(root: Path) -> None:
    out = packed(root)
    shard, whole = out / "images-00000.arrow", contents(out)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"images-00000\.arrow has [\d,]+ bytes, not [\d,]+"):
        read_folder(str(out))
    shard.unlink()
    with pytest.raises(ValueError, match=r"images-00000\.arrow is missing: copy it again"):
        read_folder(str(out))
    shard.write_bytes(b"\0" * len(whole[shard.name]))
    files = read_folder(str(out))
    with pytest.raises(ValueError, match=r"images-00000\.arrow is damaged"):
        files.read(0)
    (out / "images.feather").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images\.feather is damaged"):
        read_folder(str(out))
    (out / "packed.json").write_text("{")
    with pytest.raises(ValueError, match=r"packed\.json is damaged, or not of simmim pack"):
        read_folder(str(out))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2, "sizes": []}, "json is of version 2, not 1: pack the images anew"),
        ({"parts": {}}, "json is damaged, or not of simmim pack: it has no part that trains"),
        ({"parts": {"train": None}}, "json is damaged, or not of simmim pack: "),
        ({"parts": {"train": {"classes": [1, 2]}}}, "its classes or endings are no words"),
        ({"parts": {"train": {"suffixes": None}}}, "json is damaged, or not of simmim pack: "),
        ({"parts": {"train": {"bad": []}}}, "json is damaged, or not of simmim pack: "),
        (None, "holds shards, but no packed.json, which says what is in them: copy that as well"),
    ],
)
def test_a_packed_folder_that_is_not_as_it_was(
    root: Path, change: dict[str, Any] | None, sentence: str
) -> None:
    file = packed(root) / "packed.json"
    if change is None:
        file.unlink()
    else:
        table = json.loads(file.read_text())
        train = change.get("parts", {}).get("train")
        if train:
            change = {"parts": {"train": {**table["parts"]["train"], **train}}}
        file.write_text(json.dumps({**table, **change}))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_parts(str(file.parent), 0.1)


def test_damaged_bytes_in_a_shard_are_a_bad_file(root: Path) -> None:
    out = packed(root)
    shard, files = out / "images-00000.arrow", read_folder(str(out))
    data, image = bytearray(shard.read_bytes()), bytes(files.read(3))
    place = data.index(image)
    data[place : place + 40] = bytes(40)
    shard.write_bytes(data)
    module = module_of(out, val_fraction=0, bad_files="raise")
    with pytest.raises(UnreadableImage, match=r"packed.a.003\.jpg' cannot be read"):
        list(module.train_dataloader())


def test_a_small_disk_is_noticed_before(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"has 1e-06 GB free, about 1\.\d+e-05 GB are needed: use another"
    ):
        packed(root)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow text only")
def test_names_that_are_no_text(tmp_path: Path, make_images: Make) -> None:
    root = make_images(tmp_path / "root", 1)
    awkward = [b"new\nline.png", b"latin1_\xe9.png", "画像.png".encode()]
    for name in awkward:
        shutil.copy(root / "000.png", os.fsdecode(os.fsencode(root) + b"/" + name))
    ours, theirs = read_folder(str(packed(root))), read_folder(str(root))
    assert [ours.name(i) for i in range(4)] == [theirs.name(i) for i in range(4)]


def test_without_pyarrow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = packed(root)
    monkeypatch.setattr("simmim.data.shards.find_spec", lambda name: None)
    for function in (packed, lambda _: read_folder(str(out))):
        with pytest.raises(ValueError, match=r"packed images need pyarrow: pip install"):
            function(root)


def test_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed"
    simmim("pack --workers 0", "--root", str(root), "--out", str(out))
    assert capsys.readouterr().out.startswith(f"packed 16 images into {out}: 1 shard, ")
    assert Packed.load(out).complete
    for arguments, sentence in (
        (["--root", str(root)], "--out must be given"),
        (["--root", str(tmp_path / "no"), "--out", "x"], "no' does not exist: give a folder of"),
        (["--root", str(root), "--out", "x", "--quality", "0"], "--quality 0 is out of range"),
        (["--root", str(root), "--out", "x", "--format", "jpg"], "did you mean jpeg?"),
    ):
        assert sentence in refused(capsys, "pack", *arguments)
    assert not Path("x").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk to be had on Linux")
def test_a_full_disk_leaves_what_is_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda p, mode: opened(Path("/dev/full") if "00000" in p.name else p, mode)
    )
    monkeypatch.setattr(Path, "unlink", lambda p, **_: os.unlink(p) if p.exists() else None)
    with pytest.raises(OSError, match="No space left on device"):
        packed(root)
    monkeypatch.undo()
    assert [p.name for p in (root.parent / "packed").iterdir()] == ["packed.json"]
    assert len(read_folder(str(packed(root)))) == 16


def test_labels_of_a_table(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    files = read_folder(str(root))
    rows = [f"{files.name(i)},{'xy'[i % 2]}" for i in range(len(files))]
    table.write_text("\n".join(["path,label", *rows]))
    options = {"labels": str(table), "img_size": 24, "val_fraction": 0.0, "batch_size": 2}
    sets = []
    for folder in (root, packed(root, format="original")):
        module = ClassificationData(root=str(folder), **options)
        module.setup("fit")
        sets.append(module.sets["training"])
    assert sets[1].labels.tolist() == [0, 1] * 8
    for i in range(16):
        assert all(equal(sets[1][i][key], sets[0][i][key]) for key in ("image", "label"))


def test_an_image_is_found_by_its_path(root: Path) -> None:
    files = join_packed(str(root), read_packed(str(packed(root))))
    assert [files.find(files.name(i)) for i in range(16)] == list(range(16))
    for name in ("000.jpg", "a/deep/000.jp", "b/000.png" + "b/001.png", "", "a/deep"):
        assert files.find(name) is None
