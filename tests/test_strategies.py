"""More than one process: the same training as one process with the same global batch."""

import subprocess
import sys
from pathlib import Path

import torch


def _run(processes: int, out: Path) -> dict[str, object]:
    script = Path(__file__).with_name("ddp_step.py")
    done = subprocess.run(
        [sys.executable, str(script), str(processes), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=script.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=True)


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    one, two = _run(1, tmp_path / "1.pt"), _run(2, tmp_path / "2.pt")
    torch.testing.assert_close(
        torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-6
    )
    for name, a in one["state"].items():  # type: ignore[attr-defined]
        torch.testing.assert_close(two["state"][name], a, rtol=1e-4, atol=1e-5)  # type: ignore[index]
