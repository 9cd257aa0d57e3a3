"""The board online: lineage, and what `wandb sync` makes of a run that was resumed."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from support.commands import simmim
from support.folders import make_classes
from support.processes import run_program
from test_board import LOGGED, TINY
from wandb_server import KEY, Server, wandb_server

pytestmark = pytest.mark.exhaustive
QUICK = [
    "--probe.every_n_epochs=0",
    "--reconstructions.every_n_epochs=0",
    "--worst.every_n_epochs=0",
    "--inside.every_n_epochs=0",
]
DATA = ["--data.root=images", "--data.batch_size=8"]


@pytest.fixture
def server(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that one is logged in to, and a working folder with images of two classes."""
    make_classes(Path("images"), 20)
    with wandb_server() as server:
        said = {"BASE_URL": server.url, "API_KEY": KEY, "MODE": "online", "SILENT": "true"}
        for name, value in {**said, "ERROR_REPORTING": "false"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.setenv("HOME", str(workdir))
        wandb.teardown()  # what an earlier test has told it
        yield server
        wandb.teardown()


def test_a_fine_tuning_is_linked_to_the_checkpoint_that_it_begins_with(
    server: Server,
) -> None:
    few = [*DATA, *LOGGED, "--trainer.max_epochs=1", "--board.log_checkpoints=true"]
    simmim("pretrain fit --name=pre", *TINY, *QUICK, *few)
    simmim("classify fit --name=fine --model.weights=runs/pre/version_0", *few)
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
    options = [*DATA, *TINY, *QUICK, *LOGGED]
    simmim("pretrain fit --name=pre --trainer.max_epochs=1", *options)
    simmim("pretrain fit --name=pre --trainer.max_epochs=2 --ckpt_path=last", *options)
    folders = set(re.findall(r"wandb sync (\S+)", caplog.text))
    assert folders == {"runs/pre/version_0/wandb"}
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    run_program(sys.executable, "-m", "wandb", "sync", *folders, WANDB_MODE="online")
    (rows,) = server.history.values()
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    losses = [row["trainer/global_step"] for row in rows if "train/loss" in row]
    assert losses == list(range(8))
