"""The benchmark of formats: each gives back what was written, from a disk and from a store."""

import gc
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest

from simmim.benchmark.formats import formats
from simmim.benchmark.kept import BUCKET, FORMATS, Share
from simmim.benchmark.object_store import ObjectStore
from simmim.data.index import FileIndex
from simmim.data.layout import read_folder

MODULE = import_module("simmim.benchmark.formats")  # the package has the function by that name
IMAGES, SHARD = 60, 30_000
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of webdataset, for one
INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(not find_spec(kind.module), reason="not installed"))
    for name, kind in FORMATS.items()
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MODULE.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def source(tmp_path: Path, make_images: Callable[..., Path]) -> Iterator[FileIndex]:
    make_images(tmp_path / "root", 7, size=(300, 400))
    size = MODULE.write_source(str(tmp_path / "root"), tmp_path / "source", IMAGES)
    files = read_folder(str(tmp_path / "source"))
    assert len(files) == IMAGES
    assert sum(len(files.read(i)) for i in range(IMAGES)) == size
    assert files.read(3) == files.read(10) != files.read(4)
    yield files
    gc.collect()  # what a library leaves open is closed while warnings of it are ignored


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path, latency=0) as store:
        yield store


def write(name: str, files: FileIndex, tmp_path: Path) -> Path:
    kept = tmp_path / BUCKET / name
    kept.mkdir(parents=True)
    FORMATS[name].write(files, kept, SHARD)
    return kept


@pytest.mark.parametrize("name", INSTALLED)
def test_the_very_bytes_come_back(name: str, source: FileIndex, tmp_path: Path) -> None:
    kept = write(name, source, tmp_path)
    expected = [source.read(i) for i in range(IMAGES)]
    assert [bytes(data) for data in FORMATS[name].scan(kept, IMAGES)] == expected
    if FORMATS[name].random:
        read = FORMATS[name].open(kept)
        assert [bytes(read(i)) for i in reversed(range(IMAGES))] == expected[::-1]


@pytest.mark.parametrize("name", INSTALLED)
def test_a_share_of_a_store(
    name: str, source: FileIndex, tmp_path: Path, store: ObjectStore, monkeypatch: Any
) -> None:
    for variable in ("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL"):
        monkeypatch.setenv(variable, store.url)
    kept = write(name, source, tmp_path)
    for way in FORMATS[name].ways:
        orders = []
        for epoch in (1, 2):
            copy = tmp_path / "copies" / f"{way} {epoch}"
            copy.mkdir(parents=True)
            share = Share(way, kept, f"{store.url}/{BUCKET}/{name}", copy, 3, epoch)
            orders.append([*islice(FORMATS[name].stream(share), IMAGES // 3)])
            assert len(set(orders[-1])) == len(orders[-1]) > IMAGES // 6
            assert set(orders[-1]) <= set(range(IMAGES))
        assert orders[0] != orders[1]
        assert orders[0] != sorted(orders[0])


def test_a_store_gives_ranges_and_counts_them(tmp_path: Path, store: ObjectStore) -> None:
    data = bytes(range(256)) * 20_000  # more than is sent at a time
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "file").write_bytes(data)
    there, url = fsspec.filesystem("http"), f"{store.url}/bucket/file"
    assert there.cat_file(url) == data
    assert (store.requests, store.bytes) == (1, len(data))
    assert there.cat_file(url, start=5, end=1_500_007) == data[5:1_500_007]
    assert (store.requests, store.bytes) == (2, len(data) + 1_500_002)
    assert there.info(url)["size"] == len(data)
    with pytest.raises(FileNotFoundError):
        there.cat_file(f"{store.url}/bucket/none")


def test_each_request_waits(tmp_path: Path, source: FileIndex) -> None:
    with ObjectStore(tmp_path, latency=0.02) as store:
        kept = write("arrow", source, tmp_path)
        share = Share("one by one", kept, f"{store.url}/{BUCKET}/arrow", tmp_path, 1, 1)
        _, took, places = MODULE.read_share("arrow", IMAGES, store.url, share)
        assert sorted(places) == list(range(IMAGES))
        assert took > 0.02 * IMAGES / 8  # as many at a time


def test_tables(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is installed everywhere; of the rest it says that it is not, or what went wrong."""

    class Broken(type(FORMATS["files"])):  # type: ignore[misc]
        module, package = "simmim", "broken"

    class Absent(Broken):
        module, package = "simmim_absent", "absent-format"

    chosen = {"files": FORMATS["files"], "arrow": FORMATS["arrow"]}
    monkeypatch.setattr(MODULE, "FORMATS", chosen | {"broken": Broken(), "absent": Absent()})
    make_images(tmp_path / "root", 9, size=64, suffix=".jpg")
    said = formats(str(tmp_path / "root"), images=60, workers=2, nodes=2, shard_mb=1, latency_ms=1)
    lines = said.splitlines()
    assert lines[0].startswith("60 JPEGs, 0.")
    assert [line.split()[0] for line in lines[3:5]] == ["files", "arrow"]
    for line in lines[3:5]:
        words = line.replace("MB", "").replace("ms", "").replace(" s", "").split()[1:]
        assert len(words) == 9
        if sys.platform == "linux":
            assert all(float(word) >= 0 for word in words)
    assert [line.split()[:2] for line in lines[8:10]] == [["arrow,", "one"], ["arrow,", "copied"]]
    _, copied = (line.split() for line in lines[8:10])
    assert copied[-3:-1] == ["0.0", "MB"]  # the second epoch asks for its packed.json alone
    assert lines[11].startswith("broken failed: KeyError('broken')")
    assert lines[12] == "not installed: absent-format"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": 3}, "--images 3 is too small: use 4 or more"),
        ({"workers": 0}, "--workers 0 is too small: use 1"),
        ({"shard_mb": 0}, "--shard_mb 0 is too small: use 1"),
        ({"latency_ms": -1}, "--latency_ms -1 is too small: use 0"),
    ],
)
def test_mistakes(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        formats("photos", **options)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no image"):
        formats(str(tmp_path), images=8)
