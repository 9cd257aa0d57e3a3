"""Labels and masks of large folders: kept like the index, noticed when changed, shared by all."""

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from io import BytesIO
from multiprocessing import active_children
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simmim.data import index_cache, labels, pairs
from simmim.data.classification import ClassificationData, LabelledImages
from simmim.data.dataset import Loader, collate
from simmim.data.index import FileIndex
from simmim.data.index_cache import read_index
from simmim.data.labels import label_files
from simmim.data.mapped import MappedTensor
from simmim.data.segmentation import SegmentationData
from simmim.data.transforms import CenterCrop

startup = import_module("simmim.benchmark.startup")  # the package has the function by that name

TEXT = "path,label\na/0.png,x;y\na/1.png,\nb/2.png,y|z\nelsewhere.png,x\n"


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "WORTH", 1)


def settle(place: Path) -> Path:
    """Let files and folders have been changed an hour ago."""
    hour_ago = time.time() - 3600
    for path in (place, *place.rglob("*")):
        os.utime(path, (hour_ago, hour_ago))
    return place


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/0.png", "a/1.png", "b/2.png", "b/3.png"):
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(file)
    (tmp_path / "labels.csv").write_text(TEXT)
    return settle(tmp_path) / "root"


def label(root: Path) -> tuple[list[list[str]], bool]:
    """The labels of each file, and whether they come from the cache."""
    table = root.parent / "labels.csv"
    ((found, rows),) = label_files(str(table), [read_index(str(root))], str(root), several=True)
    names = []
    for row in rows.tolist():
        present = found.presence(row).nonzero().flatten().tolist() if row >= 0 else []
        names.append([found.classes[i] for i in present] if row >= 0 else ["not listed"])
    return names, isinstance(rows, MappedTensor)


EXPECTED = [["x", "y"], [], ["y", "z"], ["not listed"]]


def never(*_: object, **__: object) -> None:
    raise AssertionError("it was read once more")


def test_a_table_that_has_not_changed_is_not_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert label(root) == (EXPECTED, True)
    monkeypatch.setattr(labels, "read_labels", never)
    assert label(root) == (EXPECTED, True)


def change_the_table(root: Path) -> list[list[str]]:
    (root.parent / "labels.csv").write_text(TEXT.replace("x;y", "z;y"))
    return [["y", "z"], *EXPECTED[1:]]


def change_the_table_keep_its_time(root: Path) -> list[list[str]]:
    table = root.parent / "labels.csv"
    before = table.stat()
    time.sleep(0.02)  # a tick of the clock that stamps files
    change_the_table(root)
    os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync -a and tar do
    return [["y", "z"], *EXPECTED[1:]]


def add_a_file(root: Path) -> list[list[str]]:
    (root / "b" / "1.png").touch()
    return [*EXPECTED[:2], ["not listed"], *EXPECTED[2:]]


@pytest.mark.parametrize("change", [change_the_table, change_the_table_keep_its_time, add_a_file])
def test_what_has_changed_is_noticed(root: Path, change: Callable[[Path], list[list[str]]]) -> None:
    if change is change_the_table_keep_its_time and sys.platform == "win32":
        pytest.skip("no time of the last change of a file itself there")
    label(root)
    expected = change(root)
    assert label(root)[0] == expected


def test_a_table_that_changed_just_now_is_not_kept(root: Path) -> None:
    (root.parent / "labels.csv").touch()
    assert label(root) == (EXPECTED, False)


@pytest.mark.parametrize("damage", [{"rows": 99}, {"numbers": 3}, {"starts": 9}])
def test_damaged_labels_are_made_anew(root: Path, damage: dict[str, int]) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    label(root)
    cache = index_cache.cache_folder()
    assert cache is not None
    (file,) = cache.glob("labels-*")
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, value in damage.items():
        tensors[name][-1] = value
    file.unlink()
    save_file(tensors, file, notes)
    assert label(root)[0] == EXPECTED


def test_labels_are_the_same_with_and_without_a_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (None, None, "off"):  # written, opened, none
        if place:
            monkeypatch.setenv("SIMMIM_CACHE", place)
        data = ClassificationData(
            root=str(root),
            labels=str(root.parent / "labels.csv"),
            multi_label=True,
            val_fraction=0,
            img_size=8,
            num_workers=0,
        )
        with pytest.warns(UserWarning, match="1 images of training are not in"):
            data.setup("fit")
        training = data.sets["training"]
        assert [training[i]["label"].tolist() for i in range(3)] == [
            [1, 1, 0],
            [0, 0, 0],
            [0, 1, 1],
        ]
        assert data.class_counts == [1, 2, 1]


def test_many_labels_take_the_memory_of_those_that_are_there(tmp_path: Path) -> None:
    """Present or absent for each of 5,000 labels would be 100 MB."""
    table = tmp_path / "labels.csv"
    table.write_text(
        "path,label\n" + "".join(f"{i}.png,label {i // 4:04d}\n" for i in range(20_000))
    )
    found = labels.read_labels(str(table), several=True).table
    assert len(found.classes) == 5000
    assert found.starts.numel() + found.numbers.numel() == 40_001
    assert found.frequencies(torch.arange(10, 20)) == [0] * 2 + [2, 4, 4] + [0] * 4995


# Memory ------------------------------------------------------------------------------------------


class Labelled(LabelledImages):
    """Labels alone."""

    def read(self, index: int) -> Tensor:
        return torch.zeros(3, 1, 1, dtype=torch.uint8)


def labelled(folder: Path, n: int) -> tuple[Labelled, FileIndex]:
    startup._simulate(folder, n)
    index = read_index(str(folder))
    table = folder.parent / f"{n}.csv"
    rows = "".join(f"{name},{i % 100};{i % 7}\n" for i, name in enumerate(index.all_names()))
    table.write_text(f"path,label\n{rows}")
    os.utime(table, (time.time() - 3600,) * 2)
    ((found, numbers),) = label_files(str(table), [index], str(folder), several=True)
    data = Labelled(index, CenterCrop((1, 1)))
    data.table, data.rows = found, numbers
    return data, index


@pytest.mark.skipif(not startup.ROLLUP.exists(), reason="memory is measured on Linux alone")
def test_a_worker_takes_no_memory_for_each_row(tmp_path: Path) -> None:
    """A list of paths and labels would be copied into it: 50 MB for 200,000 rows."""
    # Both first: workers share what this process has left of making them.
    made = {n: labelled(tmp_path / str(n), n)[0] for n in (10_000, 200_000)}
    taken = []
    for n, data in made.items():
        loader: Loader[dict[str, Tensor]] = Loader(
            data,
            batch_size=500,
            sampler=range(0, n, n // 10_000),
            num_workers=1,
            collate_fn=collate,
            multiprocessing_context="fork",
            persistent_workers=True,
        )
        others = {child.pid for child in active_children()}  # of tests before this one
        for _ in loader:  # touches all pages
            pass
        (worker,) = (child for child in active_children() if child.pid not in others)
        taken.append(startup.memory_of(worker.pid).shared_out)
        del loader
    print(taken)
    mapped = sum(t.numel() * t.element_size() for t in (data.table.starts, data.rows)) / 1e6
    assert mapped > 3
    assert taken[1] - taken[0] < 12  # MB: half of the pages that it shares, names among them


def test_a_pickled_data_set_holds_no_labels(tmp_path: Path) -> None:
    data, _ = labelled(tmp_path / "many", 20_000)
    data.unreadable = torch.empty(0)
    buffer = BytesIO()
    ForkingPickler(buffer).dump(data)
    assert len(buffer.getvalue()) < 5000
    again = ForkingPickler.loads(buffer.getvalue())
    assert torch.equal(again[123]["label"], data[123]["label"])


# Masks -------------------------------------------------------------------------------------------


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    for i in range(6):
        for name, mode in (("images", "RGB"), ("masks", "L")):
            file = tmp_path / "masked" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8), i % 2, np.uint8)
            Image.fromarray(pixels).convert(mode).save(file)
    return settle(tmp_path / "masked")


def mask_of_each(root: Path) -> list[tuple[str, str]]:
    data = SegmentationData(str(root), img_size=8, num_workers=0, val_fraction=0)
    data.setup("fit")
    training = data.sets["training"]
    found = [(training.path(i), training.mask_path(i)) for i in range(len(training))]
    return [(Path(image).stem, Path(mask).stem) for image, mask in found]


def test_masks_are_found_once(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mask_of_each(masked) == [(str(i), str(i)) for i in range(6)]
    monkeypatch.setattr(pairs, "_find_partners", never)
    assert mask_of_each(masked) == [(str(i), str(i)) for i in range(6)]


def test_a_mask_that_is_gone_is_noticed(masked: Path) -> None:
    mask_of_each(masked)
    (masked / "masks" / "3.png").unlink()
    with pytest.raises(ValueError, match="1 of 6 images have no mask"):
        mask_of_each(masked)


def test_a_kept_pairing_of_another_size_is_made_anew(
    masked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = mask_of_each(masked)
    cache = index_cache.cache_folder()
    assert cache is not None
    (file,) = cache.glob("pairs-*")
    file.unlink()
    index_cache.write_tensors(file, {"partners": torch.arange(7)}, {})
    assert mask_of_each(masked) == want
