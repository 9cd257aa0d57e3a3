"""Command lines in this process, the smallest model, and what a run leaves."""

import csv
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from simmim.cli import main
from simmim.weights.files import read_checkpoint

VIT = "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}"
SMALL = ["--model.encoder=vit_tiny_patch16_224", f"--model.encoder_kwargs={VIT}"]
SMALL += ["--model.img_size=32"]
SMALL_SIMMIM = [*SMALL, "--model.mask_patch_size=8"]
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.num_workers=0",
]
TINY = """
model:
  encoder: vit_tiny_patch16_224
  img_size: 32
  mask_patch_size: 8
  encoder_kwargs: {patch_size: 8, embed_dim: 16, depth: 1, num_heads: 1}
  drop_rate: 0.1
  base_lr: 0.1
  warmup_epochs: 1
data: {root: images, batch_size: 4, num_workers: 0}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 4
  gradient_clip_val: 5.0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
probe: {every_n_epochs: 0}
reconstructions: {every_n_epochs: 0}
"""

# Options of TINY for runs that are killed and go on: what is random about training is on.
EXACT: dict[str, dict[str, Any]] = {
    "model": {
        "encoder_kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 1},
        "drop_path_rate": 0.1,
    },
    "data": {"val_fraction": 0.2},
    "probe": {"every_n_epochs": 2},
    "worst": {"every_n_epochs": 0},
}


def write_tiny(folder: Path, **sections: dict[str, Any]) -> None:
    """Write TINY to tiny.yaml, with other options in some of its sections."""
    config = yaml.safe_load(TINY)
    for name, options in sections.items():
        config[name] = {**config.get(name, {}), **options}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


def words_of(line: str, *words: str) -> list[str]:
    """The words of a command line, then those that are given one by one."""
    return [*shlex.split(line), *words]


def simmim(line: str, *words: str) -> None:
    """Run a command line that succeeds."""
    assert main(words_of(line, *words)) == 0


def quiet(line: str, *words: str) -> None:
    """Run the command line of a task that succeeds, on the processor and without output."""
    simmim(line, *words, *QUIET)


def refused(
    capsys: pytest.CaptureFixture[str],
    line: str,
    *words: str,
    status: int | None = None,
    alone: bool = False,
) -> str:
    """Run a command line that fails: the sentence that ends (or is `alone`) on stderr."""
    capsys.readouterr()
    found = main(words_of(line, *words))
    assert found == status if status is not None else found != 0
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("simmim: "), said
    assert not any("Traceback" in line for line in said), said
    assert len(said) == 1 or not alone, said
    return said[-1]


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(path: Path, name: str) -> list[float]:
    """The numbers of a column of a CSV file, where it has any."""
    return [float(row[name]) for row in table(path) if row[name]]


def state(run: Path | str, name: str = "last") -> dict[str, Any]:
    """What a checkpoint of a run holds."""
    return read_checkpoint(Path(run, f"checkpoints/{name}.ckpt"))


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Compare the tensors of two states to the bit."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
