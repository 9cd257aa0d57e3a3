"""`simmim detect`: from a run of pretraining to boxes on pictures, and every config."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from support.commands import QUIET, VIT, column, quiet, refused, state, table
from support.folders import make_boxes, save

SWIN = "{embed_dim: 16, depths: [1, 1, 1, 1], num_heads: [1, 1, 2, 2], window_size: 2}"
FEW = [
    "--data.root=boxes",
    "--data.batch_size=4",
    "--trainer.max_epochs=1",
    "--trainer.log_every_n_steps=1",
    "--model.fpn_channels=16",
    "--model.proposals=50",
    "--model.rois_per_image=16",
    "--model.warmup_epochs=0",
]
SMALL_VIT = ["--model.encoder=vit_tiny_patch16_224", f"--model.encoder_kwargs={VIT}"]


@pytest.fixture
def folder(workdir: Path) -> Path:
    """Images with boxes, below the working folder."""
    return make_boxes(Path("boxes"), train=8, val=3)


@pytest.mark.slow
def test_from_pretraining_to_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.img_size=48", "--model.mask_patch_size=8", "--probe.every_n_epochs=0"]
    options += ["--data.root=boxes", "--trainer.max_epochs=1", "--trainer.logger=false"]
    quiet("pretrain fit --name=pre --data.batch_size=8", *SMALL_VIT, *options)
    begun = "--model.weights=runs/pre/version_0"
    quiet("detect fit --name=det", begun, *FEW, "--model.img_size=[48, 64]")
    done = Path("runs/det/version_0")
    content = state(done)
    assert content["classes"] == ["cat", "dog"]
    assert content["hyper_parameters"]["masks"] is False
    assert (done / "checkpoints/best.ckpt").exists()
    columns = set(table(done / "metrics.csv")[0])
    parts = {"loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert {f"train/{part}" for part in parts} | {"lr", "val/map", "val/loss"} <= columns
    with Image.open(done / "detections/epoch_0001.png") as picture:
        assert picture.width > 1000  # truth and prediction, side by side

    sentence = refused(capsys, "detect validate --data.root=boxes", begun, *QUIET, status=1)
    assert "not trained yet" in sentence

    shutil.rmtree("runs/pre")  # a run goes on without what it began from
    quiet("detect fit --name=det --ckpt_path=last --trainer.max_epochs=2")
    assert (done / "detections/epoch_0002.png").exists()
    config = yaml.safe_load((done / "config.yaml").read_text())
    assert config["model"]["weights"] == "runs/pre/version_0"
    quiet("detect validate --ckpt_path=runs/det/version_0")
    quiet("detect test --model.weights=runs/det/version_0 --data.root=boxes")
    assert 0 <= column(done / "validate.csv", "val/map")[0] <= 1


@pytest.mark.slow
def test_predict_draws_a_picture_for_every_image_of_any_folder(
    tiny_run: Callable[[str], Path],
) -> None:
    done = tiny_run("detect")
    save(Path("any/strip.jpg"), np.full((20, 300), 90))
    Path("any/sub").mkdir()
    shutil.copy("boxes/val/000.png", "any/sub/a.png")
    quiet(f"detect predict --ckpt_path={done} --data.root=any")
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


@pytest.mark.slow
def test_masks_are_found_drawn_and_written(workdir: Path) -> None:
    make_boxes(Path("boxes"), outlines=True, train=8, val=3)
    options = ["--model.encoder=swin_tiny_patch4_window7_224", f"--model.encoder_kwargs={SWIN}"]
    options += ["--model.img_size=64", "--model.score_threshold=0.0"]
    quiet("detect fit --name=det", *FEW, *options)
    done = Path("runs/det/version_0")
    assert {"train/loss_mask", "val/mask_map"} <= set(table(done / "metrics.csv")[0])
    quiet("detect predict --ckpt_path=runs/det/version_0 --data.root=boxes/val")
    results = json.loads((done / "predictions.json").read_text())
    assert {(one["file_name"], one["image_id"]) for one in results} <= {
        (f"{i:03d}.png", i) for i in range(3)
    }
    assert results[0]["segmentation"]["size"] == [48, 64]


@pytest.mark.slow
def test_a_run_without_validation_objects_names_no_best_score(
    folder: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    file = folder / "val" / "annotations.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "annotations": []}))
    caplog.set_level("INFO")
    quiet("detect fit --name=det", *SMALL_VIT, "--model.img_size=[48, 64]", *FEW)
    assert "val/map was never a number" in caplog.text
    assert "best val/map" not in caplog.text
    assert any("val has no objects that count" in str(w.message) for w in recwarn)
    assert "best/map" not in table(Path("runs/det/version_0/metrics.csv"))[0]


def test_mistakes_are_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in {
        "--data.root=boxes/train --data.annotations=no.json": "no.json cannot be read",
        "--data.root=boxes --model.maks=true": "did you mean --model.masks",
        "--data.root=boxes --model.masks=true": "no segmentation",
        "": "give data.root",
    }.items():
        line = f"detect fit {args} --model.img_size=48"
        assert words in refused(capsys, line, *SMALL_VIT, *QUIET)
