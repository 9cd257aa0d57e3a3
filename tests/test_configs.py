"""Every config is read, says what it must, and starts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmim.command_line.configuration import (
    EXPERIMENTS,
    config_folder,
    find_config,
    packaged_configs,
)
from simmim.pretrain import SimMIM
from support import exhaustive
from support.commands import quiet, simmim, state
from support.folders import make_boxes, make_classes, make_images, make_masks
from support.processes import command, in_processes

CONFIGS = sorted(path.stem for path in (config_folder() / "pretrain").glob("*.yaml"))
ALL = [(t, n) for t, _, n in (x.partition("/") for x in packaged_configs()) if t in EXPERIMENTS]
LARGE = ("convnext_base", "swin_base", "vitdet_base")  # they take longest, even when made small
OVERLAYS = sorted(path.stem for path in (config_folder() / "overlay").glob("*.yaml"))
SMALL: dict[str, Any] = {  # by the beginning of the encoder's name
    "vit_": {"embed_dim": 16, "depth": 2, "num_heads": 1},
    "beit_": {"embed_dim": 16, "depth": 2, "num_heads": 1},
    "swin": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2},
    "convnext": {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
}


def read(name: str, folder: str = "pretrain") -> dict[str, Any]:
    text = (config_folder() / folder / f"{name}.yaml").read_text()
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def options(values: dict[str, Any]) -> list[str]:
    words = {name: v if isinstance(v, str) else json.dumps(v) for name, v in values.items()}
    return [f"--{name}={word}" for name, word in words.items()]


@pytest.mark.slow
@pytest.mark.parametrize("name", [exhaustive(n) if n in LARGE else n for n in CONFIGS])
def test_a_config_starts(workdir: Path, name: str) -> None:
    make_classes(Path("images"), 4, size=64)
    encoder = read(name)["model"]["encoder"]
    small = next(kwargs for start, kwargs in SMALL.items() if encoder.startswith(start))
    small = {f"model.encoder_kwargs.{key}": value for key, value in small.items()}
    size = {} if name == "digits" else {"model.img_size": 64}
    eager = {"model.compile": False}  # minutes, and tested in test_speed.py
    run = {
        "data.root": "images",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "data.val_fraction": 0.25,
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.devices": 1,
        "probe.layer": 1,
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
    }
    simmim(f"pretrain fit -c {name} cpu", *options({**small, **size, **eager, **run}))
    folder = Path("runs") / name / "version_0"
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text())["name"] == name


TASKS = {  # the options of a small run on the data that `task_data` makes
    "classify": "--data.root=images --data.batch_size=4 --model.img_size=32",
    "segment": "--data.root=masks --data.batch_size=2 --data.short_side=40 --model.img_size=32 "
    "--model.stride=20 --model.decoder_channels=16",
    "detect": "--data.root=boxes --data.batch_size=2 --model.img_size=64 --model.fpn_channels=16 "
    "--model.proposals=50",
}
DEEP_VIT = "{patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}"
BEIT = DEEP_VIT.replace("{", "{use_rel_pos_bias: true, use_shared_rel_pos_bias: false, ")
SWIN = "{embed_dim: 16, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1], window_size: 2}"
SMALL_ENCODERS = {  # by a word in the config's name
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "vit": ("beit_base_patch16_224", BEIT),
    "": ("vit_tiny_patch16_224", DEEP_VIT),
}


@pytest.fixture
def task_data(workdir: Path) -> None:
    make_classes(Path("images"))
    make_masks(Path("masks"), train=8, val=3)
    make_boxes(Path("boxes"), outlines=True, train=8, val=3)


@pytest.mark.slow
@pytest.mark.usefixtures("task_data")
@pytest.mark.parametrize(
    ("task", "name"),
    [exhaustive(t, n) if n in LARGE else (t, n) for t, n in ALL if t in TASKS],
)
def test_a_config_of_a_task_starts(task: str, name: str) -> None:
    encoder, kwargs = next(small for word, small in SMALL_ENCODERS.items() if word in name)
    model = [f"--model.encoder={encoder}", f"--model.encoder_kwargs={kwargs}"]
    model += ["--trainer.precision=32-true", "--trainer.fast_dev_run=true"]
    quiet(f"{task} fit -c={name} {TASKS[task]}", *model)


@pytest.mark.parametrize(("task", "name"), ALL)
def test_a_config_says_how_where_and_what_to_expect(task: str, name: str) -> None:
    text = (config_folder() / task / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 60
    head = text[: text.index("\nmodel:")]
    chosen = "" if EXPERIMENTS[task] == f"{task}/{name}" else f" -c {name}"
    assert f"#   simmim {task} fit{chosen}" in head
    assert "Hardware: " in head
    if task in ("pretrain", "segment"):
        assert re.search("Hours: |Time", head)
        assert re.search("Expect: |numbers: ", head)
    assert "# What changes the result" in text
    assert "# What does not" in text


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_about_the_trainer_alone(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(read(name, "overlay")) == {"trainer"}
    simmim(f"pretrain fit -c swin_base_100ep {name} --print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["name"] == "swin_base_100ep"
    for key, value in read(name, "overlay")["trainer"].items():
        said = config["trainer"][key]
        if isinstance(value, dict):  # an object: its options beside their defaults
            assert said["class_path"] == value["class_path"]
            assert value["init_args"].items() <= said["init_args"].items()
        else:
            assert said == value


# The paper's facts (section 4 and the released configs) -------------------------------------------

PAPER = {
    # encoder, img_size, epochs, base_lr, warm-up from, schedule, drop path
    "swin_base_100ep": (
        "swin_base_patch4_window7_224", 192, 100, 2e-4, 1e-6, "cosine", 0.0,
    ),
    "swin_base_800ep": (
        "swin_base_patch4_window7_224", 192, 800, 1e-4, 5e-7, "multistep", 0.0,
    ),
    "swin_large_800ep": (
        "swin_large_patch4_window7_224", 192, 800, 1e-4, 5e-7, "multistep", 0.0,
    ),
    "vit_base_800ep": (
        "beit_base_patch16_224", 224, 800, 1e-4, 5e-7, "multistep", 0.1,
    ),
    "swinv2_base_800ep": (
        "swinv2_base_window12_192", 192, 800, 1e-4, 5e-7, "multistep", 0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_are_the_papers(name: str) -> None:
    encoder, img_size, epochs, base_lr, warmup_lr, schedule, drop_path_rate = PAPER[name]
    config = read(name)
    model = config["model"]
    assert (model["encoder"], model["img_size"]) == (encoder, img_size)
    assert (model["base_lr"], model["warmup_lr"]) == (base_lr, warmup_lr)
    assert (model["schedule"], model["drop_path_rate"]) == (schedule, drop_path_rate)
    assert (model["warmup_epochs"], model["weight_decay"]) == (10, 0.05)
    assert (model["mask_patch_size"], model["mask_ratio"]) == (32, 0.6)
    assert config["trainer"]["max_epochs"] == epochs
    assert config["trainer"]["gradient_clip_val"] == 5.0
    if schedule == "multistep":
        assert model["milestones"] == [700]
    else:
        assert model["min_lr"] == 1e-5


# parameters of the encoder without a classifier, in millions: of the papers' tables
SIZES = {
    "swin_base_100ep": (86.7, 32),  # 88 M with the classifier's 1.0 M
    "swin_large_800ep": (195.2, 32),  # 197 M, less 1.5 M, with the tables of window 12
    "vit_base_800ep": (85.8, 16),  # 86 M
    "swinv2_base_800ep": (86.9, 32),  # 88 M
    "convnext_base": (87.6, 32),  # 89 M
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SIZES)
def test_the_full_size_is_the_papers(name: str) -> None:
    model = SimMIM(**read(name)["model"])
    millions, stride = SIZES[name]
    count = sum(p.numel() for n, p in model.encoder.named_parameters() if "mask_token" not in n)
    assert count / 1e6 == pytest.approx(millions, abs=0.3)
    assert model.encoder.stride == stride


RELEASED = {  # img_size, window, layer decay, drop path, factor of the head
    "finetune_vit_base": (224, None, 0.65, 0.1, 0.001),
    "finetune_swin_base_100ep": (224, 7, 0.9, 0.1, 1.0),
    "finetune_swin_base_800ep": (224, 7, 0.8, 0.1, 1.0),
    "finetune_swin_large": (224, 14, 0.7, 0.2, 1.0),
    "finetune_swinv2_base": (224, 14, 0.75, 0.1, 1.0),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_numbers_are_in_the_configs(name: str) -> None:
    config = read(name, "classify")
    model, said = config["model"], RELEASED[name]
    size, window, layer_decay, drop_path_rate, head_init_scale = said
    assert (model["img_size"], model["encoder_kwargs"].get("window_size")) == (size, window)
    assert (model["layer_decay"], model["drop_path_rate"]) == (layer_decay, drop_path_rate)
    assert model.get("head_init_scale", 1.0) == head_init_scale
    assert (model["mixup"], model["cutmix"], model["label_smoothing"]) == (0.8, 1.0, 0.1)
    assert (model["base_lr"], model["warmup_epochs"]) == (1.25e-3, 20)
    assert (model["warmup_lr"], model["min_lr"]) == (2.5e-7, 2.5e-7)
    assert (model["weight_decay"], model["random_erasing"]) == (0.05, 0.25)
    assert "schedule" not in model or model["schedule"] == "cosine"
    assert config["data"]["randaugment"] == "rand-m9-mstd0.5-inc1"
    assert (config["data"]["crop_scale"], config["data"]["val_crop"]) == ([0.08, 1.0], 0.875)
    assert (config["trainer"]["max_epochs"], config["trainer"]["gradient_clip_val"]) == (100, 5.0)
    head = (config_folder() / "classify" / f"{name}.yaml").read_text()
    devices = int(re.findall(r"as (\d+) GPUs", head)[0])
    assert devices * config["data"]["batch_size"] == 2048
    if name == "finetune_vit_base":  # a table for each block, mean of the patch tokens
        assert model["encoder_kwargs"] == {
            "use_rel_pos_bias": True,
            "use_shared_rel_pos_bias": False,
        }
        assert model["pooling"] == "mean"


def test_the_numbers_of_segmentation_are_the_papers() -> None:
    numbers = {  # lr at a batch of 16, weight decay, drop path, layer decay, channels
        "upernet_vit_base": (1e-4, 0.05, 0.1, 0.65, 768),
        "upernet_swin_base": (6e-5, 0.01, 0.3, None, 512),
    }
    for name, said in numbers.items():
        config = read(name, "segment")
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


def test_the_numbers_of_detection_are_the_papers() -> None:
    vitdet, swin = read("vitdet_base", "detect"), read("swin_base", "detect")
    assert vitdet["model"]["base_lr"] * 64 / 512 == pytest.approx(1e-4)
    assert swin["model"]["base_lr"] * 16 / 512 == pytest.approx(1e-4)
    assert (vitdet["model"]["layer_decay"], vitdet["model"]["drop_path_rate"]) == (0.7, 0.1)
    assert (vitdet["model"]["img_size"], vitdet["trainer"]["max_epochs"]) == (1024, 100)
    assert (swin["model"]["weight_decay"], swin["trainer"]["max_epochs"]) == (0.05, 36)


# Names -------------------------------------------------------------------------------------------


def test_configs_are_found_by_name_folder_and_path(tmp_path: Path) -> None:
    expected = config_folder() / "pretrain" / "swin_base_100ep.yaml"
    for name in (
        "swin_base_100ep",
        "swin_base_100ep.yaml",
        "pretrain/swin_base_100ep",
        "configs/pretrain/swin_base_100ep.yaml",
        str(expected),
    ):
        assert find_config(name, "pretrain").resolve() == expected.resolve()
    assert find_config("bf16", "pretrain").parent.name == "overlay"
    assert not any(name.startswith("sweep/") for name in packaged_configs())


def test_a_file_comes_before_a_packaged_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text("model: {}\n")
    assert find_config("digits.yaml", "pretrain") == Path("digits.yaml")
    assert find_config("digits", "pretrain") == config_folder() / "pretrain" / "digits.yaml"


@pytest.mark.exhaustive
@pytest.mark.parametrize("overlay", ["ddp", "fsdp", "slurm"])
def test_a_recipe_runs_with_an_overlay_of_several_processes(workdir: Path, overlay: str) -> None:
    """The paper's ViT, made small, on two processes without a GPU; its gradients are clipped."""
    make_images(Path("images/a"), 20, 64)
    small = {f"model.encoder_kwargs.{key}": value for key, value in SMALL["beit_"].items()}
    run = {
        "model.img_size": 64,
        "data.root": "images",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.precision": "32-true",
        "probe.layer": 1,
        "reconstructions.every_n_epochs": 0,
    }
    words = ["pretrain", "fit", "-c", "vit_base_800ep", "-c", overlay, *options({**small, **run})]
    in_processes(2, command, *words)
    folder = Path("runs/vit_base_800ep/version_0")
    assert state(folder)["global_step"] == 2
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["gradient_clip_val"] == 5
