"""The kept index: the same as a fresh one, up to date, shared by workers, and never in the way."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from simmim.data import ImageFolderData, index_cache
from simmim.data.dataset import ImageData, Loader, collate
from simmim.data.index import FileIndex, scan
from simmim.data.index_cache import read_index
from simmim.data.layout import read_parts
from simmim.data.mapped import MappedTensor, cache_folder
from simmim.data.transforms import CenterCrop
from simmim.durable import beside


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "WORTH", 1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(40):
        file = tmp_path / "root" / "ab"[i % 2] / "deep" / f"{i}é.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return settle(tmp_path / "root")


def settle(root: Path) -> Path:
    """Let the folders have been changed an hour ago."""
    hour_ago = time.time() - 3600
    for folder, _, _ in os.walk(root):
        os.utime(folder, (hour_ago, hour_ago))
    return root


def names(index: FileIndex) -> list[str]:
    return list(index.all_names())


def is_kept(index: FileIndex) -> bool:
    return isinstance(index.names, MappedTensor)


def kept() -> list[Path]:
    folder = cache_folder()
    assert folder is not None
    return sorted(folder.glob("*"))


def never(_: str) -> None:
    raise AssertionError("the folder was read once more")


def test_an_unchanged_folder_is_not_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "a" / "1.heic").touch()
    settle(root)
    fresh, first = scan(str(root)), read_index(str(root))
    assert [one.count for one in fresh.left_out] == [1]
    monkeypatch.setattr(index_cache, "visit_folders", never)
    second = read_index(str(root))
    for index in (first, second):
        assert is_kept(index)
        assert names(index) == names(fresh) == [fresh.name(i) for i in range(len(fresh))]
        assert torch.equal(index.starts, fresh.starts)
        assert index.labels is not None
        assert fresh.labels is not None
        assert index.labels.tolist() == fresh.labels.tolist()
        assert (index.classes, index.suffixes) == (fresh.classes, fresh.suffixes)
        assert (list(index.left_out), index.hint) == (list(fresh.left_out), fresh.hint)
        assert index.path(3) == fresh.path(3)


def add(root: Path) -> None:
    (root / "a" / "deep" / "new.png").touch()


def remove(root: Path) -> None:
    (root / "a" / "deep" / "0é.png").unlink()


def rename(root: Path) -> None:
    (root / "a" / "deep" / "0é.png").rename(root / "a" / "deep" / "zero.png")


def add_folder(root: Path) -> None:
    (root / "c").mkdir()
    (root / "c" / "1.png").touch()


def fill_an_empty_folder(root: Path) -> None:
    (root / "empty" / "1.png").touch()


def remove_folder(root: Path) -> None:
    shutil.rmtree(root / "b")


def rename_folder(root: Path) -> None:
    (root / "b").rename(root / "c")


@pytest.mark.parametrize(
    "change",
    [add, remove, rename, add_folder, fill_an_empty_folder, remove_folder, rename_folder],
)
def test_a_changed_folder_is_noticed(root: Path, change: Callable[[Path], None]) -> None:
    (root / "empty").mkdir()
    before = names(read_index(str(settle(root))))
    assert is_kept(read_index(str(root)))
    change(root)
    after = read_index(str(root))
    assert names(after) == names(scan(str(root))) != before


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_changed_folder_behind_a_link_is_noticed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "1.png").touch()
    (root / "c").symlink_to(tmp_path / "disk")
    (root / "d").symlink_to(tmp_path / "other")  # not there yet
    settle(root)
    settle(tmp_path / "disk")
    assert len(read_index(str(root))) == 41
    assert is_kept(read_index(str(root)))
    (tmp_path / "disk" / "2.png").touch()
    assert len(read_index(str(root))) == 42
    settle(tmp_path / "disk")
    assert is_kept(read_index(str(root)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "3.png").touch()
    assert len(read_index(str(root))) == 43


def test_times_set_back_by_a_copy_are_noticed(root: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("no time of the last change of a folder itself there")
    read_index(str(root))
    folder = root / "a" / "deep"
    status = folder.stat()
    time.sleep(0.02)  # a tick of the clock that stamps files
    (folder / "new.png").touch()
    os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync -a and tar do
    assert "a/deep/new.png" in names(read_index(str(root)))


def test_a_folder_that_changed_just_now_is_not_kept(root: Path) -> None:
    (root / "a" / "deep" / "new.png").touch()
    assert not is_kept(read_index(str(root)))
    assert kept() == []


def test_small_folders_are_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "WORTH", 41)
    assert not is_kept(read_index(str(root)))
    assert "val" in read_parts(str(root), 0.2)
    assert kept() == []


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "foreign"])
def test_a_damaged_cache_is_made_anew(root: Path, damage: str) -> None:
    want = {part: found.places.tolist() for part, found in read_parts(str(root), 0.2).items()}
    assert len(kept()) == 2  # the index and its split
    for file in kept():
        data = file.read_bytes()
        file.unlink()  # never changed in place: it is mapped
        file.write_bytes(
            {"empty": b"", "cut": data[:-9], "noise": os.urandom(len(data)), "foreign": b"{}" * 99}[
                damage
            ]
        )
    parts = read_parts(str(root), 0.2)
    assert {part: found.places.tolist() for part, found in parts.items()} == want
    assert is_kept(read_index(str(root)))


def test_arrays_that_do_not_fit_are_refused(root: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    read_index(str(root))
    (file,) = kept()
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file({**tensors, "starts": tensors["starts"] + 10**6}, file, notes)
    assert names(read_index(str(root))) == names(scan(str(root)))


def test_processes_may_write_it_at_the_same_time(root: Path) -> None:
    code = (
        "import sys; from simmim.data import index_cache; index_cache.WORTH = 1\n"
        "from simmim.data.layout import read_parts\n"
        "print(read_parts(sys.argv[1], 0.2)['val'].places.tolist())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(lambda _: names(read_index(str(root))), range(40)))
    assert all(index == names(scan(str(root))) for index in indexes)
    said = [run.communicate()[0] for run in runs]
    assert said[0] == said[1] != b""
    assert [run.returncode for run in runs] == [0, 0]
    assert [file.suffix for file in kept()] == [".safetensors"] * 2  # nothing half written


def test_it_works_where_nothing_can_be_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in (str(tmp_path / "file" / "below"), "off"):
        monkeypatch.setenv("SIMMIM_CACHE", place)
        for _ in range(2):
            assert names(read_index(str(root))) == names(scan(str(root)))
            assert len(read_parts(str(root), 0.25)["val"].places) == 10


@pytest.mark.parametrize("pattern", [None, r"/(\d)"])
def test_the_split_is_the_same_with_and_without(
    root: Path, pattern: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = []
    for place in (None, None, "off"):  # written, opened, none
        if place:
            monkeypatch.setenv("SIMMIM_CACHE", place)
        parts = read_parts(str(root), 0.2, 3, pattern)
        splits.append({part: found.places.tolist() for part, found in parts.items()})
    assert splits[0] == splits[1] == splits[2]


def test_another_share_seed_or_pattern_is_another_split(root: Path) -> None:
    options = [(0.2, 0, None), (0.4, 0, None), (0.2, 1, None), (0.2, 0, r"/(\d)")]
    for _ in range(2):
        splits = [read_parts(str(root), *each)["val"].places.tolist() for each in options]
        assert len({tuple(places) for places in splits}) == 4


def test_the_split_is_that_of_the_changed_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_parts(str(root), 0.2)
    for i in range(20):
        (root / "a" / f"new{i}.png").touch()
    settle(root)
    with_cache = read_parts(str(root), 0.2)["val"].places.tolist()
    monkeypatch.setenv("SIMMIM_CACHE", "off")
    assert with_cache == read_parts(str(root), 0.2)["val"].places.tolist()


def test_roots_do_not_collide_and_may_be_moved(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(root, other)
    (other / "a" / "deep" / "only here.png").touch()
    assert names(read_index(str(settle(other)))) != names(read_index(str(root)))
    root.rename(tmp_path / "old")
    other.rename(root)  # at a path that the cache knows
    assert names(read_index(str(root))) == names(scan(str(root)))
    old = tmp_path / "old"
    assert names(read_index(str(old))) == names(scan(str(old)))


def test_a_relative_root_is_the_same_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_index(str(root))
    monkeypatch.chdir(root.parent)
    monkeypatch.setattr(index_cache, "visit_folders", never)
    assert read_index("root").path(0) == os.path.join(
        "root", *read_index("root").name(0).split("/")
    )


class Names(ImageData):
    """Images whose pixels are of no interest."""

    def read(self, index: int) -> Tensor:
        return torch.full((3, 4, 4), len(self.name(index)), dtype=torch.uint8)


def data_of(root: Path) -> Names:
    part = read_parts(str(root), 0.2)["train"]
    return Names(part.files, CenterCrop((4, 4)), part.places)


def pickled(data: object) -> bytes:
    buffer = BytesIO()
    ForkingPickler(buffer).dump(data)
    return buffer.getvalue()


def test_a_pickled_data_set_is_small(tmp_path: Path) -> None:
    for i in range(5000):
        (tmp_path / "root" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / "ab"[i % 2] / f"a rather long name {i}.png").touch()
    data = data_of(settle(tmp_path / "root"))
    assert len(pickled(data)) < 5000
    data.unreadable = torch.empty(0)  # which alone goes through shared memory
    loaded = ForkingPickler.loads(pickled(data))
    assert isinstance(loaded.files.names, MappedTensor)
    assert isinstance(loaded.places, MappedTensor)
    assert [loaded.name(i) for i in range(9)] == [data.name(i) for i in range(9)]
    assert torch.equal(loaded.labels, data.labels)


def test_a_file_written_anew_does_not_change_what_is_mapped(root: Path) -> None:
    data = data_of(root)
    before = [data.name(i) for i in range(len(data))]
    add(root)
    read_index(str(settle(root)))
    data.unreadable = torch.empty(0)
    loaded = ForkingPickler.loads(pickled(data))
    assert not isinstance(loaded.files.names, MappedTensor)
    assert [loaded.name(i) for i in range(len(loaded))] == before


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers_read_the_same(root: Path, method: str) -> None:
    if method == "fork" and sys.platform == "win32":
        pytest.skip("no fork there")
    data = data_of(root)
    batches = []
    for workers in (0, 2):
        loader: Loader[dict[str, Tensor]] = Loader(
            data,
            batch_size=8,
            num_workers=workers,
            collate_fn=collate,
            multiprocessing_context=method if workers else None,
        )
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("image", "label", "index"))


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
    assert not old.exists()
    assert new.exists()
    assert not half.exists()


def test_labels_are_int64_and_places_arrays(root: Path) -> None:
    for part in read_parts(str(root), 0.2).values():
        assert isinstance(part.places, np.ndarray)
        assert part.places.dtype == np.int64
        assert part.files.labels is not None
        assert part.files.labels.dtype == torch.int64


def test_a_data_set_lists_the_names_of_its_places(root: Path) -> None:
    files = scan(str(root))
    for places in (None, np.array([1, 4, 39]), np.array([7, 2])):
        data = Names(files, CenterCrop((4, 4)), places)
        assert list(data.all_names()) == [data.name(i) for i in range(len(data))]


def test_one_process_of_a_machine_reads_the_folder_for_all(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFolderData, "_process", lambda self: (2, 0))
    ImageFolderData(str(root)).prepare_data()
    assert len(kept()) == 2
    other = ImageFolderData(str(root))
    monkeypatch.setattr(index_cache, "visit_folders", never)
    other.setup("fit")
    assert other.num_train == 36


def test_a_mistake_is_said_by_all_processes_and_none_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFolderData, "_process", lambda self: (2, 0))
    (tmp_path / "empty").mkdir()
    data = ImageFolderData(str(tmp_path / "empty"))
    data.prepare_data()
    with pytest.raises(ValueError, match="holds no images"):
        data.setup("fit")
