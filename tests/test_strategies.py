"""More than one process: the same training as one process with the same global batch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def _run(processes: int, out: Path) -> dict[str, object]:
    _start("ddp_step.py", str(processes), str(out))
    return torch.load(out, weights_only=True)


def _start(name: str, *args: str) -> None:
    script = Path(__file__).with_name(name)
    # A seed that an earlier test left there would be set again in several processes, not in one.
    env = {key: value for key, value in os.environ.items() if key != "PL_GLOBAL_SEED"}
    done = subprocess.run(
        [sys.executable, str(script), *args],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=script.parent,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    one, two = _run(1, tmp_path / "1.pt"), _run(2, tmp_path / "2.pt")
    torch.testing.assert_close(
        torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-6
    )
    for name, a in one["state"].items():  # type: ignore[attr-defined]
        torch.testing.assert_close(two["state"][name], a, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_two_processes_score_what_one_scores(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    """Each validation image counts once, though 13 cannot be dealt out evenly."""
    for name, n in (("a", 11), ("b", 9), ("c", 17)):
        make_images(tmp_path / "images" / name, n)
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        _start("ddp_classify.py", str(processes), str(tmp_path / "images"), str(out))
        found[processes] = torch.load(out / "found.pt", weights_only=True)
    one, two = found[1], found[2]
    assert torch.equal(one["confusion"], two["confusion"])
    assert int(one["confusion"].sum()) == 13
    for name in ("loss", "top1", "top1_balanced", "calibration_error", "top1_class/a"):
        shares = [run["metrics"][f"val/{name}"] for run in (one, two)]
        assert shares[1] == pytest.approx(shares[0], rel=1e-4), name
    tables = [(tmp_path / n / "predictions.csv").read_text().splitlines() for n in "12"]
    rows = [[line.split(",") for line in table[1:]] for table in tables]
    assert len(rows[0]) == 37
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    shares = [torch.tensor([[float(x) for x in row[2:]] for row in table]) for table in rows]
    torch.testing.assert_close(shares[1], shares[0], rtol=1e-3, atol=1e-4)


def test_two_processes_segment_what_one_segments(tmp_path: Path) -> None:
    """Each validation image counts once, though five of two sizes cannot be dealt out evenly."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 5)):
        for i in range(n):
            size = (40, 50) if i % 2 else (20, 64)
            for kind, pixels in (
                ("images", rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
                ("masks", rng.integers(0, 3, size, dtype=np.uint8)),
            ):
                (tmp_path / "d" / part / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "d" / part / kind / f"{i}.png")
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        _start("ddp_segment.py", str(processes), str(tmp_path / "d"), str(out))
        found[processes] = torch.load(out / "found.pt", weights_only=True)
    for name in ("loss", "miou", "pixel_accuracy", "iou/0", "iou/2"):
        shares = [found[n][f"val/{name}"] for n in (1, 2)]
        assert shares[1] == pytest.approx(shares[0], rel=1e-4), name
    masks = [sorted((tmp_path / n / "predictions").rglob("*.png")) for n in "12"]
    assert [len(paths) for paths in masks] == [13, 13]
    for one, two in zip(*masks, strict=True):
        assert one.relative_to(tmp_path / "1") == two.relative_to(tmp_path / "2")
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))
