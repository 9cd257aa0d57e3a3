"""The board online: lineage, and what `wandb sync` makes of a run that was resumed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb

from simmim.cli import main
from test_board import QUIET, TINY
from wandb_server import KEY, Server, wandb_server

# jsonargparse's own, about what LightningCLI calls
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

QUICK = [
    "--probe.every_n_epochs=0",
    "--reconstructions.every_n_epochs=0",
    "--masks.every_n_epochs=0",
    "--worst.every_n_epochs=0",
    "--inside.every_n_epochs=0",
]
DATA = ["--data.root=images", "--data.batch_size=8"]


@pytest.fixture
def server(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A server that one is logged in to, and a working folder with images of two classes."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        make_images(tmp_path / "images" / name, 20, size=32)
    with wandb_server() as server:
        said = {"BASE_URL": server.url, "API_KEY": KEY, "MODE": "online", "SILENT": "true"}
        for name, value in {**said, "ERROR_REPORTING": "false"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.setenv("HOME", str(tmp_path))
        wandb.teardown()  # what an earlier test has told it
        yield server
        wandb.teardown()


def test_a_fine_tuning_is_linked_to_the_checkpoint_that_it_begins_with(
    server: Server,
) -> None:
    few = [*DATA, *QUIET, "--trainer.max_epochs=1", "--board.log_checkpoints=true"]
    assert main(["pretrain", "fit", "--name=pre", *TINY, *QUICK, *few]) == 0
    assert main(["classify", "fit", "--name=fine", "--model.weights=runs/pre/version_0", *few]) == 0
    pre, fine = (Path(f"runs/{n}/version_0/wandb/run_id.txt").read_text() for n in ("pre", "fine"))
    assert {row["trainer/global_step"] for row in server.history[pre]} == {0, 1, 2, 3}
    made = {artifact.name: artifact for artifact in server.artifacts if artifact.type == "model"}
    assert set(made) == {f"model-{pre}", f"model-{fine}"}
    assert made[f"model-{pre}"].aliases == {"best", "latest"}
    assert made[f"model-{pre}"].run == pre
    assert server.used == [(fine, made[f"model-{pre}"])]
    assert server.files.count("model.ckpt") == 2


def test_a_resumed_run_is_synced_by_one_command_into_one_curve(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit = ["pretrain", "fit", "--name=pre", *DATA, *TINY, *QUICK, *QUIET]
    assert main([*fit, "--trainer.max_epochs=1"]) == 0
    assert main([*fit, "--trainer.max_epochs=2", "--ckpt_path=last"]) == 0
    folders = set(re.findall(r"wandb sync (\S+)", caplog.text))
    assert folders == {"runs/pre/version_0/wandb"}
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_MODE", "WANDB_SERVICE")}
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *folders],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (rows,) = server.history.values()
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    losses = [row["trainer/global_step"] for row in rows if "train/loss" in row]
    assert losses == list(range(8))
