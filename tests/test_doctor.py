"""`simmim doctor`: what it finds in folders that have it."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from doctor_work import Fatal, square, wrong
from simmim.commands.doctor import doctor
from simmim.commands.doctor.estimate import fitting_sizes
from simmim.commands.doctor.file_stats import look
from simmim.commands.doctor.near_duplicates import clusters
from simmim.commands.doctor.pictures import COLUMNS, GAP, SIDE, Row, Tile, draw_sheet
from simmim.commands.doctor.workers import run_all
from simmim.pretrain import SimMIM
from support.commands import refused, simmim

pytestmark = pytest.mark.slow

Make = Callable[..., Path]


def _save(pixels: object, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)
    return path


def _noise(seed: int, *shape: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    height, width = shape or (48, 64)
    smooth = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def _photos(folder: Path, n: int = 12, first: int = 0) -> Path:
    for i in range(first, first + n):
        _save(_noise(i), folder / f"{i:03d}.jpg", quality=95)
    return folder


def _diagnose(root: Path, tmp_path: Path, **options: object) -> dict:
    out = tmp_path / f"out_{time.monotonic_ns()}"
    text = doctor(str(root), out=str(out), **{"estimate": False, "workers": 1, **options})
    found = json.loads((out / "doctor.json").read_text("utf-8"))
    found["text"], found["out"] = text, out
    found["by_kind"] = {finding["kind"]: finding for finding in found["findings"]}
    return found


# A good folder ------------------------------------------------------------------------------------


def test_a_good_folder_has_nothing_to_complain_of(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        _photos(tmp_path / "root" / name, 10, first=100 * len(name) + (name == "dog") * 50)
    found = _diagnose(tmp_path / "root", tmp_path)
    assert found["findings"] == []
    assert found["summary"]["images"] == {"train": 18, "val": 2}
    assert found["summary"]["classes"]["cat"] == {"train": 9, "val": 1}
    assert found["summary"]["formats"] == {"JPEG": 20}
    assert found["summary"]["width"]["median"] == 64
    assert "nothing to complain of" in found["text"]
    assert (found["out"] / "quarantine.txt").read_text() == ""


def test_statistics_are_those_of_the_pixels(tmp_path: Path) -> None:
    pictures = [_noise(i) for i in range(4)]
    for i, pixels in enumerate(pictures):
        _save(pixels, tmp_path / "root" / f"{i}.png")
    summary = _diagnose(tmp_path / "root", tmp_path, val_fraction=0.0)["summary"]
    pixels = np.stack(pictures).reshape(-1, 3) / 255
    np.testing.assert_allclose(summary["mean"], pixels.mean(0), atol=1e-4)
    np.testing.assert_allclose(summary["std"], pixels.std(0), atol=1e-4)


def test_the_same_for_one_worker_and_for_two(tmp_path: Path) -> None:
    root = _photos(tmp_path / "root", 40)
    (root / "bad.jpg").write_bytes(b"no image")
    one, two = (_diagnose(root, tmp_path, workers=n) for n in (1, 2))
    for found in (one, two):
        found["summary"].pop("images_per_s")
    assert one["summary"] == two["summary"]
    assert one["findings"] == two["findings"]
    sheets = [(found["out"] / "contact_sheet.png").read_bytes() for found in (one, two)]
    assert sheets[0] == sheets[1]


# Findings -----------------------------------------------------------------------------------------


def test_unreadable_files_are_listed_for_quarantine(tmp_path: Path) -> None:
    root = _photos(tmp_path / "root")
    (root / "cut.jpg").write_bytes((root / "000.jpg").read_bytes()[:500])
    (root / "empty.png").touch()
    found = _diagnose(root, tmp_path)
    finding = found["by_kind"]["unreadable"]
    assert finding["level"] == "bad"
    assert sorted(finding["files"]) == ["cut.jpg", "empty.png"]
    assert finding["files"]["empty.png"] == "the file is empty"
    lines = (found["out"] / "quarantine.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["cut.jpg", "empty.png"]
    assert lines[1].split("\t")[1] == "the file is empty"
    assert (root / "cut.jpg").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the line is for a POSIX shell")
def test_the_line_that_moves_them_works(tmp_path: Path) -> None:
    root = _photos(tmp_path / "the root", 3)
    (root / "it's").mkdir()
    for name in ("-cut.jpg", "it's/two words.jpg"):
        (root / name).write_bytes(b"no image")
    text = _diagnose(root, tmp_path)["text"]
    line = next(line for line in text.splitlines() if "AWAY" in line)
    subprocess.run(["sh", "-c", line], check=True)
    moved = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "quarantine").rglob("*.jpg")}
    assert moved == {"quarantine/-cut.jpg", "quarantine/it's/two words.jpg"}
    assert len(list(root.rglob("*.jpg"))) == 3
    root.rename(tmp_path / "gone")
    (tmp_path / "elsewhere/it's").mkdir(parents=True)
    other = tmp_path / "elsewhere/it's/two words.jpg"
    other.touch()
    again = subprocess.run(["sh", "-c", line], cwd=tmp_path / "elsewhere", check=False)
    assert again.returncode != 0
    assert other.exists()


def test_other_channels_than_asked_for_name_the_option(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for i in range(3):
        np.save(tmp_path / "root" / f"{i}.npy", np.zeros((16, 16, 5), np.uint8))
    finding = _diagnose(tmp_path / "root", tmp_path)["by_kind"]["unreadable"]
    assert "it has 5 channels" in finding["remedy"]
    assert "--in_chans" in finding["remedy"]
    kinds = _diagnose(tmp_path / "root", tmp_path, in_chans=5)["by_kind"]
    assert "unreadable" not in kinds


def test_copies_across_parts_are_leaks_and_within_a_part_copies(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _photos(root / "train", 8)
    _photos(root / "val", 4, first=50)
    shutil.copy(root / "val/050.jpg", root / "train/same.jpg")
    shutil.copy(root / "train/001.jpg", root / "train/copy.jpg")
    found = _diagnose(root, tmp_path)
    leak, copy = found["by_kind"]["leak"], found["by_kind"]["duplicate"]
    assert leak["files"] == {"train/same.jpg": "the same file as val/050.jpg"}
    assert leak["level"] == "bad"
    assert copy["files"] == {"train/copy.jpg": "the same file as train/001.jpg"}
    assert sorted(found["by_kind"]) == ["duplicate", "leak"]
    listed = (found["out"] / "quarantine.txt").read_text()
    assert "val/" not in [line.split("\t")[0][:4] for line in listed.splitlines()]


def test_images_that_look_alike_are_found_whatever_their_bytes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _photos(root / "train", 12)
    _photos(root / "val", 3, first=60)
    picture = Image.open(root / "val/061.jpg")
    picture.resize((96, 72)).save(root / "train/larger.jpg", quality=60)
    Image.open(root / "train/003.jpg").save(root / "train/third.png")
    found = _diagnose(root, tmp_path)["by_kind"]
    assert found["near_leak"]["files"] == {"train/larger.jpg": "looks like val/061.jpg"}
    assert found["near_duplicate"]["files"] == {"train/third.png": "looks like train/003.jpg"}
    assert found["near_leak"]["beside"] == {"train/larger.jpg": "val/061.jpg"}
    assert not found["near_leak"]["quarantine"]


def test_copies_with_different_labels_are_conflicts_and_none_is_taken_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _photos(root / "cat", 6)
    _photos(root / "dog", 6, first=50)
    for copy in ("cat/copy.jpg", "dog/same.jpg"):
        shutil.copy(root / "cat/001.jpg", root / copy)
    Image.open(root / "dog/052.jpg").resize((96, 72)).save(root / "cat/larger.jpg")
    found = _diagnose(root, tmp_path)
    assert set(found["by_kind"]) == {"label_conflict", "near_label_conflict"}
    conflict, near = found["by_kind"]["label_conflict"], found["by_kind"]["near_label_conflict"]
    assert conflict["level"] == "bad"
    assert conflict["files"] == {
        "cat/001.jpg": "labelled cat but the same file as dog/same.jpg, labelled dog",
        "cat/copy.jpg": "labelled cat but the same file as dog/same.jpg, labelled dog",
        "dog/same.jpg": "labelled dog but the same file as cat/001.jpg, labelled cat",
    }
    assert (
        near["files"]["cat/larger.jpg"] == "labelled cat but looks like dog/052.jpg, labelled dog"
    )
    assert sorted(near["files"]) == ["cat/larger.jpg", "dog/052.jpg"]
    assert (found["out"] / "quarantine.txt").read_text() == ""


def test_near_copies_are_found_among_thousands() -> None:
    random = np.random.default_rng(0)
    picture = look(torch.from_numpy(_noise(0).copy()).permute(2, 0, 1))

    def found(bits: np.ndarray) -> list[list[int]]:
        hashes = np.packbits(bits, axis=1)
        return clusters([replace(picture, likeness=row.tobytes()) for row in hashes])

    base = random.integers(0, 2, 128, np.uint8)
    pairs = np.array(list(combinations(range(128), 2)))[:5000]
    near = np.tile(base, (5000, 1))
    np.put_along_axis(near, pairs, 1 - base[pairs], 1)
    assert found(near) == [list(range(5000))]

    apart = random.integers(0, 2, (6000, 128), np.uint8)
    apart[:, :16] = 0  # as of images with a black edge
    apart[5000] = apart[70]
    apart[5000, 20::17] ^= 1
    assert (apart[5000] != apart[70]).sum() == 7
    assert found(apart) == [[70, 5000]]


def test_other_images_do_not_look_alike() -> None:
    pictures = [torch.from_numpy(_noise(i).copy()).permute(2, 0, 1) for i in range(400)]
    assert clusters([look(picture) for picture in pictures]) == []
    darker = (pictures[7].float() * 0.8).byte()
    assert clusters([look(picture) for picture in [*pictures, darker]]) == [[7, 400]]


def test_a_patient_in_two_parts_is_a_leak(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for i, name in enumerate(("train/p1_a", "train/p2_a", "val/p2_b", "val/p3_a")):
        _save(_noise(i), root / f"{name}.png")
    pattern = r"(p\d+)_"
    leak = _diagnose(root, tmp_path, group_pattern=pattern)["by_kind"]["group_leak"]
    assert leak["files"] == {
        name: "p2 is in train and val" for name in ("train/p2_a.png", "val/p2_b.png")
    }
    (root / "val/p2_b.png").rename(root / "val/p4_b.png")
    found = _diagnose(root, tmp_path, group_pattern=pattern)["by_kind"]
    assert list(found) == ["groups"]
    assert "4 groups" in found["groups"]["text"]


def test_suspicious_images(tmp_path: Path) -> None:
    root = _photos(tmp_path / "root", 12)
    _save(np.full((48, 64, 3), 90, np.uint8), root / "plain.png")
    faint = 100 + (np.arange(48 * 64 * 3).reshape(48, 64, 3) % 3)
    _save(faint.astype(np.uint8), root / "faint.png")
    _save(_noise(70, 4, 4), root / "dot.png")
    _save(_noise(71, 40, 300), root / "strip.png")
    _save(_noise(72, 5000, 5000), root / "huge.jpg")
    found = _diagnose(root, tmp_path)["by_kind"]
    assert found["constant"]["files"]["plain.png"] == "one single colour"
    assert "almost one colour" in found["constant"]["files"]["faint.png"]
    assert found["tiny"]["files"] == {"dot.png": "4 x 4 px"}
    assert found["narrow"]["files"] == {"strip.png": "300 x 40 px"}
    assert found["enormous"]["files"] == {"huge.jpg": "5000 x 5000 px"}


def test_what_is_unlike_the_other_files(tmp_path: Path) -> None:
    root = _photos(tmp_path / "root", 30)
    _save(_noise(40)[..., 0], root / "gray.jpg")
    _save((_noise(41)[..., 0].astype(np.uint16) * 200), root / "deep.png")
    found = _diagnose(root, tmp_path)["by_kind"]
    assert found["other_channels"]["files"] == {"deep.png": "gray", "gray.jpg": "gray"}
    assert found["other_depth"]["files"] == {"deep.png": "16 bits a channel"}


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    root = _photos(tmp_path / "root", 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    _save(_noise(20), root / "turned.jpg", exif=exif)
    Image.fromarray(_noise(21)).convert("CMYK").save(root / "print.jpg")
    rgba = np.dstack([_noise(22), np.full((48, 64), 128, np.uint8)])
    _save(rgba, root / "glass.png")
    frames = [Image.fromarray(_noise(i)) for i in (23, 24)]
    frames[0].save(root / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(_noise(25)).save(root / "really.jpg", format="PNG")
    found = _diagnose(root, tmp_path)["by_kind"]
    assert list(found["turned"]["files"]) == ["turned.jpg"]
    assert list(found["cmyk"]["files"]) == ["print.jpg"]
    assert list(found["transparent"]["files"]) == ["glass.png"]
    assert list(found["frames"]["files"]) == ["moving.gif"]
    assert found["ending"]["files"] == {"really.jpg": "is PNG"}


def test_scans_show_their_own_numbers(tmp_path: Path) -> None:
    for i in range(4):
        values = np.linspace(10, 278, 64 * 48).reshape(48, 64)
        _save(values.round().astype(np.uint16) + i, tmp_path / "root" / f"{i}.png")
    found = _diagnose(tmp_path / "root", tmp_path, in_chans=1)
    least, low, middle, high, greatest = found["summary"]["scan_values"]
    assert (least, greatest) == (10, 281)
    assert low < 15
    assert abs(middle - 145.5) < 2
    assert high > 274
    assert "--data.window" in found["text"]


def test_classes_and_their_balance(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _photos(root / "train/many", 44)
    _photos(root / "train/few", 4, first=60)
    _photos(root / "val/many", 3, first=80)
    found = _diagnose(root, tmp_path)["by_kind"]
    assert "few (4)" in found["few"]["text"]
    assert "11 times" in found["imbalance"]["text"]
    assert found["no_validation"]["text"] == "1 class without validation image: few"


def test_labels_of_a_table_stand_for_folders(tmp_path: Path) -> None:
    _photos(tmp_path / "root", 10)
    rows = [f"{i:03d}.jpg,{'cat' if i < 6 else 'dog'}" for i in range(9)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    labels = str(tmp_path / "labels.csv")
    found = _diagnose(tmp_path / "root", tmp_path, labels=labels, val_fraction=0.0)
    assert found["summary"]["classes"] == {"cat": {"train": 6}, "dog": {"train": 3}}
    assert "dog (3)" in found["by_kind"]["few"]["text"]


def test_gray_images_need_one_channel(tmp_path: Path) -> None:
    for i in range(4):
        _save(_noise(i)[..., 0], tmp_path / "root" / f"{i}.png")
    assert (
        "--model.in_chans 1" in _diagnose(tmp_path / "root", tmp_path)["by_kind"]["gray"]["remedy"]
    )
    assert "gray" not in _diagnose(tmp_path / "root", tmp_path, in_chans=1)["by_kind"]


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    root = _photos(tmp_path / "root", 6)
    for name in ("._000.jpg", ".DS_Store", "notes.txt", "photo"):
        (root / name).write_bytes(b"x")
    (root / "nothing").mkdir()
    text = _diagnose(root, tmp_path)["by_kind"]["left_out"]["text"]
    for kind in (
        "macOS ._ files (1)",
        "hidden files (1)",
        "*.txt (1)",
        "files without ending (1)",
        "empty folders (1)",
    ):
        assert kind in text


def test_it_begins_with_the_table_and_warnings_of_the_tasks(tmp_path: Path) -> None:
    for name, first in (("Training/a", 0), ("Training/b", 10), ("Testing/a", 20)):
        _photos(tmp_path / "root" / name, 6, first=first)
    _photos(tmp_path / "root" / "Training", 1, first=30)
    (tmp_path / "root" / "Training" / "plum").mkdir()
    (tmp_path / "root" / "Training" / "plum" / "1.heic").write_bytes(b"x")
    found = _diagnose(tmp_path / "root", tmp_path)
    rows = [line.split() for line in found["text"].splitlines()]
    assert rows[1:3] == [["train", "val", "test"], ["images", "12", "1", "6"]]
    texts = [finding["text"] for finding in found["findings"] if finding["kind"] == "data"]
    assert any("1 of 13 images (030.jpg) lies beside the class folders" in text for text in texts)
    assert any(".heic is not read here (first: plum/)" in text for text in texts)
    assert found["text"].startswith(found["table"])


def test_annotations_are_counted_as_detect_counts_them(tmp_path: Path) -> None:
    for part in ("train", "val"):
        image = np.full((40, 40, 3), 90, np.uint8)
        _save(image, tmp_path / "root" / part / "0.png")
        entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20]}
        table = {
            "images": [{"id": 1, "file_name": "0.png", "width": 40, "height": 40}],
            "annotations": [{**entry, "iscrowd": int(part == "val")}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (tmp_path / "root" / part / "annotations.json").write_text(json.dumps(table))
    told = [
        (finding["level"], finding["text"])
        for finding in _diagnose(tmp_path / "root", tmp_path)["findings"]
        if finding["kind"] == "annotations"
    ]
    (level, warning), (_, table_text) = told
    assert level == "look"
    assert "val has no objects that count" in warning
    assert "iscrowd (first: 0.png, annotation 1)" in warning
    assert "objects" in table_text


def test_images_and_masks_are_pairs_and_no_classes(tmp_path: Path) -> None:
    for part, first in (("train", 0), ("val", 20)):
        _photos(tmp_path / "root" / part / "images", 4, first=first)
        for i in range(first, first + 4):
            mask = np.zeros((48, 64), np.uint8)
            mask[:20] = 255
            _save(mask, tmp_path / "root" / part / "masks" / f"{i:03d}.png")
    found = _diagnose(tmp_path / "root", tmp_path)
    assert found["summary"]["images"] == {"train": 4, "val": 4}
    assert found["summary"]["classes"] == {}
    rows = [line.split() for line in found["by_kind"]["masks"]["text"].splitlines()]
    assert ["images", "4", "4"] in rows
    assert {row[0] for row in rows} >= {"0", "255"}  # the classes, with their pixels
    assert "constant" not in found["by_kind"]
    (tmp_path / "root/train/masks/000.png").unlink()
    assert _diagnose(tmp_path / "root", tmp_path)["by_kind"]["masks"]["level"] == "bad"


@pytest.mark.exhaustive
def test_a_packed_folder_is_read_like_the_folder(tmp_path: Path) -> None:
    from simmim.data.pack import pack

    root = tmp_path / "root"
    for name in ("cat", "dog"):
        _photos(root / name, 8, first=50 * (name == "dog"))
    pack(str(root), str(tmp_path / "packed"), format="original", workers=0)
    plain, packed = (_diagnose(path, tmp_path) for path in (root, tmp_path / "packed"))
    for key in ("images", "classes", "mean", "width", "formats"):
        assert plain["summary"][key] == packed["summary"][key]


@pytest.mark.exhaustive
def test_classes_are_counted_whole_where_a_sample_is_looked_at(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        _photos(tmp_path / "root" / name, 30, first=50 * (name == "dog"))
    whole = _diagnose(tmp_path / "root", tmp_path)
    found = _diagnose(tmp_path / "root", tmp_path, sample=2)
    assert "looked at" in found["text"]
    assert found["summary"]["classes"] == whole["summary"]["classes"]
    assert found["summary"]["classes"]["cat"] == {"train": 27, "val": 3}
    assert found["summary"]["images"] == {"train": 54, "val": 6}
    assert not any(finding["kind"] == "few" for finding in found["findings"])


# Workers ------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_killed_worker_names_its_item_and_nothing_else_is_lost() -> None:
    results = dict(
        run_all(square, range(40), 2, lambda n, why: (n, why), patience=1.0)  # type: ignore
    )
    assert len(results) == 40
    assert results.pop(5) == (5, "it ends the process that reads it (SIGKILL)")
    assert results.pop(9) == (9, "it ends the process that reads it (exit status 3)")
    assert results.pop(20) == (20, "to read it takes more than 1 seconds")
    assert results == {n: n * n for n in range(40) if n not in (5, 9, 20)}


@pytest.mark.exhaustive
def test_spawned_workers_do_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _photos(tmp_path / "root", 12)
    here = _diagnose(root, tmp_path)
    spawn = get_context("spawn")
    monkeypatch.setattr("simmim.commands.doctor.workers.worker_context", lambda *sent: spawn)
    there = _diagnose(root, tmp_path)
    for found in (here, there):
        found["summary"].pop("images_per_s")
    assert here["summary"] == there["summary"]


def test_an_error_of_ours_is_no_fault_of_a_file() -> None:
    with pytest.raises(KeyError):
        list(run_all(wrong, range(3), 1, lambda n, why: 0))


def test_a_file_that_kills_its_reader_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simmim.commands.doctor.command.Inspector", Fatal)
    found = _diagnose(_photos(tmp_path / "root", 12), tmp_path, workers=2)
    files = found["by_kind"]["unreadable"]["files"]
    assert files == {"005.jpg": "it ends the process that reads it (SIGKILL)"}
    assert found["summary"]["readable"] == 11


def test_a_folder_without_one_readable_image_is_still_described(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for i in range(3):
        (root / f"{i}.jpg").write_bytes(b"no image")
    found = _diagnose(root, tmp_path, estimate=True)
    assert found["summary"]["readable"] == 0
    assert found["cost"] is None
    assert "no image could be read" in found["text"]
    assert (found["out"] / "contact_sheet.png").exists()


# Pictures, sizes, costs ---------------------------------------------------------------------------


def test_a_sheet_keeps_narrow_and_gray_and_missing_pictures() -> None:
    narrow = np.full((SIDE, 3, 1), 7, np.uint8)
    sheet = draw_sheet([Row("a\nb", [Tile(narrow, "x" * 99 + "\n" + "why " * 99), Tile(None, "")])])
    middle = np.asarray(sheet)[GAP + 24 + SIDE // 2, GAP + SIDE // 2]
    assert middle.tolist() == [7, 7, 7]


def test_the_contact_sheet_has_a_row_for_each_class_and_finding(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("cat", "dog"):
        _photos(root / name, 10, first=50 * (name == "dog"))
    (root / "cat/bad.jpg").write_bytes(b"")
    with Image.open(_diagnose(root, tmp_path)["out"] / "contact_sheet.png") as sheet:
        assert sheet.width == COLUMNS * (SIDE + GAP) + GAP
        rows = sheet.height // (SIDE + GAP)
        assert rows >= 5  # cat and dog, of training and validation, and the file that is bad
        assert len(np.unique(np.asarray(sheet))) > 50


TINY = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 32,
    "mask_patch_size": 8,
    "encoder_kwargs": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
}


def test_sizes_are_those_that_the_model_can_be_built_with() -> None:
    sizes = fitting_sizes(SimMIM(**TINY), TINY, 70)  # type: ignore[arg-type]
    assert (sizes.stride, sizes.token) == (4, 4)
    assert sizes.legal == [32, 48, 64]
    assert sizes.img_size_advice == 64
    assert list(sizes.cells) == [4, 8, 16]
    assert sizes.cells[4] < sizes.cells[8] < sizes.cells[16]
    assert sizes.cell_advice == 4
    # Each legal cell is one indeed, and what is between is not.
    for cell in (4, 8, 16):
        SimMIM(**{**TINY, "mask_patch_size": cell})
    with pytest.raises(ValueError, match="mask_patch_size 6"):
        SimMIM(**{**TINY, "mask_patch_size": 6})


def test_the_paper_s_setting_fits_the_paper_s_rule() -> None:
    options = {"encoder": "vit_tiny_patch16_224", "img_size": 192, "encoder_kwargs": {"depth": 1}}
    sizes = fitting_sizes(SimMIM(**options), options, 200)  # type: ignore[arg-type]
    assert sizes.cells[32] == pytest.approx(15.3, abs=0.5)  # README: 15.3 at a ratio of 0.6
    assert sizes.cell_advice == 32


def test_costs_are_measured_by_real_steps(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(
        json.dumps({"model": TINY, "data": {"batch_size": 4}, "trainer": {"max_epochs": 7}})
    )
    root = _photos(tmp_path / "root", 10)
    found = _diagnose(root, tmp_path, estimate=True, config=str(config), estimate_seconds=10)
    cost, model = found["cost"], SimMIM(**TINY)  # type: ignore[arg-type]
    numbers = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost["problem"] == ""
    assert cost["parameters"] == numbers
    assert cost["measured_batch"] == 4
    assert cost["images_per_s"] > 0
    assert cost["memory_mb"] == cost["peak_mb"] > 50
    # AdamW: value and gradient, two moments, and a step that is one number for each tensor.
    assert cost["state_mb"] == pytest.approx((numbers + 3 * trained) * 4 / 1e6, rel=0.02)
    assert found["epochs"] == 7
    assert "7 epochs of 9 images" in found["text"]
    assert "an estimate" in found["text"]


def test_images_smaller_than_img_size_are_said(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps({"model": {**TINY, "img_size": 96}, "data": {"batch_size": 1}}))
    root = _photos(tmp_path / "root", 10)
    found = _diagnose(root, tmp_path, estimate=True, config=str(config), estimate_seconds=0)
    assert "enlarges the images" in found["by_kind"]["enlarged"]["text"]
    assert "--model.img_size 48" in found["by_kind"]["enlarged"]["remedy"]


# Commands -----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_run_of_its_own_folder(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _photos(Path("root"), 6)
    simmim("doctor --root root --estimate false")
    simmim("doctor --root root --estimate false -c digits")
    assert "6 (5 train, 1 val)" in capsys.readouterr().out
    for n in (0, 1):
        names = {path.name for path in Path(f"runs/doctor/version_{n}").iterdir()}
        assert names == {"doctor.json", "contact_sheet.png", "quarantine.txt", "report.html"}


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("--root nowhere", "--root 'nowhere' does not exist"),
        ("--root empty", "holds no images"),
        ("--root root --out root", "--out root holds something"),
        ("--root root -c swin_bas", "did you mean"),
        ("--root root --workers 0", "--workers 0 is too small"),
        ("--root root --group_pattern p", "--group_pattern 'p' has no group"),
        ("--root root --grup_pattern p", "did you mean --group_pattern"),
        ("", "--root must be given"),
    ],
)
def test_mistakes_are_one_sentence(
    args: str, sentence: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _photos(Path("root"), 3)
    Path("empty").mkdir()
    assert sentence in refused(capsys, f"doctor {args}", alone=True)
    assert not Path("runs").exists()
