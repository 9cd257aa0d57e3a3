"""Packed folders in a store: copied once to each machine, whole or not at all."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from simmim.data import ImageFolderData, pack
from simmim.data.remote import fetch, local_copy, shown
from simmim.data.shards import Packed
from support.folders import make_classes

URL = "memory://bucket/photos"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and the same packed in two shards."""
    folder = tmp_path_factory.mktemp("made")
    make_classes(folder / "root", 3, "cat dog", size=500)
    pack_up(folder)
    return folder


def pack_up(folder: Path) -> None:
    shutil.rmtree(folder / "packed", ignore_errors=True)
    pack.pack(str(folder / "root"), str(folder / "packed"), "raw", shard_mb=1, workers=0)


def upload(folder: Path) -> None:
    store = fsspec.filesystem("memory")
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)
    store.put(str(folder / "packed"), "/bucket/photos", recursive=True)


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Iterator[Path]:
    """A folder of images, packed and in the store."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    upload(tmp_path)
    yield tmp_path
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def module_of(root: str, data_dir: Path) -> ImageFolderData:
    module = ImageFolderData(root, data_dir=str(data_dir), img_size=24, batch_size=2)
    module.setup()
    return module


def contents(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_samples_are_those_of_the_folder(folder: Path, kind: str) -> None:
    url = URL if kind == "memory" else (folder / "packed").as_uri()
    copied, local = module_of(url, folder / "data"), module_of(str(folder / "root"), folder)
    assert Path(copied.root).parent == folder / "data"
    assert local_copy("s3://a/photos", "data") != local_copy("s3://b/photos", "data")
    assert contents(copied.root) == contents(folder / "packed")
    assert copied.classes == local.classes
    for ours, theirs in zip(copied.train_dataloader(), local.train_dataloader(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("index", "label", "flip"))


def watch(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[list[str]], None] = lambda asked: None,
    after: Callable[[Path], None] = lambda file: None,
) -> list[str]:
    """Note the files that the store is asked for; do something before or after each."""
    get, asked = MemoryFileSystem.get_file, []

    def get_file(self: Any, path: str, target: str, **kwargs: Any) -> None:
        asked.append(Path(path).name)
        before(asked)
        get(self, path, target, **kwargs)
        after(Path(target))

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return asked


def test_an_interrupted_copy_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(asked: list[str]) -> None:
        if len(asked) == 2:
            raise OSError("connection reset")

    asked = watch(monkeypatch, before=fail)
    monkeypatch.setattr("simmim.data.remote.STREAMS", 1)
    with pytest.raises(ValueError, match=f"{URL} cannot be read: connection reset"):
        fetch(URL, str(folder / "copy"))
    assert "packed.json" not in contents(folder / "copy")
    (folder / "copy" / ".images-00000.arrow.1a2b3c4d.unfinished").write_bytes(b"xx")  # killed
    first = asked[0]
    asked[:] = ["", "", ""]
    fetch(URL, str(folder / "copy"))
    assert first not in asked
    assert contents(folder / "copy") == contents(folder / "packed")
    asked.clear()
    fetch(URL, str(folder / "copy"))
    assert not asked


def redden(folder: Path) -> None:
    for file in (folder / "root").rglob("*.png"):
        Image.new("RGB", (500, 500), "red").save(file)
    pack_up(folder)


def change_places(folder: Path) -> None:
    """Other pixels in files of the same size."""
    images = sorted((folder / "root" / "cat").iterdir())
    contents = [image.read_bytes() for image in images]
    for image, content in zip(images, reversed(contents), strict=True):
        image.write_bytes(content)
    pack_up(folder)


@pytest.mark.parametrize("change", [redden, change_places])
def test_a_changed_store_is_copied_anew_beside_the_first(
    folder: Path, change: Callable[[Path], None]
) -> None:
    first = module_of(URL, folder / "data")
    before = contents(first.root)
    change(folder)
    upload(folder)
    for _ in range(2):  # copied, and found
        later = ImageFolderData(URL, data_dir=str(folder / "data"), img_size=24)
        later.prepare_data()
        later.setup()
        assert contents(later.root) == contents(folder / "packed") != before
    assert module_of(URL, folder / "data").root == later.root != first.root
    assert contents(first.root) == before  # a run may read on what it began with
    first.sets["probe"][0]  # opened only now
    assert len(list((folder / "data").iterdir())) == 3  # two copies and a lock


def test_what_is_damaged_on_its_way_is_not_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    with monkeypatch.context() as patch:
        watch(patch, after=damage)
        with pytest.raises(ValueError, match=r"\.arrow is not what packed\.json says, or was dam"):
            fetch(URL, str(folder / "copy"))
    assert not list((folder / "copy").glob("*.arrow"))
    fetch(URL, str(folder / "copy"))
    assert contents(folder / "copy") == contents(folder / "packed")


def test_of_three_that_want_it_one_copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watch(monkeypatch, before=lambda _: time.sleep(0.1))  # so that the others come
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(fetch, URL, str(folder / "copy")) for _ in range(3)]
    assert [job.result() for job in jobs] == [str(folder / "copy")] * 3
    assert len(asked) == len({*asked}) > 1
    assert contents(folder / "copy") == contents(folder / "packed")


def test_a_whole_copy_does_without_the_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(URL, str(folder / "copy"))

    def cat_file(*_: Any, **__: Any) -> bytes:
        raise OSError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    with pytest.warns(UserWarning, match="no route to host; the copy in .*copy is used as it is"):
        fetch(URL, str(folder / "copy"))
    with pytest.raises(ValueError, match="cannot be read: no route to host"):
        fetch(URL, str(folder / "other"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket/photos", "s3://bucket/photos"),
        ("https://me:secret@host/photos?sig=secret", "https://host/photos"),
        ("sftp://me@host/a/b", "sftp://host/a/b"),
    ],
)
def test_nobody_is_told_a_password(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> None:
        raise OSError(f"401 Unauthorized, url='{url}/packed.json'")

    assert shown(url) == said
    assert "secret" not in local_copy(url, "data")
    monkeypatch.setattr("simmim.data.remote.url_to_fs", refuse)
    with pytest.raises(ValueError, match=f"^{said} cannot be read: 401") as error:
        fetch(url, str(tmp_path / "copy"))
    assert "secret" not in str(error.value)


def test_what_cannot_be_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, sentence in {
        "memory://bucket/none": r"memory://bucket/none holds no packed\.json, or less",
        "nosuch://bucket/photos": "nosuch://bucket/photos cannot be read: Protocol not known",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            module_of(url, folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
        with pytest.raises(ValueError, match=r"has 1e-08 GB free, [\d.e-]+ GB are needed for mem"):
            module_of(URL, folder)
    packed = Packed.load(folder / "packed")
    packed.complete = False
    packed.save(folder / "packed")
    upload(folder)
    with pytest.raises(ValueError, match="is packed in part only: finish simmim pack, and copy"):
        module_of(URL, folder)
