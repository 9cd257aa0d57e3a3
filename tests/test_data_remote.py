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

URL = "memory://bucket/photos"


@pytest.fixture
def store(tmp_path: Path, make_images: Callable[..., Path]) -> Iterator[MemoryFileSystem]:
    """A store with packed images, in two shards."""
    for name in ("cat", "dog"):
        make_images(tmp_path / "root" / name, 3, size=(500, 500))
    pack.pack(str(tmp_path / "root"), str(tmp_path / "packed"), "raw", shard_mb=1, workers=0)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "packed"), "/bucket/photos", recursive=True)
    yield store
    store.rm("/bucket", recursive=True)


def module_of(root: str, data_dir: Path) -> ImageFolderData:
    module = ImageFolderData(root, data_dir=str(data_dir), img_size=24, batch_size=2)
    module.setup()
    return module


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_samples_are_those_of_the_folder(
    tmp_path: Path, store: MemoryFileSystem, kind: str
) -> None:
    url = URL if kind == "memory" else (tmp_path / "packed").as_uri()
    copied, local = module_of(url, tmp_path / "data"), module_of(str(tmp_path / "root"), tmp_path)
    assert Path(copied.root).parent == tmp_path / "data"
    assert names_in(Path(copied.root)) == names_in(tmp_path / "packed")
    assert copied.classes == local.classes
    for ours, theirs in zip(copied.train_dataloader(), local.train_dataloader(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("index", "label", "flip"))


def test_an_interrupted_copy_goes_on(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, asked = MemoryFileSystem.get_file, []

    def get_file(self: Any, path: str, *args: Any, **kwargs: Any) -> None:
        asked.append(Path(path).name)
        if len(asked) == 2:
            raise OSError("connection reset")
        get(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    monkeypatch.setattr("simmim.data.remote.STREAMS", 1)
    with pytest.raises(ValueError, match=f"{URL} cannot be read: connection reset"):
        fetch(URL, str(tmp_path / "copy"))
    assert "packed.json" not in names_in(tmp_path / "copy")
    first = asked[0]
    asked[:] = ["", "", ""]
    fetch(URL, str(tmp_path / "copy"))
    assert first not in asked
    assert names_in(tmp_path / "copy") == names_in(tmp_path / "packed")
    asked.clear()
    fetch(URL, str(tmp_path / "copy"))
    assert not asked


def test_a_changed_store_is_copied_anew(tmp_path: Path, store: MemoryFileSystem) -> None:
    copy = tmp_path / "copy"
    fetch(URL, str(copy))
    shutil.rmtree(tmp_path / "packed")
    pack.pack(str(tmp_path / "root"), str(tmp_path / "packed"), "jpeg", workers=0)
    store.rm("/bucket/photos", recursive=True)
    store.put(str(tmp_path / "packed"), "/bucket/photos", recursive=True)
    copy = Path(fetch(URL, str(copy)))
    assert names_in(copy) == names_in(tmp_path / "packed")
    assert all(
        (copy / n).read_bytes() == (tmp_path / "packed" / n).read_bytes() for n in names_in(copy)
    )


def test_a_run_reads_on_what_it_began_with(tmp_path: Path, store: MemoryFileSystem) -> None:
    first = module_of(URL, tmp_path / "data")
    shutil.rmtree(tmp_path / "packed")
    for file in (tmp_path / "root").rglob("*.png"):
        Image.new("RGB", (500, 500), "red").save(file)
    pack.pack(str(tmp_path / "root"), str(tmp_path / "packed"), "raw", shard_mb=1, workers=0)
    store.rm("/bucket/photos", recursive=True)
    store.put(str(tmp_path / "packed"), "/bucket/photos", recursive=True)
    for _ in range(2):  # copied, and found
        later = ImageFolderData(URL, data_dir=str(tmp_path / "data"), img_size=24)
        later.prepare_data()
        later.setup()
        red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
        assert (later.sets["probe"][0]["image"] == red).all()
    assert module_of(URL, tmp_path / "data").root == later.root != first.root
    assert (first.sets["probe"][0]["image"] != red).any()  # opened only now
    assert len(names_in(tmp_path / "data")) == 3  # two copies and a lock


def test_other_pixels_of_the_same_size_are_another_store(
    tmp_path: Path, store: MemoryFileSystem
) -> None:
    copy = tmp_path / "copy"
    fetch(URL, str(copy))
    before = shards_in(copy)
    shutil.rmtree(tmp_path / "packed")
    for i in range(3):
        (tmp_path / "root" / "cat" / f"{2 - i:03d}.png").rename(tmp_path / f"{i:03d}.png")
    for i in range(3):
        (tmp_path / f"{i:03d}.png").rename(tmp_path / "root" / "cat" / f"{i:03d}.png")
    pack.pack(str(tmp_path / "root"), str(tmp_path / "packed"), "raw", shard_mb=1, workers=0)
    store.rm("/bucket/photos", recursive=True)
    store.put(str(tmp_path / "packed"), "/bucket/photos", recursive=True)
    after = shards_in(Path(fetch(URL, str(copy))))
    assert {n: len(data) for n, data in after.items()} == {n: len(d) for n, d in before.items()}
    assert after == shards_in(tmp_path / "packed") != before


def shards_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.arrow"))}


def test_what_is_damaged_on_its_way_is_not_taken(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = MemoryFileSystem.get_file

    def get_file(self: Any, path: str, target: str, **kwargs: Any) -> None:
        get(self, path, target, **kwargs)
        data = bytearray(Path(target).read_bytes())
        data[len(data) // 2] ^= 1
        Path(target).write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", get_file)
        with pytest.raises(ValueError, match=r"\.arrow is not what packed\.json says, or was dam"):
            fetch(URL, str(tmp_path / "copy"))
    assert not shards_in(tmp_path / "copy")
    fetch(URL, str(tmp_path / "copy"))
    assert shards_in(tmp_path / "copy") == shards_in(tmp_path / "packed")


def test_of_two_that_want_it_one_copies(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, asked = MemoryFileSystem.get_file, []

    def get_file(self: Any, path: str, *args: Any, **kwargs: Any) -> None:
        asked.append(path)
        time.sleep(0.3)  # so that the others come meanwhile
        get(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(fetch, URL, str(tmp_path / "copy")) for _ in range(3)]
    assert [job.result() for job in jobs] == [str(tmp_path / "copy")] * 3
    assert len(asked) == len({*asked}) > 1
    assert names_in(tmp_path / "copy") == names_in(tmp_path / "packed")


def test_what_was_half_copied_is_removed(tmp_path: Path, store: MemoryFileSystem) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / ".images-00000.arrow.1a2b3c4d.unfinished").write_bytes(b"xx")  # killed
    fetch(URL, str(tmp_path / "copy"))
    assert names_in(tmp_path / "copy") == names_in(tmp_path / "packed")


def test_a_whole_copy_does_without_the_store(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(URL, str(tmp_path / "copy"))

    def cat_file(*_: Any, **__: Any) -> bytes:
        raise OSError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    with pytest.warns(UserWarning, match="no route to host; the copy in .*copy is used as it is"):
        fetch(URL, str(tmp_path / "copy"))
    with pytest.raises(ValueError, match="cannot be read: no route to host"):
        fetch(URL, str(tmp_path / "other"))


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


def test_what_cannot_be_copied(
    tmp_path: Path, store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url, sentence in {
        "memory://bucket/none": r"memory://bucket/none holds no packed\.json, or less",
        "nosuch://bucket/photos": "nosuch://bucket/photos cannot be read: Protocol not known",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            module_of(url, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(ValueError, match=r"has 1e-08 GB free, [\d.e-]+ GB are needed for memory:"):
        module_of(URL, tmp_path)
    packed = Packed.load(tmp_path / "packed")
    packed.complete = False
    packed.save(tmp_path / "packed")
    store.put(str(tmp_path / "packed" / "packed.json"), "/bucket/photos/packed.json")
    with pytest.raises(ValueError, match="is packed in part only: finish simmim pack, and copy"):
        module_of(URL, tmp_path)


def test_copies_of_equal_names_lie_apart() -> None:
    one, other = local_copy("s3://a/photos/", "data"), local_copy("s3://b/photos", "data")
    assert one != other
    assert Path(one).name.startswith("photos-")
