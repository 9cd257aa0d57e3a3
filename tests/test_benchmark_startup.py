"""The benchmark of the start: its simulated index is one that a scan would have made."""

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

from simmim.benchmark.startup import IN_A_FOLDER, startup
from simmim.data.index import scan
from simmim.data.index_cache import read_index
from simmim.data.mapped import PLACE

MODULE = import_module("simmim.benchmark.startup")  # the package has the function by that name


def test_the_simulated_index_is_that_of_a_scan(tmp_path: Path) -> None:
    n = 2 * IN_A_FOLDER + 7
    MODULE._simulate(tmp_path / "root", n)
    simulated = read_index(str(tmp_path / "root"))
    names = list(simulated.all_names())
    assert names[1001] == "n00000001/n00000001_00000001.JPEG"
    for name in names:
        (tmp_path / "root" / name).touch()
    real = scan(str(tmp_path / "root"))
    assert names == list(real.all_names())
    assert simulated.labels is not None
    assert real.labels is not None
    assert simulated.labels.tolist() == real.labels.tolist()
    assert (simulated.classes, simulated.suffixes) == (real.classes, real.suffixes)


def test_tables() -> None:
    place = os.environ[PLACE]
    lines = startup([10_000], [2], real=10_000, batches=3).splitlines()
    assert 0.01 < float(lines[0].split()[2]) < 10  # well under 2 where nothing else runs
    assert [line.split()[0] for line in lines[2:4]] == ["files", "10,000"]
    assert lines[5].startswith("10,000 real files")
    if sys.platform == "linux":
        row = [float(word) for word in lines[-1].split() if word != "MB"]
        workers, main, resident, shared_out, total = row[:5]
        assert workers == 2
        assert resident > shared_out > 1  # of what a worker sees, a part is shared
        assert total < main + 2 * resident
    assert os.environ[PLACE] == place
    assert not os.listdir(place)  # it has a cache of its own


@pytest.mark.parametrize(("option", "value"), [("files", [9]), ("workers", [-1])])
def test_numbers_that_are_too_small(option: str, value: list[int]) -> None:
    with pytest.raises(ValueError, match=f"--{option} {value[0]} is too small: use"):
        startup(**{option: value})  # type: ignore[arg-type]
