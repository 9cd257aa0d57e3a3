"""What is kept of large folders: the same as a fresh look, up to date, shared by workers."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simmim.base.files import beside
from simmim.data import ImageFolderData, index_cache, labels, pairs
from simmim.data.classification import ClassificationData, LabelledImages
from simmim.data.dataset import ImageData, Loader, collate
from simmim.data.index import FileIndex, scan
from simmim.data.index_cache import read_index
from simmim.data.labels import label_files
from simmim.data.layout import read_parts
from simmim.data.mapped import cache_folder, open_tensors, write_tensors
from simmim.data.segmentation import SegmentationData
from simmim.data.transforms import CenterCrop
from support.commands import assert_same_tensors
from support.folders import save
from support.processes import end, start

TEXT = "path,label\na/0.png,x;y\na/1.png,\nb/2.png,y|z\nelsewhere.png,x\n"


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "WORTH", 1)


def settle(place: Path) -> Path:
    """Let files and folders have been changed an hour ago."""
    hour_ago = time.time() - 3600
    for path in (place, *place.rglob("*")):
        if path.exists():
            os.utime(path, (hour_ago, hour_ago))
    return place


def fill(root: Path, n: int) -> Path:
    """Empty files of two classes, in folders that were last changed an hour ago."""
    for i in range(n):
        file = root / "ab"[i % 2] / "deep" / f"a rather long name {i}é.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return settle(root)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fill(tmp_path / "root", 40)


def names(index: FileIndex) -> list[str]:
    return list(index.all_names())


def fresh(root: Path) -> list[str]:
    return names(scan(str(root)))


def kept() -> list[Path]:
    folder = cache_folder()
    assert folder is not None
    return sorted(folder.glob("*"))


def never(*_: object, **__: object) -> None:
    raise AssertionError("it was read once more")


def is_kept(root: Path) -> bool:
    """Whether the index is opened and the folder not read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_cache, "visit_folders", never)
        try:
            read_index(str(root))
        except AssertionError:
            return False
    return True


def split(root: Path, *options: Any) -> dict[str, list[int]]:
    parts = read_parts(str(root), *(options or (0.2,)))
    return {name: part.places.tolist() for name, part in parts.items()}


def test_an_unchanged_folder_is_not_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a" / "1.heic").touch()
    settle(root)
    new, first = scan(str(root)), read_index(str(root))
    assert [one.count for one in new.left_out] == [1]
    monkeypatch.setattr(index_cache, "visit_folders", never)
    for index in (first, read_index(str(root))):
        assert names(index) == names(new) == [new.name(i) for i in range(len(new))]
        assert torch.equal(index.starts, new.starts)
        assert index.labels is not None
        assert new.labels is not None
        assert index.labels.tolist() == new.labels.tolist()
        assert (index.classes, index.suffixes) == (new.classes, new.suffixes)
        assert (list(index.left_out), index.hint) == (list(new.left_out), new.hint)
        assert index.path(3) == new.path(3)
    monkeypatch.chdir(root.parent)  # a relative path is the same folder
    assert read_index("root").path(0) == os.path.join("root", *new.name(0).split("/"))


def add_as_in_a_copy(root: Path) -> None:
    """Set the time back, as rsync -a and tar do."""
    status = (root / "a/deep").stat()
    time.sleep(0.02)  # a tick of the clock that stamps files
    (root / "a/deep/new.png").touch()
    os.utime(root / "a/deep", ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "add": lambda root: (root / "a/deep/new.png").touch(),
    "remove": lambda root: min((root / "a/deep").iterdir()).unlink(),
    "rename": lambda root: min((root / "a/deep").iterdir()).rename(root / "a/deep/zero.png"),
    "add a folder": lambda root: save(root / "c" / "1.png", np.zeros((2, 2))),
    "fill an empty folder": lambda root: (root / "empty/1.png").touch(),
    "remove a folder": lambda root: shutil.rmtree(root / "b"),
    "rename a folder": lambda root: (root / "b").rename(root / "c"),
}
if sys.platform != "win32":  # where no time of a change of status is known
    CHANGES["add, and set the time back"] = add_as_in_a_copy


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_noticed(root: Path, change: str) -> None:
    (root / "empty").mkdir()
    before, options = names(read_index(str(settle(root)))), (0.2, 3, None)
    split(root, *options)
    assert is_kept(root)
    CHANGES[change](root)
    assert names(read_index(str(root))) == fresh(root) != before
    changed = split(root, *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMMIM_CACHE", "off")
        assert split(root, *options) == changed


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_changed_folder_behind_a_link_is_noticed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "1.png").touch()
    (root / "c").symlink_to(tmp_path / "disk")
    (root / "d").symlink_to(tmp_path / "other")  # not there yet
    settle(root)
    settle(tmp_path / "disk")
    assert len(read_index(str(root))) == 41
    assert is_kept(root)
    (tmp_path / "disk" / "2.png").touch()
    assert len(read_index(str(root))) == 42
    settle(tmp_path / "disk")
    assert len(read_index(str(root))) == 42
    assert is_kept(root)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "3.png").touch()
    assert len(read_index(str(root))) == 43


def test_what_is_not_kept(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = split(root)
    shutil.rmtree(str(cache_folder()))
    with monkeypatch.context() as patch:
        patch.setattr(index_cache, "WORTH", 41)  # a small folder
        assert split(root) == want
    assert not cache_folder().exists()  # type: ignore[union-attr]
    (tmp_path / "file").touch()
    for place in (str(tmp_path / "file" / "below"), "off"):  # nothing can be written, or shall be
        with monkeypatch.context() as patch:
            patch.setenv("SIMMIM_CACHE", place)
            for _ in range(2):
                assert names(read_index(str(root))) == fresh(root)
                assert split(root) == want
    CHANGES["add"](root)  # just now, and perhaps once more in the same tick
    read_index(str(root))
    assert kept() == []


def test_a_damaged_cache_is_made_anew(root: Path) -> None:
    want = split(root)
    assert len(kept()) == 2  # the index and its split
    for damage in (lambda data: data[:-9], lambda data: os.urandom(len(data)), lambda data: b""):
        for file in kept():
            data = file.read_bytes()
            file.unlink()  # never changed in place: it is mapped
            file.write_bytes(damage(data))
        assert split(root) == want
        assert is_kept(root)
    (file,) = (file for file in kept() if file.name.startswith("index"))
    tensors, notes = open_tensors(file)
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["starts"] += 10**6  # a whole file, whose arrays do not fit together
    file.unlink()
    write_tensors(file, changed, notes)
    assert names(read_index(str(root))) == fresh(root)


def print_split(root: Path) -> None:
    """Print the split that this process reads."""
    index_cache.WORTH = 1
    print(f"\n{split(root)}")  # what else is said comes before it


@pytest.mark.slow
def test_processes_may_write_it_at_the_same_time(root: Path, workdir: Path) -> None:
    runs = [start(print_split, root, log=log) for log in ("1", "2")]
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(lambda _: names(read_index(str(root))), range(40)))
    assert all(index == fresh(root) for index in indexes)
    end(*runs, logs=("1", "2"))
    for log in ("1", "2"):
        assert Path(log).read_text().splitlines()[-1] == str(split(root))
    assert [file.suffix for file in kept()] == [".safetensors"] * 2  # nothing half written


def test_each_share_seed_and_pattern_has_a_split_of_its_own(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [(0.2, 0, None), (0.4, 0, None), (0.2, 1, None), (0.2, 0, r"(\d)é")]
    written, opened = ([split(root, *each)["val"] for each in options] for _ in range(2))
    monkeypatch.setenv("SIMMIM_CACHE", "off")
    assert written == opened == [split(root, *each)["val"] for each in options]
    assert len({tuple(places) for places in written}) == 4


def test_roots_do_not_collide_and_may_be_moved(root: Path, tmp_path: Path) -> None:
    other, old = tmp_path / "other", tmp_path / "old"
    shutil.copytree(root, other)
    CHANGES["add"](other)
    assert names(read_index(str(settle(other)))) != names(read_index(str(root)))
    root.rename(old)
    other.rename(root)  # at a path that the cache knows
    for place in (root, old):
        assert names(read_index(str(place))) == fresh(place)


def test_what_nobody_uses_is_deleted(root: Path) -> None:
    folder = cache_folder()
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    old, new = (folder / f"index-{i}.safetensors" for i in (1, 2))
    half = beside(folder / "index-3.safetensors")
    for file, days in ((old, 100), (new, 80), (half, 2)):
        file.touch()
        os.utime(file, (time.time() - days * 86400,) * 2)
    read_index(str(root))
    assert (old.exists(), new.exists(), half.exists()) == (False, True, False)


def test_one_process_of_a_machine_reads_the_folder_for_all(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(ImageFolderData, "_process", lambda self: (2, 0))
    ImageFolderData(str(root)).prepare_data()
    assert len(kept()) == 2
    with monkeypatch.context() as patch:
        patch.setattr(index_cache, "visit_folders", never)
        other = ImageFolderData(str(root))
        other.setup("fit")
    assert other.num_train == 36
    empty = ImageFolderData(str(tmp_path / "empty"))  # said by all processes: none waits
    empty.prepare_data()
    with pytest.raises(ValueError, match="holds no images"):
        empty.setup("fit")


# What workers get ---------------------------------------------------------------------------------


class Names(ImageData):
    """Images whose pixels are of no interest."""

    def read(self, index: int) -> Tensor:
        return torch.full((3, 4, 4), len(self.name(index)), dtype=torch.uint8)


class Listed(Names, LabelledImages):
    """With labels out of a table."""


def data_of(root: Path, kind: Any = Names) -> Any:
    part = read_parts(str(root), 0.2)["train"]
    return kind(part.files, CenterCrop((4, 4)), part.places)


def pickled(data: ImageData) -> bytes:
    """What a spawned worker is sent, but for what goes through shared memory."""
    data.unreadable = torch.empty(0)
    buffer = BytesIO()
    ForkingPickler(buffer).dump(data)
    return buffer.getvalue()


def test_a_pickled_data_set_holds_neither_names_nor_labels(tmp_path: Path) -> None:
    root, table = fill(tmp_path / "root", 1000), tmp_path / "labels.csv"
    index = read_index(str(root))
    rows = "".join(f"{name},{i % 100};{i % 7}\n" for i, name in enumerate(index.all_names()))
    table.write_text(f"path,label\n{rows}")
    settle(tmp_path)
    data = data_of(root, Listed)
    ((data.table, data.rows),) = label_files(str(table), [data.files], str(root), several=True)
    assert len(pickled(data)) < 6000
    loaded = ForkingPickler.loads(pickled(data))
    for i in (0, 7, 799):
        assert loaded.name(i) == data.name(i)
        assert torch.equal(loaded[i]["label"], data[i]["label"])


def test_a_file_written_anew_does_not_change_what_is_mapped(root: Path) -> None:
    data = data_of(root)
    before = list(data.all_names())
    CHANGES["add"](root)
    read_index(str(settle(root)))
    assert list(ForkingPickler.loads(pickled(data)).all_names()) == before


@pytest.mark.exhaustive
def test_workers_that_are_spawned_read_the_same(root: Path) -> None:
    """As on macOS and Windows, where workers import everything anew."""
    batches = []
    for options in ({}, {"num_workers": 2, "multiprocessing_context": "spawn"}):
        loader: Any = Loader(data_of(root), batch_size=8, collate_fn=collate, **options)
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert_same_tensors(one, other)


# Labels -------------------------------------------------------------------------------------------


def label(root: Path) -> dict[str, list[str]]:
    """The labels of each file that a table lists."""
    options = {"multi_label": True, "val_fraction": 0, "img_size": 8, "num_workers": 0}
    table = str(root.parent / "labels.csv")
    data = ClassificationData(root=str(root), labels=table, **options)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="images of training are not in"):
        data.setup("fit")
    images = data.sets["training"]
    found = {images.name(i): images[i]["label"].nonzero().flatten() for i in range(len(images))}
    return {name: [data.classes[i] for i in places] for name, places in found.items()}


def test_a_table_is_read_again_where_it_or_the_folder_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, table = tmp_path / "listed", tmp_path / "labels.csv"
    for name in ("a/0.png", "a/1.png", "b/2.png", "b/3.png"):
        save(root / name, np.zeros((8, 8, 3)))
    table.write_text(TEXT)
    want = {"a/0.png": ["x", "y"], "a/1.png": [], "b/2.png": ["y", "z"]}
    settle(root)
    assert label(root) == want
    assert not [file for file in kept() if "labels" in file.name]  # it changed just now
    settle(tmp_path)
    assert label(root) == want
    with monkeypatch.context() as patch:
        patch.setattr(labels, "read_labels", never)
        assert label(root) == want
        patch.undo()
        patch.setenv("SIMMIM_CACHE", "off")
        assert label(root) == want
    save(root / "b" / "1.png", np.zeros((8, 8, 3)))
    assert label(root) == want
    if sys.platform == "win32":  # no time of a change of status there
        return
    before = table.stat()
    time.sleep(0.02)  # a tick of the clock that stamps files
    table.write_text(TEXT.replace("y|z", "x|z"))
    os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync -a and tar do
    assert label(root) == {**want, "b/2.png": ["x", "z"]}


def test_many_labels_take_the_memory_of_those_that_are_there(tmp_path: Path) -> None:
    """Present or absent for each of 5,000 labels would be 100 MB."""
    table = tmp_path / "labels.csv"
    rows = "".join(f"{i}.png,label {i // 4:04d}\n" for i in range(20_000))
    table.write_text(f"path,label\n{rows}")
    found = labels.read_labels(str(table), several=True).table
    assert len(found.classes) == 5000
    assert found.starts.numel() + found.numbers.numel() == 40_001
    assert found.frequencies(torch.arange(10, 20)) == [0] * 2 + [2, 4, 4] + [0] * 4995


# Masks --------------------------------------------------------------------------------------------


def test_masks_are_found_once_and_missed_when_they_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        save(tmp_path / "images" / f"{i}.png", np.zeros((8, 8, 3)))
        save(tmp_path / "masks" / f"{i}.png", np.full((8, 8), i % 2))
    settle(tmp_path)

    def stems() -> list[tuple[str, str]]:
        data = SegmentationData(str(tmp_path), img_size=8, num_workers=0, val_fraction=0)
        data.setup("fit")
        images = data.sets["training"]
        found = [(images.path(i), images.mask_path(i)) for i in range(len(images))]
        return [(Path(image).stem, Path(mask).stem) for image, mask in found]

    want = [(str(i), str(i)) for i in range(6)]
    assert stems() == want
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "_find_partners", never)
        assert stems() == want
    (tmp_path / "masks" / "3.png").unlink()
    with pytest.raises(ValueError, match="1 of 6 images have no mask"):
        stems()
