"""Runs in folders that must not be written to: results go elsewhere, or one sentence says why."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from support.commands import simmim
from support.folders import make_images

NAMESPACE = ["unshare", "--mount", "sh", "-c"]  # what is mounted there ends with the process
READ_ONLY = 'mount -o bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
COMMANDS = (
    "import json, sys\nfrom simmim.cli import main\n"
    "print(*[main(line) for line in json.loads(sys.argv[1])])"
)


def where_it_is_read_only(folder: Path, lines: list[list[str]]) -> tuple[list[int], str]:
    """Call `simmim` on each line in a process that cannot write to a folder.

    Returns:
        The exit statuses, and all that was said.
    """
    command = [sys.executable, "-c", COMMANDS, json.dumps(lines)]
    if os.geteuid() == 0:  # who may do anything cannot be kept out by rights
        command = [*NAMESPACE, READ_ONLY, str(folder), *command]
        if not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"]).returncode:
            pytest.skip("nothing can be mounted here")
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    done = subprocess.run(command, capture_output=True, text=True)
    folder.chmod(mode)
    assert "Traceback" not in done.stderr
    statuses = [int(word) for word in done.stdout.splitlines()[-1].split()]
    return statuses, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def run(tiny_run: Callable[[str], Path]) -> Path:
    """The run of somebody else's, seen from one's own working folder."""
    tiny_run("pretrain")
    Path("runs").rename("theirs")
    make_images(Path("others"), 5)
    return Path("theirs/pretrain/version_0")


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="rights are others there")
def test_what_scores_or_shows_a_run_needs_no_right_to_write_into_it(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    score = ["pretrain", "validate", f"--ckpt_path={run}"]
    show = ["pretrain", "predict", f"--ckpt_path={run}", "--data.root=others"]
    go_on = ["pretrain", "fit", f"--ckpt_path={run}", "--trainer.max_epochs=2"]
    statuses, said = where_it_is_read_only(run, [score, show, go_on])
    assert statuses == [0, 0, 1], said
    assert f"{run} cannot be written: --run_dir says where results go" in said
    assert f"simmim: {run} cannot be written, and a run goes on in its own folder: copy it" in said
    assert len(list(Path("runs/pretrain/version_0/predictions").rglob("*.png"))) == 5
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
def test_results_go_where_one_says(run: Path) -> None:
    simmim(f"pretrain predict --ckpt_path={run} --run_dir=mine")
    assert len(list(Path("mine/pretrain/version_0/predictions").rglob("*.png"))) == 20
    simmim(f"pretrain validate --ckpt_path={run} --run_dir=mine")
    assert Path("mine/pretrain/version_1/validate.csv").exists()
    assert not (run / "predictions").exists()
    # Only where it is looked for.
    simmim("pretrain validate --ckpt_path=last --name=pretrain --run_dir=theirs")
    assert (run / "validate.csv").exists()
    assert not Path("runs").exists()


@pytest.mark.exhaustive
def test_a_run_is_known_from_within(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a path that does not say its name."""
    places = [(".", "."), ("..", "version_0"), ("checkpoints", "last.ckpt")]
    for n, (inside, path) in enumerate(places):
        monkeypatch.chdir(tmp_path / run / inside)
        options = [f"--data.root={tmp_path / 'images'}", f"--trainer.max_epochs={n + 2}"]
        simmim(f"pretrain fit --ckpt_path={path}", *options)
        kept = yaml.safe_load((tmp_path / run / "config.yaml").read_text())
        assert (kept["name"], kept["trainer"]["max_epochs"]) == ("pretrain", n + 2)
        assert [path.name for path in tmp_path.rglob("version_*")] == ["version_0"]
