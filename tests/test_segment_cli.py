"""`simmim segment`: from a run of pretraining to masks, pictures, and every config."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simmim import load_encoder
from simmim.callbacks.segmentation import (
    Segmentations,
    Segmented,
    distinct_colors,
    draw_legend,
    draw_segmentations,
    for_board,
    index_picture,
    overlay,
)
from simmim.cli import main
from simmim.configuration import config_folder

# jsonargparse's own, about what LightningCLI calls
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

CONFIGS = sorted(path.stem for path in (config_folder() / "segment").glob("*.yaml"))
TINY_VIT = "{patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}"
TINY_SWIN = "{embed_dim: 16, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1], window_size: 4}"
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.num_workers=0",
]
CLASSES = {"classes": ["ground", "box"], "ignore_index": 9, "values": [3, 4]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A red box on gray in each image, the two classes 3 and 4, and a border of void."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    root = tmp_path / "d"
    for part, n in (("train", 8), ("val", 3)):
        for i in range(n):
            mask = np.full((40, 56), 3, np.uint8)
            mask[:4] = 9
            mask[8 + i : 28 + i, 4 * i + 4 : 4 * i + 24] = 4
            image = np.where(mask[..., None] == 4, (220, 20, 20), (90, 90, 90)).astype(np.uint8)
            for kind, pixels in (("images", image), ("masks", mask)):
                (root / part / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / part / kind / f"{i}.png")
    said = {**CLASSES, "palette_rgb": [[10, 20, 30], [250, 0, 0]]}
    (root / "classes.json").write_text(json.dumps(said))
    return root


def run(*args: str) -> None:
    assert main([*args, *QUIET]) == 0


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one sentence with which a command fails."""
    capsys.readouterr()
    assert main([*args, *QUIET]) != 0
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_from_pretraining_to_masks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "pretrain",
        "fit",
        f"--data.root={folder / 'train' / 'images'}",
        "--model.encoder=vit_tiny_patch16_224",
        "--model.img_size=32",
        "--model.mask_patch_size=8",
        f"--model.encoder_kwargs={TINY_VIT}",
        "--data.batch_size=4",
        "--trainer.max_epochs=1",
        "--trainer.logger=false",
        "--probe.every_n_epochs=0",
        "--reconstructions.every_n_epochs=0",
        "--name=pre",
    )
    options = ("--model.weights=runs/pre/version_0", f"--data.root={folder}")
    few = ("--data.batch_size=4", "--trainer.max_epochs=6", "--model.warmup_epochs=0")
    few += ("--trainer.log_every_n_steps=1", "--model.base_lr=0.5", "--segmentations.every_n=4")
    assert "unknown option --segmentations.every_n" in refused(
        capsys, "segment", "fit", *options, *few
    )
    few = (*few[:-1], "--segmentations.every_n_epochs=4")
    run("segment", "fit", *options, *few, "--name=seg")
    done = Path("runs/seg/version_0")
    checkpoint = torch.load(done / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["num_classes"] == 2
    assert checkpoint["hyper_parameters"]["img_size"] == 32  # the weights'
    with (done / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    named = {"train/loss", "val/loss", "val/miou", "lr", "throughput/images_per_s"}
    assert named | {"val/iou/ground", "val/iou/box"} <= set(rows[0])
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    best = torch.load(done / "checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] == losses.index(min(losses))
    pictures = sorted(path.name for path in (done / "segmentations").iterdir())
    assert pictures == ["epoch_0004.png", "epoch_0006.png"]

    # A run goes on, and is scored, without what it began from.
    shutil.rmtree("runs/pre")
    run("segment", "fit", "--name=seg", "--ckpt_path=last", "--trainer.max_epochs=7")
    run("segment", "validate", "--ckpt_path=runs/seg/version_0")
    with (done / "validate.csv").open() as file:
        scored = list(csv.DictReader(file))[-1]
    with (done / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["val/miou"]][-1]
    assert float(scored["val/miou"]) == pytest.approx(float(logged["val/miou"]), abs=1e-6)
    run("segment", "test", "--ckpt_path=runs/seg/version_0")
    assert "test/miou" in (done / "test.csv").read_text()
    encoder = load_encoder(done)
    state = {k: v for k, v in encoder.state_dict().items()}
    last = torch.load(done / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, last[f"encoder.model.{k}"]) for k, v in state.items())

    sizes = {"a.png": (70, 20), "sub/b.jpg": (33, 47), "sub/gray.png": (32, 32)}
    for name, size in sizes.items():
        path = Path("new") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if "gray" in name else "RGB", size).save(path)
    run("segment", "predict", "--ckpt_path=runs/seg/version_0", "--data.root=new")
    written = {p.relative_to(done / "predictions") for p in (done / "predictions").rglob("*.png")}
    assert written == {Path(f"{name}.png") for name in sizes}
    for name, size in sizes.items():
        with Image.open(done / "predictions" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", size)
            assert set(np.unique(np.asarray(mask))) <= {3, 4}
            assert mask.getpalette()[9:15] == [10, 20, 30, 250, 0, 0]  # type: ignore[index]


def test_what_users_get_wrong_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ("--model.encoder=vit_tiny_patch16_224", "--model.img_size=32")
    tiny += (f"--model.encoder_kwargs={TINY_VIT}", "--trainer.max_epochs=1")

    def fit(*args: str) -> str:
        return refused(capsys, "segment", "fit", *tiny, *args)

    assert "data.root" in fit()
    assert "use -c linear" in fit("--data.root=d", "-c=upernet_small", "--model.frozen=true")
    assert "does not exist" in fit("--data.root=nowhere")
    assert "is missing: segmentation needs images/ and masks/" in fit("--data.root=d/train/images")
    assert "cannot be read" in fit("--data.root=d", "--data.classes=none.json")
    assert "not trained to segment" in refused(
        capsys, "segment", "validate", *tiny, "--data.root=d"
    )
    Image.new("L", (56, 40), 77).save("d/val/masks/1.png")
    error = fit("--data.root=d")
    assert "1.png' has the value 77" in error
    assert "data.void" in error
    Image.new("L", (9, 9), 3).save("d/val/masks/1.png")
    assert "1.png' is 9 x 9 pixels" in fit("--data.root=d")
    Path("d/val/masks/1.png").unlink()
    assert "have no mask, such as" in fit("--data.root=d")


def test_names_of_masks_of_0_and_255_are_learned(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in folder.glob("*/masks/*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 4, 255, 0).astype(np.uint8)).save(path)
    (folder / "classes.json").write_text(json.dumps({"classes": ["ground", "box"]}))
    tiny = ["--model.encoder=vit_tiny_patch16_224", "--model.img_size=32", "--model.head=linear"]
    tiny += [f"--model.encoder_kwargs={TINY_VIT}", "--model.base_lr=0.5", "--data.jitter=false"]
    tiny += ["--model.warmup_epochs=0", "--trainer.max_epochs=8", "--data.batch_size=4"]
    run("segment", "fit", "--data.root=d", *tiny, "--trainer.log_every_n_steps=1", "--name=seg")
    assert ["box", "3,200", "1,200"] in [line.split() for line in caplog.text.splitlines()]
    with Path("runs/seg/version_0/metrics.csv").open() as file:
        scores = [row for row in csv.DictReader(file) if row["val/miou"]][-1]
    assert float(scores["val/iou/box"]) > 0.3
    assert float(scores["val/iou/ground"]) > 0.5


def test_a_frozen_encoder_has_the_recipe_of_the_linear_head(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["segment", "fit", "--model.frozen", "true", "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["name"], config["model"]["head"]) == ("linear", "linear")


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_starts(folder: Path, config: str) -> None:
    encoder, kwargs = "vit_tiny_patch16_224", TINY_VIT
    if "swin" in config:
        encoder, kwargs = "swin_tiny_patch4_window7_224", TINY_SWIN
    elif "vit" in config:
        encoder = "beit_base_patch16_224"
        kwargs = TINY_VIT.replace("{", "{use_rel_pos_bias: true, use_shared_rel_pos_bias: false, ")
    run(
        "segment",
        "fit",
        f"-c={config}",
        f"--data.root={folder}",
        "--data.batch_size=2",
        "--data.short_side=40",
        f"--model.encoder={encoder}",
        f"--model.encoder_kwargs={kwargs}",
        "--model.img_size=32",
        "--model.stride=20",
        "--model.decoder_channels=16",
        "--trainer.precision=32-true",
        "--trainer.fast_dev_run=true",
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_how_where_and_what_to_expect(name: str) -> None:
    text = (config_folder() / "segment" / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 60
    head = text[: text.index("\nmodel:")]
    chosen = "" if name == "upernet_small" else f" -c {name}"
    assert f"#   simmim segment fit{chosen} --model.weights CKPT --data.root" in head
    assert "Hardware: " in head
    assert "Hours: " in head or "Time " in head
    assert "Expect: " in head
    assert "# What changes the result" in text
    assert "# What does not" in text


def test_the_published_numbers_are_in_the_configs() -> None:
    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load(
            (config_folder() / "segment" / f"{name}.yaml").read_text()
        )
        return content

    numbers = {  # lr at a batch of 16, weight decay, drop path, layer decay, channels
        "upernet_vit_base": (1e-4, 0.05, 0.1, 0.65, 768),
        "upernet_swin_base": (6e-5, 0.01, 0.3, None, 512),
    }
    for name, said in numbers.items():
        config = read(name)
        model = config["model"]
        assert (
            pytest.approx(model["base_lr"] * 16 / 512),
            model["weight_decay"],
            model["drop_path_rate"],
            model.get("layer_decay"),
            model["decoder_channels"],
        ) == said
        steps = 20210 // 16
        assert config["trainer"]["max_epochs"] * steps == pytest.approx(160_000, rel=0.005)
        assert model["warmup_epochs"] * steps == pytest.approx(1500, abs=5)
        assert (model["img_size"], config["data"]["short_side"]) == (512, 512)


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


@pytest.mark.parametrize("options", [{"every_n_epochs": -1}, {"num_images": 0}])
def test_wrong_numbers_of_pictures_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="use"):
        Segmentations(**options)
