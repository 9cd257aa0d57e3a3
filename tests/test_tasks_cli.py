"""`simmim classify`, `segment`, `detect`: from a run of pretraining to predictions and pictures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simmim import load_encoder
from simmim.callbacks.classification import draw_confusion
from simmim.callbacks.segmentation import (
    Segmented,
    distinct_colors,
    draw_legend,
    draw_segmentations,
    for_board,
    index_picture,
    overlay,
)
from simmim.classify import Classifier
from support.commands import (
    QUIET,
    SMALL,
    assert_same_tensors,
    column,
    quiet,
    refused,
    simmim,
    state,
    table,
)
from support.folders import make_boxes, make_classes, make_masks, save
from support.runs import DATA, OPTIONS

FEW = ["--data.batch_size=4", "--trainer.log_every_n_steps=1", "--model.warmup_epochs=0"]
LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
TASKS: dict[str, tuple[list[str], tuple[str, Callable[..., float]], set[str], set[str]]] = {
    # options, what the best is chosen by, columns of metrics.csv, what is written
    "classify": (
        ["--model.ema_decay=0.5"],
        ("val/top1", max),
        {"val/top1"},
        {"confusion_matrix.png", "classes.csv", "val_predictions.csv"},
    ),
    "segment": (
        ["--segmentations.every_n_epochs=4"],
        ("val/loss", min),
        {"val/miou", "val/iou/ground", "val/iou/box"},
        {"segmentations/epoch_0002.png"},
    ),
    "detect": (
        [],
        ("val/map", max),
        {"val/map", *(f"train/{name}" for name in LOSSES)},
        {"detections/epoch_0002.png"},
    ),
}
SIZES = {"a.png": (70, 20), "sub/b.jpg": (33, 47), "sub/gray.png": (32, 32)}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_from_pretraining_to_predictions(
    task: str, tiny_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options, (monitor, best), columns, files = TASKS[task]
    pretraining = tiny_run("pretrain")
    DATA[task]()
    begun = [f"--model.weights={pretraining}", *OPTIONS[task]]
    sentence = refused(capsys, f"{task} validate", *begun, *QUIET, status=1)
    assert "not trained" in sentence
    quiet(f"{task} fit --name=run --trainer.max_epochs=2", *begun, *FEW, *options)
    run = Path("runs/run/version_0")
    hparams = state(run)["hyper_parameters"]
    assert hparams["img_size"] in (32, [48, 64])  # the weights', or as asked for
    assert state(run)["classes"] == (["ground", "box"] if task == "segment" else ["cat", "dog"])
    named = {"train/loss", "val/loss", "lr", "throughput/images_per_s"} | columns
    assert named <= set(table(run / "metrics.csv")[0])
    scores = column(run / "metrics.csv", monitor)
    assert state(run, "best")["epoch"] == scores.index(best(scores))
    written = {path.relative_to(run).as_posix() for path in run.rglob("*.*")}
    assert files <= written

    shutil.rmtree(pretraining)  # a run goes on, and is scored, without what it began from
    quiet(f"{task} fit --name=run --ckpt_path=last --trainer.max_epochs=3")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["weights"] == str(pretraining)
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    quiet(f"{task} validate --ckpt_path={run}")
    scored, logged = (column(run / name, "val/loss") for name in ("validate.csv", "metrics.csv"))
    assert scored[-1] == pytest.approx(logged[-1], rel=1e-5)
    quiet(f"{task} test --ckpt_path={run}")
    assert f"test/{monitor[4:]}" in table(run / "test.csv")[0]
    last = state(run)["state_dict"]
    encoder = load_encoder(run).state_dict()
    assert_same_tensors(encoder, {name: last[f"encoder.model.{name}"] for name in encoder})

    for name, (width, height) in SIZES.items():
        save(Path("new", name), np.zeros((height, width) if "gray" in name else (height, width, 3)))
    quiet(f"{task} predict --ckpt_path={run} --data.root=new")
    {"classify": check_labels, "segment": check_masks, "detect": check_boxes}[task](run)


def check_labels(run: Path) -> None:
    """One row an image, of the average of the weights."""
    content = state(run)
    head = "encoder.model.head.weight"
    assert not torch.equal(content["state_dict"][head], content["current_model_state"][head])
    rows = table(run / "predictions.csv")
    assert [row["path"] for row in rows] == [f"new/{name}" for name in SIZES]
    model = Classifier.load_from_checkpoint(run / "checkpoints/last.ckpt").eval()
    with torch.no_grad():
        shares = model(model.normalize(torch.zeros(1, 3, 32, 32).byte())).softmax(1)[0].tolist()
    for row in rows:
        found = [float(row[f"probability of {name}"]) for name in ("cat", "dog")]
        assert found == pytest.approx(shares, abs=1e-4)
        assert row["label"] == ["cat", "dog"][found[1] > found[0]]


def check_masks(run: Path) -> None:
    """One mask an image, of its size and stem, with the values and colours of the data."""
    pictures = run / "predictions"
    named = {Path(name).with_suffix(".png"): size for name, size in SIZES.items()}
    assert {path.relative_to(pictures) for path in pictures.rglob("*.png")} == set(named)
    for name, size in named.items():
        with Image.open(pictures / name) as mask:
            assert (mask.mode, mask.size) == ("P", size)
            assert set(np.unique(np.asarray(mask))) <= {3, 4}
            assert mask.getpalette()[9:15] == [10, 20, 30, 250, 0, 0]  # type: ignore[index]


def check_boxes(run: Path) -> None:
    """One picture an image, and boxes in the pixels of the file."""
    with Image.open(run / "detections/epoch_0002.png") as picture:
        assert picture.width > 1000  # truth and prediction, side by side
    found = {path.relative_to(run / "predictions") for path in run.glob("predictions/**/*.png")}
    assert found == {Path(name).with_suffix(".png") for name in SIZES}
    results = json.loads((run / "predictions.json").read_text())
    places = {one["file_name"]: one["image_id"] for one in results}
    assert places == {name: i for i, name in enumerate(SIZES, 1)}
    assert {one["category_id"] for one in results} <= {3, 7}
    for one in results:
        width, height = SIZES[one["file_name"]]
        left, top, w, h = one["bbox"]
        assert -0.01 <= left <= left + w <= width + 0.02
        assert -0.01 <= top <= top + h <= height + 0.02
    assert not list(run.glob(".predictions*"))


# Classes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_labels_from_fit_to_predict(workdir: Path) -> None:
    make_classes(Path("images"), names="cat dog")
    rows = [
        f"{kind}/{i:03d}.png,{kind};{'odd' if i % 2 else 'even'}"
        for kind in ("cat", "dog")
        for i in range(10)
    ]
    Path("labels.csv").write_text("\n".join(["path,labels", *rows]))
    options = ["--data.labels=labels.csv", "--model.multi_label=true", "--trainer.max_epochs=2"]
    options += ["--model.class_weights=balanced", "--data.val_fraction=0.3", "--data.root=images"]
    quiet("classify fit --name=several", *SMALL, *FEW, *options)
    run = Path("runs/several/version_0")
    shares = column(run / "metrics.csv", "val/mean_ap")
    assert state(run, "best")["epoch"] == shares.index(max(shares))
    names = ["cat", "dog", "even", "odd"]
    assert [row["class"] for row in table(run / "classes.csv")] == names
    quiet(f"classify test --ckpt_path={run}")
    Path("labels.csv").unlink()  # not needed to predict
    for name in ("predictions.csv", "predictions_2.csv"):  # an earlier table stays
        quiet(f"classify predict --ckpt_path={run} --data.root=images/cat")
        assert len(table(run / name)) == 10
        for row in table(run / name):
            likely = [name for name in names if float(row[f"probability of {name}"]) > 0.5]
            assert row["label"] == ";".join(likely)


@pytest.mark.slow
def test_a_folder_that_lacks_a_class_is_scored_by_name(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gray = {"cat": 20, "dog": 130, "eel": 240}
    for root, names in {"all": "cat dog eel", "two": "dog eel", "new": "dog fox"}.items():
        for name in names.split():
            for i in range(10):
                save(Path(root, name, f"{i}.png"), np.full((32, 32), gray.get(name, 0) + i))
    options = ["--data.val_fraction=0.5", "--model.base_lr=0.05", "--trainer.max_epochs=20"]
    quiet("classify fit --name=three --data.root=all", *SMALL, *FEW, *options)
    Path("two/cat").mkdir()
    run, shares = Path("runs/three/version_0"), []
    for root in ("all", "two"):
        quiet(f"classify validate --ckpt_path={run} --data.root={root}")
        shares.append(table(run / "validate.csv")[-1])
    for name in ("dog", "eel"):
        assert shares[1][f"val/top1_class/{name}"] == shares[0][f"val/top1_class/{name}"]
    assert float(shares[1]["val/top1_class/eel"]) > 0.5
    line = f"classify test --ckpt_path={run} --data.root=new"
    sentence = refused(capsys, line, status=1)
    assert "the data has the classes dog, fox, this classifier knows cat, dog, eel" in sentence


@pytest.mark.slow
def test_a_frozen_encoder_has_a_recipe_of_its_own(
    tiny_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.root=images", "--model.frozen=true", "--model.layer=1"]
    quiet(f"classify fit --model.weights={tiny_run('pretrain')} --trainer.max_epochs=1", *options)
    kept = yaml.safe_load(Path("runs/linear_probe/version_0/config.yaml").read_text())
    assert kept["model"]["frozen"]
    assert kept["model"]["base_lr"] == 0.1  # the probe's, not that of fine-tuning
    capsys.readouterr()
    simmim("segment fit --model.frozen true --print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["name"], config["model"]["head"]) == ("linear", "linear")


@pytest.mark.slow
def test_names_of_masks_of_0_and_255_are_learned(
    workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_masks(Path("d"), train=8, val=3)
    for path in folder.glob("*/masks/*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 4, 255, 0).astype(np.uint8)).save(path)
    (folder / "classes.json").write_text(json.dumps({"classes": ["ground", "box"]}))
    options = ["--model.base_lr=0.5", "--data.jitter=false", "--trainer.max_epochs=8"]
    caplog.set_level("INFO")
    quiet("segment fit --data.root=d --model.head=linear --name=seg", *SMALL, *FEW, *options)
    assert ["box", "3,200", "1,200"] in [line.split() for line in caplog.text.splitlines()]
    metrics = Path("runs/seg/version_0/metrics.csv")
    assert column(metrics, "val/iou/box")[-1] > 0.3
    assert column(metrics, "val/iou/ground")[-1] > 0.5


@pytest.mark.exhaustive
def test_masks_of_objects_are_found_drawn_and_written(workdir: Path) -> None:
    make_boxes(Path("boxes"), outlines=True, train=8, val=3)
    quiet("detect fit --name=det --trainer.max_epochs=1", *SMALL, *FEW, *OPTIONS["detect"])
    run = Path("runs/det/version_0")
    assert {"train/loss_mask", "val/mask_map"} <= set(table(run / "metrics.csv")[0])
    quiet(f"detect predict --ckpt_path={run} --data.root=boxes/val")
    results = json.loads((run / "predictions.json").read_text())
    places = {(one["file_name"], one["image_id"]) for one in results}
    assert places <= {(f"{i:03d}.png", i) for i in range(3)}
    assert results[0]["segmentation"]["size"] == [48, 64]


@pytest.mark.slow
def test_a_run_without_validation_objects_names_no_best_score(
    workdir: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    file = make_boxes(Path("boxes"), train=8, val=3) / "val" / "annotations.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    caplog.set_level("INFO")
    quiet("detect fit --name=det --trainer.max_epochs=1", *SMALL, *FEW, *OPTIONS["detect"])
    assert "val/map was never a number" in caplog.text
    assert "best val/map" not in caplog.text
    assert any("val has no objects that count" in str(w.message) for w in recwarn)
    assert "best/map" not in table(Path("runs/det/version_0/metrics.csv"))[0]


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_users_get_wrong_is_one_sentence(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_boxes(Path("boxes"), train=2, val=1)
    make_masks(Path("d"), train=2, val=1)
    for name, value in {"odd": 77, "small": 3}.items():
        make_masks(Path(name), train=2, val=1)
        size = (9, 9) if name == "small" else (40, 56)
        save(Path(name, "val/masks/0.png"), np.full(size, value))
    Path("notes.txt").write_text("cats and dogs\nand more\n")
    for line, words in {
        "classify fit --data.root=d --model.weights=no/such": "no/such does not exist: give",
        "classify fit --data.root=d --model.weights=notes.txt": "is not a file of weights",
        "segment fit --data.root=d --segmentations.every_n=4": "unknown option --segmentations.",
        "segment fit --data.root=d --segmentations.every_n_epochs=-1": "every_n_epochs -1",
        "segment fit --data.root=d -c=upernet_small --model.frozen=true": "use -c linear",
        "segment fit --data.root=d/train/images": "segmentation needs images/ and masks/",
        "segment fit --data.root=odd": "0.png' has the value 77",
        "segment fit --data.root=small": "0.png' is 9 x 9 pixels",
        "detect fit --data.root=boxes/train --data.annotations=no.json": "no.json cannot be read",
        "detect fit --data.root=boxes --model.maks=true": "did you mean --model.masks",
        "detect fit --data.root=boxes --model.masks=true": "no segmentation",
        "detect fit": "give data.root",
    }.items():
        assert words in refused(capsys, line, *SMALL, *QUIET), line


# Pictures and tables -----------------------------------------------------------------------------


def test_the_confusion_matrix_is_drawn() -> None:
    counts = torch.tensor([[9, 1], [0, 0]])
    picture = draw_confusion(counts, ["cat", "日本語 that the font does not have"])
    x, y = picture.width - 8 - 2 * 120 + 3, picture.height - 8 - 2 * 120 + 3
    shades = [picture.getpixel((x + i % 2 * 120, y + i // 2 * 120)) for i in range(4)]
    assert shades[0] < shades[1] < shades[2] == shades[3]  # dark = 9 of 10, ..., 0 of 0
    assert draw_confusion(torch.eye(1000).long(), [str(i) for i in range(1000)]).width > 2000


def test_pictures_of_any_sizes_go_into_one_panel_and_leave_void() -> None:
    shown = overlay(
        torch.full((3, 2, 2), 0.5), torch.tensor([[0, 1], [-1, 0]]), [(255, 0, 0), (0, 0, 255)]
    )
    assert shown[:, 1, 0].tolist() == [0.5] * 3
    assert shown[:, 0, 1].tolist() == pytest.approx([0.2, 0.2, 0.8])
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
