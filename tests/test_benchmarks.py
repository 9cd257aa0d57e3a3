"""The scripts of benchmarks/: each runs, gives a table, and measures what it says."""

import os
from pathlib import Path
from typing import Any

import fsspec
import object_store
import pytest
import reference_pipeline
import startup
import storage_formats

from simmim.data.index import scan
from simmim.data.index_cache import read_index
from simmim.data.mapped import PLACE
from simmim.data.pack import pack
from support.folders import make_images

pytestmark = pytest.mark.exhaustive


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of webdataset, for one
def test_formats_on_a_disk_and_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_formats, "_apart", lambda function, *args: function(*args))
    kinds = {name: storage_formats.FORMATS[name] for name in ("files", "arrow")}
    monkeypatch.setattr(storage_formats, "FORMATS", kinds)
    make_images(tmp_path / "root", 9, size=64, suffix=".jpg")
    options: dict[str, Any] = {"workers": 1, "nodes": 2, "shard_mb": 1, "latency_ms": 1}
    text = storage_formats.formats(str(tmp_path / "root"), images=60, **options)
    lines = text.splitlines()
    assert lines[0].startswith("60 JPEGs, 0.")
    assert [line.split()[0] for line in lines[3:5]] == ["files", "arrow"]
    copied = next(line.split() for line in lines if line.startswith("arrow, copied"))
    assert copied[-3:-1] == ["0.0", "MB"]  # the second epoch asks for its packed.json alone
    assert "failed" not in text


def test_a_store_whose_requests_wait(tmp_path: Path) -> None:
    """Twenty milliseconds a request, four at a time: at most 200 images a second."""
    make_images(tmp_path / "root", 20, size=200)
    pack(str(tmp_path / "root"), str(tmp_path / "packed"), "raw", shard_mb=1, workers=0)
    with object_store.ObjectStore(tmp_path, latency=0.02) as store:
        data = (tmp_path / "packed" / "packed.json").read_bytes()
        there, url = fsspec.filesystem("http"), f"{store.url}/packed/packed.json"
        assert there.cat_file(url, start=5, end=50) == data[5:50]
        assert (store.requests, store.bytes) == (1, 45)
        text = object_store.measure(f"{store.url}/packed", seconds=0.5, streams=4)
    single, whole = (float(line.split()[-4].replace(",", "")) for line in text.splitlines()[1:3])
    assert 2 < single < 200
    assert whole > 3 * single  # a shard has eight images


def test_the_simulated_index_is_that_of_a_scan(tmp_path: Path) -> None:
    startup.simulate(tmp_path / "root", 2 * startup.IN_A_FOLDER + 7)
    simulated = read_index(str(tmp_path / "root"))
    for name in simulated.all_names():
        (tmp_path / "root" / name).touch()
    real = scan(str(tmp_path / "root"))
    assert list(simulated.all_names()) == list(real.all_names())
    assert simulated.labels is not None
    assert real.labels is not None
    assert simulated.labels.tolist() == real.labels.tolist()
    assert (simulated.classes, simulated.suffixes) == (real.classes, real.suffixes)


def test_start_up() -> None:
    lines = startup.startup([10_000], [1], real=10_000, labels=10_000, batches=3).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["files", "10,000"]
    assert lines[5].startswith("10,000 real files")
    assert not os.listdir(os.environ[PLACE])  # it has a cache of its own


def test_the_official_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_images(Path("photos"), 8, (90, 70), ".jpg")
    pack("photos", "packed", short_side=70, quality=100, workers=0)
    text = reference_pipeline.compare("photos", "digits", packed="packed", seconds=0.1)
    rows = text.splitlines()
    assert all(
        float(word.strip("x")) > 0
        for row in rows[1:3]
        for word in row.replace(",", "").split()[-3:]
    )
    assert int(rows[3].split()[-3]) <= 1
