"""`simmim segment`: from a run of pretraining to masks, pictures, and every config."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simmim import load_encoder
from simmim.callbacks.segmentation import (
    Segmented,
    distinct_colors,
    draw_legend,
    draw_segmentations,
    for_board,
    index_picture,
    overlay,
)
from support.commands import (
    QUIET,
    SMALL,
    VIT,
    assert_same_tensors,
    column,
    quiet,
    refused,
    simmim,
    state,
    table,
)
from support.folders import make_masks, save

DEEP_VIT = VIT.replace("depth: 2", "depth: 4")  # four of its layers are read
FROM_SCRATCH = ["--model.encoder=vit_tiny_patch16_224", f"--model.encoder_kwargs={DEEP_VIT}"]
FROM_SCRATCH += ["--model.img_size=32"]


@pytest.fixture
def folder(workdir: Path) -> Path:
    return make_masks(Path("d"), train=8, val=3)


@pytest.mark.slow
def test_from_pretraining_to_masks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.mask_patch_size=8", "--trainer.max_epochs=1", "--probe.every_n_epochs=0"]
    options += ["--data.root=d/train/images", "--data.batch_size=4", "--trainer.logger=false"]
    quiet("pretrain fit --name=pre", *FROM_SCRATCH, *options)
    begun = ["--model.weights=runs/pre/version_0", "--data.root=d"]
    few = ["--data.batch_size=4", "--trainer.max_epochs=6", "--model.warmup_epochs=0"]
    few += ["--trainer.log_every_n_steps=1", "--model.base_lr=0.5"]
    sentence = refused(capsys, "segment fit --segmentations.every_n=4", *begun, *few, *QUIET)
    assert "unknown option --segmentations.every_n" in sentence
    quiet("segment fit --segmentations.every_n_epochs=4 --name=seg", *begun, *few)
    done = Path("runs/seg/version_0")
    hparams = state(done)["hyper_parameters"]
    assert hparams["num_classes"] == 2
    assert hparams["img_size"] == 32  # the weights'
    named = {"train/loss", "val/loss", "val/miou", "lr", "throughput/images_per_s"}
    assert named | {"val/iou/ground", "val/iou/box"} <= set(table(done / "metrics.csv")[0])
    losses = column(done / "metrics.csv", "val/loss")
    assert state(done, "best")["epoch"] == losses.index(min(losses))
    pictures = sorted(path.name for path in (done / "segmentations").iterdir())
    assert pictures == ["epoch_0004.png", "epoch_0006.png"]

    # A run goes on, and is scored, without what it began from.
    shutil.rmtree("runs/pre")
    quiet("segment fit --name=seg --ckpt_path=last --trainer.max_epochs=7")
    quiet("segment validate --ckpt_path=runs/seg/version_0")
    scored, logged = (column(done / name, "val/miou") for name in ("validate.csv", "metrics.csv"))
    assert scored[-1] == pytest.approx(logged[-1], abs=1e-6)
    quiet("segment test --ckpt_path=runs/seg/version_0")
    assert "test/miou" in (done / "test.csv").read_text()
    last = state(done)["state_dict"]
    encoder = load_encoder(done).state_dict()
    assert_same_tensors(encoder, {name: last[f"encoder.model.{name}"] for name in encoder})

    sizes = {"a.png": (70, 20), "sub/b.jpg": (33, 47), "sub/gray.png": (32, 32)}
    for name, (width, height) in sizes.items():
        save(Path("new", name), np.zeros((height, width) if "gray" in name else (height, width, 3)))
    quiet("segment predict --ckpt_path=runs/seg/version_0 --data.root=new")
    written = {p.relative_to(done / "predictions") for p in (done / "predictions").rglob("*.png")}
    named = {Path(name).with_suffix(".png"): size for name, size in sizes.items()}
    assert written == set(named)  # the stems of the images
    for name, size in named.items():
        with Image.open(done / "predictions" / name) as mask:
            assert (mask.mode, mask.size) == ("P", size)
            assert set(np.unique(np.asarray(mask))) <= {3, 4}
            assert mask.getpalette()[9:15] == [10, 20, 30, 250, 0, 0]  # type: ignore[index]


@pytest.mark.slow
def test_what_users_get_wrong_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simmim("segment fit --model.frozen true --print_config")  # a frozen encoder has its own recipe
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["name"], config["model"]["head"]) == ("linear", "linear")

    def fit(*args: str) -> str:
        tiny = [*FROM_SCRATCH, "--trainer.max_epochs=1", *QUIET]
        return refused(capsys, "segment fit", *tiny, *args)

    assert "data.root" in fit()
    assert "use -c linear" in fit("--data.root=d", "-c=upernet_small", "--model.frozen=true")
    assert "is missing: segmentation needs images/ and masks/" in fit("--data.root=d/train/images")
    assert "every_n_epochs -1" in fit("--data.root=d", "--segmentations.every_n_epochs=-1")
    Image.new("L", (56, 40), 77).save("d/val/masks/1.png")
    error = fit("--data.root=d")
    assert "1.png' has the value 77" in error
    assert "data.void" in error
    Image.new("L", (9, 9), 3).save("d/val/masks/1.png")
    assert "1.png' is 9 x 9 pixels" in fit("--data.root=d")


@pytest.mark.slow
def test_names_of_masks_of_0_and_255_are_learned(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in folder.glob("*/masks/*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 4, 255, 0).astype(np.uint8)).save(path)
    (folder / "classes.json").write_text(json.dumps({"classes": ["ground", "box"]}))
    few = ["--model.base_lr=0.5", "--data.jitter=false", "--model.warmup_epochs=0"]
    few += ["--trainer.max_epochs=8", "--data.batch_size=4", "--trainer.log_every_n_steps=1"]
    caplog.set_level("INFO")
    quiet("segment fit --data.root=d --model.head=linear --name=seg", *SMALL, *few)
    assert ["box", "3,200", "1,200"] in [line.split() for line in caplog.text.splitlines()]
    metrics = Path("runs/seg/version_0/metrics.csv")
    assert column(metrics, "val/iou/box")[-1] > 0.3
    assert column(metrics, "val/iou/ground")[-1] > 0.5


# Pictures ----------------------------------------------------------------------------------------


def test_a_picture_shows_classes_and_leaves_void() -> None:
    image = torch.full((3, 2, 2), 0.5)
    classes = torch.tensor([[0, 1], [-1, 0]])
    shown = overlay(image, classes, [(255, 0, 0), (0, 0, 255)])
    assert shown[:, 1, 0].tolist() == [0.5] * 3
    assert shown[:, 0, 0].tolist() == pytest.approx([0.8, 0.2, 0.2])
    assert shown[:, 0, 1].tolist() == pytest.approx([0.2, 0.2, 0.8])


def test_pictures_of_any_sizes_go_into_one_panel() -> None:
    found = [
        Segmented(torch.rand(1, 40, 60), torch.zeros(40, 60), torch.ones(40, 60)),
        Segmented(torch.rand(4, 900, 100), torch.full((900, 100), -1), torch.ones(900, 100)),
    ]
    panel = draw_segmentations(found, ["a", "b"], [(255, 0, 0), (0, 0, 255)])
    assert panel.width > 3 * 60
    images, masks = for_board(found, ["a", "b"])
    assert [i.size for i in images] == [(60, 40), (100, 900)]
    assert masks[1]["mask"]["mask_data"].max() == 255
    assert masks[0]["predicted"]["class_labels"] == {0: "a", 1: "b", 255: "void"}
    assert draw_legend(["name"] * 30, [(1, 2, 3)] * 30, 300).height > 3 * 24
    assert len(set(distinct_colors(150))) == 150


def test_masks_of_many_classes_have_16_bits(tmp_path: Path) -> None:
    classes = torch.tensor([[0, 299], [150, 1]])
    index_picture(classes, range(300), distinct_colors(300)).save(tmp_path / "m.png")
    assert np.asarray(Image.open(tmp_path / "m.png")).tolist() == classes.tolist()
    index_picture(classes[:, :1] // 150, [0, 255], distinct_colors(2)).save(tmp_path / "p.png")
    assert np.asarray(Image.open(tmp_path / "p.png")).tolist() == [[0], [255]]
