"""A run's folder, its checkpoints, its metrics and its board."""

import errno
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb

from simmim.runs import folder as run
from simmim.runs import loggers
from simmim.runs.checkpoints import DurableCheckpointIO
from simmim.runs.folder import find_start, hold_run, leave_run, let_go, new_run, newest_run, run_of
from simmim.runs.loggers import MetricsFile, board, finish_board, is_logged_in
from support.commands import table
from support.processes import kill, said, start

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (*RANKS, run.FOLDER_VARIABLE):
        monkeypatch.delenv(key, raising=False)


def finished(run_dir: Path, name: str) -> Path:
    """A run's folder as a fit leaves it."""
    folder = new_run(run_dir, name)
    (folder / "checkpoints").mkdir()
    torch.save(
        {
            "pytorch-lightning_version": "2.6.6",
            "hyper_parameters": {"encoder": "x"},
            "global_step": 7,
        },
        folder / "checkpoints/last.ckpt",
    )
    (folder / "config.yaml").write_text("model: {optimizer: {class_path: torch.optim.SGD}}\n")
    leave_run(folder, failed=False)
    return folder


# The folder --------------------------------------------------------------------------------------


def test_each_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a" / "version_notes").mkdir(parents=True)
    folders = [new_run(tmp_path, "a") for _ in range(3)]
    assert [folder.name for folder in folders] == ["version_0", "version_1", "version_2"]
    folders[0].rmdir()
    assert new_run(tmp_path, "a").name == "version_3"  # a number is used once
    assert new_run(tmp_path, "b").name == "version_0"


def test_runs_that_begin_at_once_do_not_share_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: new_run(tmp_path, "a"), range(64)))
    assert len(set(folders)) == 64


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),  # torchrun, another machine
        ({"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # Lightning's own, inside salloc
    ],
)
def test_one_process_makes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], first: bool
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert run.is_first_process() is first
    folder = new_run(tmp_path, "a")
    assert (folder == tmp_path / "a" / "version_0") is first
    assert (tmp_path / "a" / "version_0").exists() is first


def test_the_processes_that_we_start_write_where_we_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run(tmp_path, "a")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert new_run(tmp_path, "a") == folder
    leave_run(folder, failed=True)  # not theirs to remove
    assert folder.exists()


def test_a_run_that_failed_before_it_began_leaves_nothing(tmp_path: Path) -> None:
    folder = new_run(tmp_path, "a")
    (folder / "wandb").mkdir()
    leave_run(folder, failed=True)
    assert not folder.exists()
    assert run.FOLDER_VARIABLE not in os.environ
    kept = finished(tmp_path, "a")
    leave_run(kept, failed=True)
    assert (kept / "checkpoints/last.ckpt").exists()


def hold(folder: Path) -> None:
    lock = hold_run(folder)
    Path("held").touch()
    time.sleep(600)
    let_go(lock)


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LOCK_SECONDS", 0.1)
    folder = new_run(workdir, "a")
    other = start(hold, folder)
    while not Path("held").exists():
        assert other.is_alive(), said()
        time.sleep(0.01)
    with pytest.raises(ValueError, match=r"another process trains in .*version_0"):
        hold_run(folder)
    kill(other)  # it cannot say good-bye, and lets go all the same
    lock = hold_run(folder)
    let_go(lock)
    assert not list(folder.iterdir())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hold_run(folder) is None  # the first process has it


# Going on ----------------------------------------------------------------------------------------


def test_last_is_the_newest_run_of_the_name_that_has_a_checkpoint(tmp_path: Path) -> None:
    first, second = finished(tmp_path, "a"), finished(tmp_path, "a")
    new_run(tmp_path, "a")
    finished(tmp_path, "b")
    assert newest_run(tmp_path, "a") == second
    for number in range(3, 12):
        (tmp_path / "a" / f"version_{number}").mkdir()
    tenth = finished(tmp_path, "a")
    assert tenth.name == "version_12"
    assert newest_run(tmp_path, "a") == tenth  # 12 comes after 9
    assert first != second


def test_no_run_to_go_on_with_names_the_others(tmp_path: Path) -> None:
    finished(tmp_path, "mine")
    with pytest.raises(ValueError, match="--name mine"):
        newest_run(tmp_path, "digits")


def test_a_checkpoint_says_what_it_was_made_with(tmp_path: Path) -> None:
    folder = finished(tmp_path, "a")
    expected = {"encoder": "x", "optimizer": {"class_path": "torch.optim.SGD"}}
    for given in ("last", str(folder), str(folder / "checkpoints/last.ckpt")):
        start = find_start(given, tmp_path, "a")
        assert (start.run, start.step, start.model) == (folder, 7, expected)
        assert start.goes_on


def test_an_earlier_checkpoint_branches_off(tmp_path: Path) -> None:
    folder = finished(tmp_path, "a")
    best = folder / "checkpoints/best.ckpt"
    best.write_bytes((folder / "checkpoints/last.ckpt").read_bytes())
    start = find_start(str(best), tmp_path, "a")
    assert start.run == folder
    assert not start.goes_on  # a fit from here would overwrite what came after


def test_a_checkpoint_outside_of_a_run_belongs_to_none(tmp_path: Path) -> None:
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes((finished(tmp_path, "a") / "checkpoints/last.ckpt").read_bytes())
    assert run_of(moved) is None
    assert find_start(str(moved), tmp_path, "a").run is None


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('it ran')",))


FOREIGN = [
    (b"", "is empty"),
    (b"no checkpoint", "another kind, or damaged"),
    (0.5, r"is cut off, after [\d,]+ bytes"),
    (0.999, "is cut off"),
    ({"state_dict": {}}, "Lightning did not write it; .* --model.weights"),
    (torch.zeros(3), "Lightning did not write it"),
    ({"pytorch-lightning_version": "2.6.6", "state_dict": {}}, "another Lightning project"),
    (Code(), "could run code, and is not opened"),
]


@pytest.mark.parametrize(("content", "words"), FOREIGN, ids=[words for _, words in FOREIGN])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, float):  # that share of a good one
        whole = (finished(tmp_path, "a") / "checkpoints/last.ckpt").read_bytes()
        path.write_bytes(whole[: int(len(whole) * content)])
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"x\.ckpt is no checkpoint.*{words}"):
        find_start(str(path), tmp_path, "a")


def test_a_checkpoint_that_has_changed_on_its_way_is_named(tmp_path: Path) -> None:
    path = finished(tmp_path, "a") / "checkpoints/last.ckpt"
    content = torch.load(path)
    torch.save({**content, "state_dict": {"weight": torch.zeros(1000)}}, path)
    file = bytearray(path.read_bytes())
    file[file.index(bytes(1000)) + 500] = 1
    path.write_bytes(file)
    torch.load(path)  # which says nothing
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        find_start(str(path), tmp_path, "a")


# Checkpoints -------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_whole(tmp_path: Path) -> None:
    io = DurableCheckpointIO()
    for i in range(2):
        io.save_checkpoint({"i": i}, tmp_path / "checkpoints" / "last.ckpt")
    assert io.load_checkpoint(tmp_path / "checkpoints" / "last.ckpt") == {"i": 1}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_checkpoint_needs_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename from another file system would be a copy, which a kill cuts short."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError):
        tempfile.mkdtemp()
    DurableCheckpointIO().save_checkpoint({"i": 1}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt") == {"i": 1}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    io, path = DurableCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"i": 0}, path)

    def full(checkpoint: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no room for a checkpoint"):
        io.save_checkpoint({"i": 1}, path)
    assert torch.load(path) == {"i": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def save_for_ever(path: Path) -> None:
    weights = torch.zeros(4_000_000)
    for i in range(10_000):
        DurableCheckpointIO().save_checkpoint({"i": i, "weights": weights}, path)


@pytest.mark.slow
def test_kill_9_during_a_save_leaves_a_whole_checkpoint(workdir: Path) -> None:
    path = workdir / "checkpoints" / "last.ckpt"
    process = start(save_for_ever, path)
    while not path.exists():
        assert process.is_alive(), said()
        time.sleep(0.02)
    time.sleep(0.1)
    kill(process)
    assert torch.load(path)["weights"].shape == (4_000_000,)
    run.clean_up(workdir)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


# Metrics -----------------------------------------------------------------------------------------


def test_metrics_go_on_after_a_resume(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in range(6):
        first.log_metrics({"epoch": 0, "train/loss": 1.0 - step / 10}, step)
        first.save()
    first.log_metrics({"val/loss": torch.tensor(0.5)}, 5)
    first.save()

    again = MetricsFile(tmp_path, before_step=4)
    again.log_metrics({"train/loss": 0.25, "lr": 0.1}, 4)
    again.save()
    again.log_metrics({"train/loss": 0.2, "lr": 0.1}, 5)
    again.finalize("success")

    rows = table(tmp_path / "metrics.csv")
    assert list(rows[0]) == ["step", "epoch", "train/loss", "val/loss", "lr"]
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert [row["train/loss"] for row in rows[3:]] == ["0.7", "0.25", "0.2"]
    assert [row["lr"] for row in rows[3:]] == ["", "0.1", "0.1"]


@pytest.mark.parametrize("rest", [",", "1", "1,0"])  # of "1,0,1.3" or "17,0,1.3"
def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path, rest: str) -> None:
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss\n0,0,1.5\n1,0,1.4\n" + rest)
    again = MetricsFile(tmp_path, before_step=9)
    again.log_metrics({"train/loss": 1.3}, 2)
    again.save()
    assert [row["step"] for row in table(tmp_path / "metrics.csv")] == ["0", "1", "2"]


def test_lightning_finds_the_folder_in_the_metrics(tmp_path: Path) -> None:
    assert MetricsFile(tmp_path).log_dir == str(tmp_path)


# The board ---------------------------------------------------------------------------------------


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a login."""
    for key in [key for key in os.environ if key.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_credentials_nobody_is_logged_in(nobody: Path) -> None:
    assert not is_logged_in()
    (nobody / ".netrc").write_text("machine example.org login user password secret\n")
    assert not is_logged_in()


@pytest.mark.parametrize("key", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_key_in_the_environment_is_a_login(
    nobody: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(key, "x" * 40)
    assert is_logged_in()


def test_a_netrc_file_is_a_login(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nobody / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert is_logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://board.example.org")
    assert not is_logged_in()  # at that server
    (nobody / "other").write_text("machine board.example.org login user password secret\n")
    monkeypatch.setenv("NETRC", str(nobody / "other"))
    assert is_logged_in()


def test_settings_of_the_working_folder_count(nobody: Path) -> None:
    (nobody / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (nobody / "wandb").mkdir()
    (nobody / "wandb" / "settings").write_text("[default]\nbase_url = https://board.example.org\n")
    assert not is_logged_in()


def test_the_board_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert board(tmp_path) is None


def test_a_board_that_cannot_be_reached_is_an_offline_run(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    began, modes = wandb.init, []

    def init(**options: Any) -> Any:
        modes.append(options.get("mode"))
        if options.get("mode") != "offline":
            raise wandb.errors.CommError("no route to host")
        return began(**options)

    monkeypatch.setattr(wandb, "init", init)
    logger = board(new_run(nobody / "runs", "a"))
    assert logger is not None
    logger.log_metrics({"val/loss": 0.5}, step=3)
    finish_board([logger], failed=False)
    assert modes == [None, "offline"]
    assert list(nobody.glob("runs/a/version_0/wandb/offline-run-*"))


def test_the_board_needs_no_home(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is full or not to be written; what is to be sent lies with the run in any case."""
    (nobody / "file").write_text("")
    monkeypatch.setenv("HOME", str(nobody / "file"))
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = new_run(nobody / "runs", "a")
    logger = board(folder)
    assert logger is not None
    picture = wandb.Image(np.zeros((4, 4, 3), np.uint8))
    logger.log_table("worst", columns=["image"], data=[[picture]])
    finish_board([logger], failed=False)
    assert list((folder / "wandb" / "artifacts" / "staging").iterdir())
    assert (nobody / "file").read_text() == ""
    assert not {"WANDB_DATA_DIR", "WANDB_CACHE_DIR"} & set(os.environ)  # the next run has its own


def test_an_offline_run_keeps_its_name_and_says_how_to_sync(
    nobody: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loggers, "rank_zero_info", said.append)
    folder = new_run(nobody / "runs", "a")
    ids = []
    for _ in range(2):  # a run, and its resumption
        logger = board(folder)
        assert logger is not None
        logger.log_metrics({"val/loss": 0.5}, step=3)
        ids.append(logger.experiment.id)
        finish_board([logger], failed=False)
    assert ids[0] == ids[1]
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    assert said[0].startswith("W&B keeps an offline run; to sync it: wandb sync runs/a/version_0/")
    assert (nobody / said[0].split()[-1]).is_dir()
    assert "WANDB_MODE" not in os.environ  # the next run decides for itself
