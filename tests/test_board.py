"""The board: what an offline run has recorded, read back curve by curve and panel by panel."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from board_records import config, history, records
from simmim.cli import main
from simmim.loggers import lineage

# jsonargparse's own, about what LightningCLI calls
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

Make = Callable[..., Path]
TINY = [
    "--model.encoder=vit_tiny_patch16_224",
    "--model.img_size=32",
    "--model.mask_patch_size=8",
    "--model.encoder_kwargs={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "--probe.layer=2",
]
QUIET = [
    "--data.root=images",
    "--data.batch_size=8",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
CURVES = {
    "train/loss",
    "val/loss",
    "gap/loss",
    "best/loss",
    "lr",
    "val/avg_dist",
    "throughput/images_per_s",
    "throughput/data_wait",
    "throughput/batch_size",
    "train/grad_norm",
    "memory/max_gib",
    "collapse/effective_rank",
    "collapse/feature_variance",
    "val/knn_top1",
    "val/probe_top1",
    "best/probe_top1",
    "attention/entropy_1",
    "attention/distance_1",
    "histograms/mask_token_mean",
    "histograms/head_std",
}
HISTOGRAMS = ("mask_token", "head", "prediction", "target")


@pytest.fixture
def offline(tmp_path: Path, make_images: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with images of two classes, and nobody who is logged in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("cat", "dog"):
        make_images(tmp_path / "images" / name, 20, size=32)
    return tmp_path


def pretrain(*args: str) -> Path:
    assert main(["pretrain", "fit", "--name=pre", *TINY, *QUIET, *args]) == 0
    return Path("runs/pre/version_0")


def board_of(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*"))


def media(run: Path, values: dict[str, list[Any]], panel: str) -> list[Path]:
    """The files of a panel, over all its steps."""
    names = values.get(f"{panel}.filenames") or [[n] for n in values[f"{panel}.path"]]
    return [run / "files" / name for step in names for name in step]


def artifacts(run: Path) -> list[Any]:
    return [r.artifact for r in records(run) if r.HasField("artifact")]


def tables(run: Path, panel: str) -> list[dict[str, str]]:
    """The files of each table of a panel: where they lie, by their names."""
    return [
        {entry.path: entry.local_path for entry in artifact.manifest.contents}
        for artifact in artifacts(run)
        if any(entry.path == f"{panel}.table.json" for entry in artifact.manifest.contents)
    ]


def test_pretraining_and_what_follows(offline: Path) -> None:
    run = pretrain(
        "--trainer.max_epochs=2",
        "--probe.every_n_epochs=1",
        "--board.tags=[small, cats]",
        "--board.group=first",
        "--board.notes=two classes",
        "--board.log_checkpoints=true",
    )
    (board,) = board_of(run)
    values = history(board)
    assert values.keys() >= CURVES
    assert len(media(board, values, "reconstructions")) == 2  # untrained, and after the last
    assert all(path.stat().st_size for path in media(board, values, "reconstructions"))
    for name in HISTOGRAMS:
        assert values[f"histograms/{name}._type"] == ["histogram"] * 2
    (table,) = tables(board, "worst")
    content = json.loads(Path(table["worst.table.json"]).read_text())
    assert content["columns"] == ["rank", "picture", "loss", "path"]
    assert all(Path(table[row[1]["path"]]).stat().st_size for row in content["data"])
    with (run / "worst.csv").open(newline="") as file:
        listed = [row["path"] for row in csv.DictReader(file)]
    assert [row[3] for row in content["data"]] == listed
    assert Path(listed[0]).is_file()

    begun = next(r.run for r in records(board) if r.HasField("run"))
    assert (begun.run_group, list(begun.tags), begun.notes, begun.job_type, begun.project) == (
        "first",
        ["small", "cats"],
        "two classes",
        "pretrain",
        "simmim",
    )
    (artifact,) = (a for a in artifacts(board) if a.type == "model")
    assert artifact.name == f"model-{begun.run_id}"
    assert {"best", "latest"} == set(artifact.aliases)

    with (run / "metrics.csv").open(newline="") as file:
        assert set(next(csv.reader(file))) >= CURVES

    # A fine-tuning from it says whose weights it began with.
    weights = f"--model.weights={run}"
    fit = ["classify", "fit", "--name=fine", weights, *QUIET, "--trainer.max_epochs=1"]
    assert main(fit) == 0
    (fine,) = board_of(Path("runs/fine/version_0"))
    assert config(fine)["lineage"] == {
        "weights": str(run),
        "run": begun.run_id,
        "artifact": f"model-{begun.run_id}:best",
    }
    assert not [a for a in artifacts(fine) if a.type == "model"]  # off by default
    assert next(r.run for r in records(fine) if r.HasField("run")).job_type == "classify"
    (table,) = tables(fine, "predictions")
    content = json.loads(Path(table["predictions.table.json"]).read_text())
    assert content["columns"] == ["picture", "path", "label", "prediction", "probability"]
    assert {row[2] for row in content["data"]} == {"cat", "dog"}
    (table,) = tables(fine, "confusion_table")
    content = json.loads(Path(table["confusion_table.table.json"]).read_text())
    with Path("runs/fine/version_0/classes.csv").open(newline="") as file:
        images = {row["class"]: int(row["images"]) for row in csv.DictReader(file)}
    for name, count in images.items():
        assert sum(row[2] for row in content["data"] if row[0] == name) == count
    assert history(fine).keys() >= {"val/top1", "best/top1", "gap/loss", "train/grad_norm"}


def test_a_resumed_run_is_the_same_on_the_board(offline: Path) -> None:
    quick = ["--probe.every_n_epochs=0", "--reconstructions.every_n_epochs=0"]
    run = pretrain("--trainer.max_epochs=1", *quick)
    pretrain("--trainer.max_epochs=2", "--ckpt_path=last", *quick)
    first, second = board_of(run)
    assert first.name.split("-")[-1] == second.name.split("-")[-1]  # the id
    before, after = (history(board)["trainer/global_step"] for board in (first, second))
    assert max(before) < min(after)
    assert max(history(second)["best/loss"]) <= min(history(first)["val/loss"])
    # What is asked of its checkpoint reads the same config.
    assert main(["pretrain", "validate", "--ckpt_path=last", "--name=pre", *QUIET]) == 0


def test_lineage_of_what_is_no_run_of_ours(tmp_path: Path) -> None:
    assert lineage(None) == {}
    assert lineage("timm:vit_base_patch16_224") == {"weights": "timm:vit_base_patch16_224"}
    assert lineage(str(tmp_path / "x.pth")) == {"weights": str(tmp_path / "x.pth")}
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_id.txt").write_text("abc\n")
    expected = {"run": "abc", "artifact": "model-abc:best"}
    for weights in (tmp_path, tmp_path / "checkpoints" / "last.ckpt"):
        assert lineage(str(weights)) == {"weights": str(weights), **expected}
