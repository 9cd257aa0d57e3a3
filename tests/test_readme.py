"""What the README shows, and the answers to questions, work as they are written there."""

import re
import shlex
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from PIL import Image

from simmim import Classifier, ImageFolderData, SimMIM
from simmim.cli import main
from simmim.command_line.configuration import packaged_configs
from simmim.commands.benchmark import MEASURES as BENCHMARKS
from simmim.commands.compare import compare
from simmim.commands.doctor import doctor
from simmim.commands.embed import embed
from simmim.commands.export import export
from simmim.data.classification import ClassificationData
from support.folders import make_classes, make_images, save, write_coco

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
QUESTIONS = (ROOT / "docs" / "faq.md").read_text()
SMALL = {
    "--model.encoder": "vit_tiny_patch16_224",
    "--model.encoder_kwargs": "{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "--model.img_size": "32",
    "--model.mask_patch_size": "8",
    "--data.batch_size": "4",
    "--data.num_workers": "0",
    "--trainer.accelerator": "cpu",
    "--trainer.max_epochs": "1",
}
SHORT = {  # of the commands that go on from such a run
    "classify": "--data.batch_size 4 --data.num_workers 0 --trainer.max_epochs 1",
    "segment": "--data.batch_size 2 --data.num_workers 0 --trainer.max_epochs 1",
    "detect": "--data.batch_size 2 --data.num_workers 0 --trainer.max_epochs 1",
    "embed": "--num_workers 0 --accelerator cpu",
    "compare": "--budgets [2] --seeds 2 --epochs 1 --min_steps 1 --accelerator cpu",
    "export": "",
}
LOOK = {  # of those that need none
    "doctor": "--estimate false --workers 1",
    "benchmark": "--seconds 0.1 --workers 1 --batch_size 4 --consumes 10 --accelerator cpu",
}


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _commands(text: str = README) -> list[str]:
    blocks = _blocks("sh", text)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.split("\n")]
    return [line for line in lines if line]


def _small(words: list[str]) -> list[str]:
    """What makes a pretraining small, and leaves what the command is about."""
    small = dict(SMALL)
    if {"--model.encoder", "--model.img_size"} & set(words):
        small |= {"--model.img_size": "64", "--model.mask_patch_size": "32"}
        small["--model.encoder_kwargs"] = small["--model.encoder_kwargs"].replace("4,", "16,")
    if "--model.encoder" in words:
        del small["--model.encoder_kwargs"]
    return [word for option in small.items() if option[0] not in words for word in option]


@pytest.fixture
def folders(workdir: Path) -> None:
    data = workdir / "path/to"
    make_classes(data / "images", 12)
    make_images(data / "other/images", 12)
    for split in ("train", "val"):
        make_images(data / "scenes" / split / "images", 4)
        make_images(data / "boxes" / split, 4)
        for i in range(4):
            save(data / f"scenes/{split}/masks/{i:03d}.png", np.indices((32, 32))[1] // 16)
        images = [(i, f"{i:03d}.png") for i in range(4)]
        objects: list[Any] = [(i, 3, [4, 6, 12, 14]) for i in range(4)]
        write_coco(data / "boxes" / split / "annotations.json", images, objects, (32, 32))


@pytest.fixture
def scans(folders: None) -> None:
    """16-bit scans of four patients."""
    folder = Path("path/to/scans")
    folder.mkdir(parents=True)
    y, x = np.mgrid[:40, :40]
    for i in range(12):
        pixels = (2000 + 1900 * np.sin(x / (5 + i) + y / 7)).astype(np.uint16)
        Image.fromarray(pixels).save(folder / f"patient{i % 4}_{i}.png")


@pytest.mark.slow
@pytest.mark.usefixtures("folders")
@pytest.mark.filterwarnings("ignore")  # a reader's session, where warnings are no errors
def test_the_python_of_the_readme() -> None:
    blocks = _blocks("python")
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.usefixtures("folders")
@pytest.mark.filterwarnings("ignore")
def test_the_commands_of_the_readme_one_after_the_other() -> None:
    commands = [shlex.split(line)[1:] for line in _commands() if line.startswith("simmim pretrain")]
    assert {words[1] for words in commands} == {"fit", "validate", "predict"}
    small = [word for option in SMALL.items() for word in option]
    for words in commands:
        starts, goes_on = words[1] == "fit" and "last" not in words, words[1] == "fit"
        extra = small if starts else ["--trainer.max_epochs", "2"] if goes_on else []
        assert main([*words, *extra]) == 0, words
    run = Path("runs/image_folder/version_0")
    assert len(list((run / "predictions").rglob("*.png"))) == 12


@pytest.mark.slow
@pytest.mark.usefixtures("folders")
@pytest.mark.filterwarnings("ignore")
def test_every_command_that_goes_on_from_a_run() -> None:
    small = [word for option in SMALL.items() for word in option]
    fit = ["pretrain", "fit", "-c", "image_folder", "--data.root", "path/to/images"]
    assert main([*fit, *small]) == 0
    commands = [shlex.split(line)[1:] for line in _commands() if line.startswith("simmim ")]
    commands = [words for words in commands if words[0] != "pretrain"]
    assert {words[0] for words in commands} >= set(SHORT)
    for words in commands:
        task = "fit" in words or "predict" in words
        extra = (SHORT | LOOK)[words[0]].split()
        extra += ["--trainer.accelerator", "cpu"] if task else []
        if "predict" in words:  # its model is what the checkpoint says
            extra = [word for word in extra if word not in ("--trainer.max_epochs", "1")]
        assert main([*words, *extra]) == 0, words
    assert Path("features.map.png").is_file()
    assert Path("encoder/model.safetensors").is_file()
    assert Path("runs/finetune_small/version_0/predictions.csv").is_file()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("scans")
@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_questions_one_after_the_other() -> None:
    lines = _commands(QUESTIONS)
    assert all(line.startswith("simmim ") for line in lines)
    for words in (shlex.split(line)[1:] for line in lines):
        extra = [*(SHORT | LOOK).get(words[0], "").split()]
        if words[:2] == ["pretrain", "fit"]:
            extra = ["--trainer.max_epochs", "2"] if "last" in words else _small(words)
        elif words[1] in ("fit", "predict"):
            extra += ["--trainer.accelerator", "cpu"]
        assert main([*words, *extra]) == 0, words


def test_every_option_of_the_questions_exists() -> None:
    """By name, also of those between the lines; the test before this one runs them."""
    makers = (SimMIM, Classifier, ImageFolderData, ClassificationData, L.Trainer)
    commands = (compare, doctor, embed, export, BENCHMARKS["data"])
    known = {name for what in (*makers, *commands) for name in signature(what).parameters}
    options = re.findall(r"(?<=[ `])--([\w.]+)", QUESTIONS)
    assert len(options) > 50
    assert {option.split(".")[-1] for option in options} <= known | {"ckpt_path", "name"}


def test_every_make_target_of_the_readme_exists() -> None:
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"it"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named <= targets


def test_every_config_of_the_readme_exists() -> None:
    named = set(re.findall(r"`((?:swin|vit|swinv2)_[a-z]+_\d+ep)`", README))
    named |= set(re.findall(r"-c (\w+)", README + QUESTIONS))
    assert named <= {name.split("/")[-1] for name in packaged_configs()}


def test_the_picture_of_the_readme_is_there() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_every_file_of_the_questions_exists() -> None:
    for path in re.findall(r"`(configs/[\w/.]+)`", QUESTIONS):
        assert (ROOT / path).is_file(), path
