"""`simmim detect`: from a run of pretraining to boxes on pictures, and every config."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from simmim.cli import main
from simmim.configuration import config_folder
from test_detect import blocks, outlined

# jsonargparse's own, about what LightningCLI calls
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

CONFIGS = sorted(path.stem for path in (config_folder() / "detect").glob("*.yaml"))
VIT = "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"
SWIN = "{embed_dim: 16, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2], window_size: 2}"
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.num_workers=0",
]
FEW = [
    "--data.batch_size=4",
    "--trainer.max_epochs=1",
    "--trainer.log_every_n_steps=1",
    "--model.fpn_channels=16",
    "--model.proposals=50",
    "--model.rois_per_image=16",
    "--model.warmup_epochs=0",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images with boxes, below the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    blocks(tmp_path / "blocks" / "train", 8)
    blocks(tmp_path / "blocks" / "val", 3)
    return tmp_path / "blocks"


def run(*args: str) -> None:
    assert main([*args, *QUIET]) == 0


def pretrain(folder: Path) -> None:
    run(
        "pretrain",
        "fit",
        f"--data.root={folder}",
        "--model.encoder=vit_tiny_patch16_224",
        "--model.img_size=48",
        "--model.mask_patch_size=8",
        f"--model.encoder_kwargs={VIT}",
        "--data.batch_size=8",
        "--trainer.max_epochs=1",
        "--trainer.logger=false",
        "--probe.every_n_epochs=0",
        "--reconstructions.every_n_epochs=0",
        "--name=pre",
    )


def test_from_pretraining_to_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(folder)
    options = ("--model.weights=runs/pre/version_0", f"--data.root={folder}")
    run("detect", "fit", *options, *FEW, "--name=det", "--model.img_size=[48, 64]")
    done = Path("runs/det/version_0")
    checkpoint = torch.load(done / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["classes"] == ["cat", "dog"]
    assert checkpoint["hyper_parameters"]["masks"] is False
    assert (done / "checkpoints/best.ckpt").exists()
    with (done / "metrics.csv").open() as file:
        columns = set(next(csv.DictReader(file)))
    parts = {"loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert {f"train/{part}" for part in parts} | {"lr", "val/map", "val/loss"} <= columns
    with Image.open(done / "detections/epoch_0001.png") as picture:
        assert picture.width > 1000  # truth and prediction, side by side

    capsys.readouterr()
    assert main(["detect", "validate", *options, *QUIET]) == 1
    assert "not trained yet" in capsys.readouterr().err.strip().splitlines()[-1]

    shutil.rmtree("runs/pre")  # a run goes on without what it began from
    run("detect", "fit", "--name=det", "--ckpt_path=last", "--trainer.max_epochs=2")
    assert (done / "detections/epoch_0002.png").exists()
    config = yaml.safe_load((done / "config.yaml").read_text())
    assert config["model"]["weights"] == "runs/pre/version_0"
    run("detect", "validate", "--ckpt_path=runs/det/version_0")
    run("detect", "test", "--model.weights=runs/det/version_0", f"--data.root={folder}")
    with (done / "validate.csv").open() as file:
        assert 0 <= float(next(csv.DictReader(file))["val/map"]) <= 1


def test_predict_draws_a_picture_for_every_image_of_any_folder(folder: Path) -> None:
    options = [f"--model.encoder_kwargs={VIT}", "--model.encoder=vit_tiny_patch16_224"]
    options += ["--model.img_size=[48, 64]", f"--data.root={folder}", "--name=det"]
    run("detect", "fit", *options, *FEW, "--model.score_threshold=0.0")
    any_folder = folder.parent / "any"
    (any_folder / "sub").mkdir(parents=True)
    shutil.copy(folder / "val" / "000.png", any_folder / "sub" / "a.png")
    Image.new("L", (300, 20), 90).save(any_folder / "strip.jpg")
    run("detect", "predict", "--ckpt_path=runs/det/version_0", f"--data.root={any_folder}")
    done = Path("runs/det/version_0")
    pictures = done / "predictions"
    found = {p.relative_to(pictures).as_posix() for p in pictures.rglob("*.png")}
    assert found == {"sub/a.png", "strip.png"}
    results = json.loads((done / "predictions.json").read_text())
    assert {one["file_name"]: one["image_id"] for one in results} == {
        "strip.jpg": 1,
        "sub/a.png": 2,
    }
    assert {one["category_id"] for one in results} <= {3, 7}
    for one in results:
        width, height = (300, 20) if one["image_id"] == 1 else (64, 48)
        left, top, w, h = one["bbox"]
        assert -0.01 <= left <= left + w <= width + 0.02
        assert -0.01 <= top <= top + h <= height + 0.02
    assert not list(done.glob(".predictions*"))


def test_masks_are_found_drawn_and_written(folder: Path) -> None:
    for part in ("train", "val"):
        outlined(folder / part)
    options = [f"--model.encoder_kwargs={SWIN}", "--model.encoder=swin_tiny_patch4_window7_224"]
    options += ["--model.img_size=64", f"--data.root={folder}", "--name=det"]
    run("detect", "fit", *options, *FEW, "--model.score_threshold=0.0")
    done = Path("runs/det/version_0")
    with (done / "metrics.csv").open() as file:
        assert {"train/loss_mask", "val/mask_map"} <= set(next(csv.DictReader(file)))
    run("detect", "predict", "--ckpt_path=runs/det/version_0", f"--data.root={folder / 'val'}")
    results = json.loads((done / "predictions.json").read_text())
    assert results[0]["segmentation"]["size"] == [48, 64]


@pytest.mark.exhaustive
def test_two_processes_score_what_one_scores(folder: Path) -> None:
    for part in ("train", "val"):  # 3 validation images: one process has one more than the other
        outlined(folder / part)
    options = [f"--model.encoder_kwargs={VIT}", "--model.encoder=vit_tiny_patch16_224"]
    options += ["--model.img_size=[48, 64]", f"--data.root={folder}", "--name=det", *FEW, *QUIET]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "-W", "ignore", "-m", "simmim", "detect"]
    subprocess.run([*command, "fit", *options, "--data.batch_size=2", *two], check=True)
    for more in ([], two):
        options = ["--ckpt_path=runs/det/version_0", f"--data.root={folder}", *QUIET, *more]
        subprocess.run([*command, "validate", "--data.batch_size=1", *options], check=True)
    with Path("runs/det/version_0/validate.csv").open() as file:
        one, other = list(csv.DictReader(file))
    for name in [name for name in one if "map" in name or "mar" in name]:
        assert one[name] == other[name], name
    assert float(one["val/mar_100"]) > 0
    # The part that is about masks is a mean over the boxes of a batch, which has other images.
    assert float(one["val/loss"]) == pytest.approx(float(other["val/loss"]), rel=0.1)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_starts(folder: Path, config: str) -> None:
    encoder, kwargs = "vit_tiny_patch16_224", VIT
    if "swin" in config:
        encoder, kwargs = "swin_tiny_patch4_window7_224", SWIN
    elif "vit" in config:
        encoder = "beit_base_patch16_224"
        kwargs = VIT.replace("{", "{use_rel_pos_bias: true, use_shared_rel_pos_bias: false, ")
    run(
        "detect",
        "fit",
        f"-c={config}",
        f"--data.root={folder}",
        "--data.batch_size=2",
        f"--model.encoder={encoder}",
        f"--model.encoder_kwargs={kwargs}",
        "--model.img_size=64",
        "--model.fpn_channels=16",
        "--model.proposals=50",
        "--trainer.precision=32-true",
        "--trainer.fast_dev_run=true",
    )


def test_the_published_numbers_are_in_the_configs() -> None:
    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load(
            (config_folder() / "detect" / f"{name}.yaml").read_text()
        )
        return content

    vitdet, swin = read("vitdet_base"), read("swin_base")
    assert vitdet["model"]["base_lr"] * 64 / 512 == pytest.approx(1e-4)
    assert swin["model"]["base_lr"] * 16 / 512 == pytest.approx(1e-4)
    assert (vitdet["model"]["layer_decay"], vitdet["model"]["drop_path_rate"]) == (0.7, 0.1)
    assert (vitdet["model"]["img_size"], vitdet["trainer"]["max_epochs"]) == (1024, 100)
    assert (swin["model"]["weight_decay"], swin["trainer"]["max_epochs"]) == (0.05, 36)
    for name in CONFIGS:
        text = (config_folder() / "detect" / f"{name}.yaml").read_text()
        assert len(text.splitlines()) <= 60
        assert "simmim detect fit" in text
        assert "Hardware: " in text
        assert "Expect: " in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data.root=no"], "no' does not exist"),
        (["--data.root=blocks/train", "--data.annotations=no.json"], "no.json cannot be read"),
        (["--data.root=blocks", "--model.maks=true"], "did you mean --model.masks"),
        (["--data.root=blocks", "--model.masks=true"], "no segmentation"),
        (["--data.root=blocks", "--model.weights=no/such"], "no/such"),
        ([], "give data.root"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    small = [f"--model.encoder_kwargs={VIT}", "--model.encoder=vit_tiny_patch16_224"]
    assert main(["detect", "fit", *args, *small, "--model.img_size=48", *QUIET]) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("simmim: ")
    assert words in said
