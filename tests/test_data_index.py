"""The index of files: torchvision's order and classes, and what a folder scan must survive."""

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.datasets import ImageFolder

from simmim.data.index import find_parts, scan

TREE = [
    "b/2.png", "b/10.PNG", "b/x/1.jpg", "b/x-y/1.jpg", "b/x/z/1.webp", "b/Z.jpeg",
    "a-b/1.png", "a/1.tif", "a/é.png", "a/sub/0.bmp", "B/0.png", "a/notes.txt",
]  # fmt: skip


def touch(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def names(root: Path) -> list[str]:
    index = scan(str(root))
    return [index.name(i) for i in range(len(index))]


def test_classes_and_order_are_those_of_torchvision(tmp_path: Path) -> None:
    index, theirs = scan(str(touch(tmp_path, TREE))), ImageFolder(str(tmp_path))
    assert index.classes == theirs.classes
    assert index.labels is not None
    ours = [(index.path(i), int(index.labels[i])) for i in range(len(index))]
    assert ours == theirs.samples


def test_shared_data_is_indexed_as_by_torchvision() -> None:
    root = Path(__file__).parents[2] / "shared" / "data" / "cifar10-small" / "train"
    if not root.exists():
        pytest.skip("no ../shared/data")
    index, theirs = scan(str(root)), ImageFolder(str(root))
    assert index.labels is not None
    assert index.labels.tolist() == theirs.targets
    assert [index.path(i) for i in range(len(index))] == [path for path, _ in theirs.samples]


def test_loose_images_mean_no_classes(tmp_path: Path) -> None:
    flat = scan(str(touch(tmp_path / "flat", ["2.png", "1.png"])))
    assert (flat.classes, flat.labels) == ([], None)
    mixed = scan(str(touch(tmp_path / "mixed", ["a/1.png", "b/c/2.png", "3.png"])))
    assert (mixed.classes, mixed.labels) == ([], None)
    assert names(tmp_path / "mixed") == ["3.png", "a/1.png", "b/c/2.png"]


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    hidden = ["._1.jpg", ".hidden.jpg", ".git/1.png", "__MACOSX/1.png", "Thumbs.db", "a/.b/1.jpg"]
    touch(tmp_path, ["1.jpg", *hidden])
    assert names(tmp_path) == ["1.jpg"]


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes need rights there")
def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", ["a/1.png", "c/2.png"])
    touch(tmp_path / "elsewhere", ["3.png", "deep/4.png"])
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (root / "c" / "twin").symlink_to(root / "a")
    (root / "a" / "file.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    assert names(root) == [
        "a/1.png", "a/file.png", "b/3.png", "b/deep/4.png", "c/2.png", "c/twin/1.png",
        "c/twin/file.png",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes need rights there")
def test_links_to_nothing_are_kept_to_be_reported_and_pipes_are_not(tmp_path: Path) -> None:
    touch(tmp_path, ["1.png"])
    (tmp_path / "nothing.jpg").symlink_to("missing.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    assert find_parts(str(tmp_path)) == {}  # and does not stumble over it either
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # to open it would wait for ever
    (tmp_path / "to_pipe.jpg").symlink_to("pipe.jpg")
    assert names(tmp_path) == ["1.png", "nothing.jpg", "self.jpg"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow text only")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    awkward = [b"new\nline.jpg", b"latin1_\xe9.jpg", "画像.jpg".encode(), b"a" * 251 + b".jpg"]
    for name in awkward:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"here")
    index = scan(str(tmp_path))
    assert sorted(os.fsencode(index.name(i)) for i in range(len(index))) == sorted(awkward)
    assert all(Path(index.path(i)).read_bytes() == b"here" for i in range(len(index)))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow text only")
def test_names_of_classes_are_text(tmp_path: Path) -> None:
    for name in (b"caf\xe9", "écru".encode(), b"new\nline"):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        Path(os.fsdecode(folder), "1.jpg").write_bytes(b"here")
    index = scan(str(tmp_path))
    assert index.classes == ["caf\\xe9", "new\nline", "écru"]
    assert index.labels is not None
    assert [Path(index.path(i)).read_bytes() for i in index.labels.tolist()] == [b"here"] * 3


def test_parts(tmp_path: Path) -> None:
    touch(tmp_path, ["Train/1.png", "validation/1.png"])
    assert find_parts(str(tmp_path)) == {
        "train": str(tmp_path / "Train"),
        "val": str(tmp_path / "validation"),
    }
    touch(tmp_path / "x", ["val/1.png", "cats/1.png"])
    assert find_parts(str(tmp_path / "x")) == {}  # without train/, `val` is a class


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell Train from train")
def test_a_part_that_is_there_twice_is_told(tmp_path: Path) -> None:
    touch(tmp_path, ["Train/1.png", "train/1.png", "val/1.png", "validation/1.png"])
    with pytest.warns(UserWarning, match="is not read") as warned:
        parts = find_parts(str(tmp_path))
    assert parts == {"train": str(tmp_path / "Train"), "val": str(tmp_path / "val")}
    assert [str(w.message).partition(":")[0] for w in warned] == [
        f"{tmp_path / 'train'} is not read", f"{tmp_path / 'validation'} is not read"
    ]  # fmt: skip


def test_a_folder_that_is_gone_when_it_is_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, ["a/1.png", "b/1.png"])
    read = os.scandir

    def late(path: str) -> object:
        if path.endswith("b"):
            (tmp_path / "b" / "1.png").unlink()
            (tmp_path / "b").rmdir()
        return read(path)

    monkeypatch.setattr(os, "scandir", late)
    with pytest.warns(UserWarning, match="left out a folder: .*No such file or directory.*b'"):
        assert names(tmp_path) == ["a/1.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="its limit is 4,096 bytes")
def test_a_path_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, ["1.png"])
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=folder)
        above, folder = folder, os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(above)
    os.close(folder)
    with pytest.warns(UserWarning, match="left out a folder: .*File name too long"):
        assert names(tmp_path) == ["1.png"]


def test_no_images(tmp_path: Path) -> None:
    touch(tmp_path, ["notes.txt", ".1.png"])
    with pytest.raises(ValueError, match=r"holds no images: give a folder with files that end in"):
        scan(str(tmp_path))


def test_the_index_is_arrays_that_go_to_workers(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    index = scan(str(make_images(tmp_path, 3)))
    assert index.names.dtype == torch.uint8
    assert index.starts.tolist() == [0, 7, 14, 21]  # "000.png" and so on
    assert pickle.loads(pickle.dumps(index)).path(2) == str(tmp_path / "002.png")
