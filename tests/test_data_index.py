"""The index of files: torchvision's order and classes, and what a folder scan must survive."""

import os
import sys
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from simmim.data.index import find_parts, scan, split_of
from simmim.data.summary import LeftOut

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
    return list(scan(str(root)).all_names())


def test_classes_and_order_are_those_of_torchvision(tmp_path: Path) -> None:
    index, theirs = scan(str(touch(tmp_path, TREE))), ImageFolder(str(tmp_path))
    assert index.classes == theirs.classes
    assert index.labels is not None
    ours = [(index.path(i), int(index.labels[i])) for i in range(len(index))]
    assert ours == theirs.samples


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ("cat/1.png cat/2.png dog/1.png cover.png",
         "1 of 4 images (cover.png) lies beside the class folders, so they are not taken for "
         "classes: move it"),
        ("cat/1.png cat/2.png dog/1.png dog/2.png a.png b.png",
         "2 of 6 images (a.png and others) lie beside the class folders, so they are not taken for "
         "classes: move them"),
        ("set/cat/1.png set/dog/1.png",
         "the only folder below {0} is set/, which holds the folders cat, dog: give {0}/set"),
        ("a.png b.png c.png cat/1.png dog/1.png", ""),
        ("cat/1.png dog/1.png", ""),
        ("images/1.png", ""),
    ],
)  # fmt: skip
def test_what_keeps_folders_from_being_classes(files: str, hint: str, tmp_path: Path) -> None:
    assert scan(str(touch(tmp_path, files.split()))).hint == hint.format(tmp_path)


def test_loose_images_mean_no_classes(tmp_path: Path) -> None:
    flat = scan(str(touch(tmp_path / "flat", ["2.png", "1.png"])))
    assert (flat.classes, flat.labels) == ([], None)
    mixed = scan(str(touch(tmp_path / "mixed", ["a/1.png", "b/c/2.png", "3.png"])))
    assert (mixed.classes, mixed.labels) == ([], None)
    assert names(tmp_path / "mixed") == ["3.png", "a/1.png", "b/c/2.png"]


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


SPLIT_NAMES = {
    "train": "train TRAIN Training training_set train-set trainset trn train_images images_train "
    "train_data TrainImgs train2017 train_2014 trainval",
    "val": "val valid validation Validation_Set VAL val-images valset dev dev_set eval val2017",
    "test": "test tests Testing test_set testset tst TEST images_test test2017 holdout test-data",
    None: "cat images set data trained contest training_shoes latest val1 strain devices 2017",
}


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ("Train/a/1.png validation/a/1.png", "train=Train val=validation"),
        ("Training/a/1.png Testing/a/1.png", "train=Training test=Testing"),
        ("images/train2017/1.png", ""),
        ("val/1.png cats/1.png", ""),  # without train/, `val` is a class
        ("dev/1.png test/1.png cats/1.png", ""),
        (".train/1.png cats/1.png", ""),
        ("Training/1.png Running/1.png Walking/1.png", ""),  # a class among others
        ("Training/a/1.png Training/b/1.png", "train=Training"),
        ("train2017/1.png val2017/1.png test2017/1.png annotations/x.json",
         "train=train2017 val=val2017 test=test2017"),
    ],
)  # fmt: skip
def test_parts(files: str, parts: str, tmp_path: Path) -> None:
    touch(tmp_path, files.split())
    expected = dict(part.split("=") for part in parts.split())
    assert find_parts(str(tmp_path)) == {k: str(tmp_path / v) for k, v in expected.items()}


@pytest.mark.parametrize(
    ("files", "train", "val", "unread"),
    [
        ("train/1.png train_set/1.png val/1.png validation/1.png", "train", "val",
         "train_set validation"),
        ("train2014/1.png train2017/1.png val2014/1.png val2017/1.png", "train2014", "val2014",
         "train2017 val2017"),
        ("train2017/1.png val2014/1.png val2017/1.png", "train2017", "val2017", "val2014"),
        ("train/1.png val/1.png car/1.png", "train", "val", "car/"),
    ],
)  # fmt: skip
def test_what_is_not_read_beside_the_splits_is_told(
    files: str, train: str, val: str, unread: str, tmp_path: Path
) -> None:
    touch(tmp_path, files.split())
    with pytest.warns(UserWarning, match="is not read") as warned:
        parts = find_parts(str(tmp_path))
    assert parts == {"train": str(tmp_path / train), "val": str(tmp_path / val)}
    assert [Path(str(w.message).split()[0]).name for w in warned] == unread.replace("/", "").split()


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_splits_are_known_by_many_names(split: str | None) -> None:
    words = SPLIT_NAMES[split].split()
    assert {word: split_of(word) for word in words} == dict.fromkeys(words, split)


def test_endings_that_are_read_and_that_are_counted(tmp_path: Path) -> None:
    for ending in ("jfif", "JPE", "jif", "apng", "dib", "pbm", "j2k"):
        index = scan(str(touch(tmp_path / ending, ["apple/1.png", f"plum/1.{ending}"])))
        assert (index.classes, list(index.left_out)) == (["apple", "plum"], [])
    for ending in ("heic", "HEIF", "jxl", "svg", "psd", "dng", "exr", "nii.gz"):
        files = ["a/1.png", f"a/2.{ending}", "a/3.txt", f"plum/1.{ending}", "b/.hidden.heic"]
        root, reason = touch(tmp_path / ending, files), f".{ending.lower()} is not read here"
        assert list(scan(str(root)).left_out) == [
            LeftOut("files", reason, 2, f"a/2.{ending}"),
            LeftOut("class folders", reason, 1, "plum/"),
        ]
        with pytest.raises(ValueError, match=rf"holds no images: 1 files left out: {reason}"):
            scan(str(root / "plum"))


def test_files_that_are_no_data(tmp_path: Path) -> None:
    run = [f"runs/x/{name}" for name in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt")]
    drawn = ["runs/x/reconstructions/1.png", "contact_sheet.png", "doctor.json"]
    hidden = ["._1.jpg", ".hidden.jpg", ".git/1.png", "__MACOSX/1.png", "Thumbs.db", "a/.b/1.jpg"]
    touch(tmp_path, [*run, *drawn, *hidden, "notes.txt"])
    with pytest.raises(ValueError, match=r"holds no images: give a folder with files that end in"):
        scan(str(tmp_path))
    assert names(touch(tmp_path, ["cat/1.png", "dog/1.png"])) == ["cat/1.png", "dog/1.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow text only")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    folders = {b"caf\xe9": "caf\\xe9", b"new\nline": "new\nline", "écru".encode(): "écru"}
    files = [b"new\nline.jpg", b"latin1_\xe9.jpg", "画像.jpg".encode(), b"a" * 251 + b".jpg"]
    for folder in folders:
        os.mkdir(os.fsencode(tmp_path) + b"/" + folder)
        for name in files:
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + folder + b"/" + name)).write_bytes(name)
    index = scan(str(tmp_path))
    assert index.classes == sorted(folders.values())  # classes are text
    assert index.labels is not None
    found = [os.fsencode(index.name(i)).split(b"/") for i in range(len(index))]
    assert sorted(found) == sorted([folder, name] for folder in folders for name in files)
    for i, (folder, name) in enumerate(found):
        assert Path(index.path(i)).read_bytes() == name
        assert index.classes[int(index.labels[i])] == folders[folder]


def test_folders_that_cannot_be_read_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, ["a/1.png", "b/1.png"])
    read = os.scandir

    def late(path: str) -> object:
        if path.endswith("b"):
            (tmp_path / "b" / "1.png").unlink(missing_ok=True)
            (tmp_path / "b").rmdir()
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", late)
        with pytest.warns(UserWarning, match="left out a folder: .*No such file or directory.*b'"):
            assert names(tmp_path) == ["a/1.png"]
    if sys.platform != "linux":  # whose limit is 4,096 bytes
        return
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=folder)
        above, folder = folder, os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(above)
    os.close(folder)
    with pytest.warns(UserWarning, match="left out a folder: .*File name too long"):
        assert names(tmp_path) == ["a/1.png"]
