"""Every W&B sweep names options that exist, with values that they take; one is run."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import yaml

import simmim
from board_records import history
from simmim.pretrain import SimMIM

SWEEPS = sorted((Path(__file__).parents[1] / "configs" / "sweep").glob("*.yaml"))


def _values(parameter: dict[str, Any]) -> list[Any]:
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_each_value_makes_a_model(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    assert sweep["command"][:4] == ["${env}", "simmim", "pretrain", "fit"]
    assert sweep["command"][-1] == "${args}"
    assert sweep["metric"]["name"] in ("val/loss", "val/probe_top1")
    parameters = dict(sweep["parameters"])
    assert parameters.pop("data.root")
    names = {name.removeprefix("model.") for name in parameters}
    fixed = {n.removeprefix("model."): p["value"] for n, p in parameters.items() if "value" in p}
    for name in names - set(fixed) or names:
        for value in _values(parameters[f"model.{name}"]):
            _small_swin(**{**fixed, name: value})


def _small_swin(**options: Any) -> SimMIM:
    parsed = {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in options.items()}
    size = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 6}
    if "variant" in (parsed.get("head_kwargs") or {}):
        parsed["head_kwargs"] |= {"depths": [1, 1]}
    return SimMIM(
        "swin_base_patch4_window7_224", img_size=192, encoder_kwargs=size, **parsed
    ).train()


def command_lines(sweep: dict[str, Any]) -> Iterator[list[str]]:
    """The runs of a grid, as W&B's agent words them: --NAME=VALUE, the last varies fastest."""
    parameters = sweep["parameters"]
    for values in product(*(_values(parameter) for parameter in parameters.values())):
        args = [f"--{name}={value}" for name, value in zip(parameters, values, strict=True)]
        python = [sys.executable, "-m"]
        filled = {"${env}": [], "simmim": [*python, "simmim"], "${args}": args}
        yield [part for word in sweep["command"] for part in filled.get(word, [word])]


def test_the_agent_words_its_options_as_we_do() -> None:
    """W&B's own agent makes of a run's parameters what `command_lines` makes of them."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    given = {"model.mask_ratio": {"value": 0.4}, "model.head": {"value": "mlp"}}
    worded = create_sweep_command_args({"args": given})["args"]
    sweep = {"parameters": given, "command": ["${args}"]}
    assert worded == next(command_lines(sweep))


def test_a_sweep_is_run(
    tmp_path: Path, make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of the sweep of mask ratios, offline, each compared by the sweep's own metric."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        make_images(tmp_path / "images" / name, 20, size=32)
    sweep = yaml.safe_load((SWEEPS[0].parent / "mask_ratio.yaml").read_text())
    sweep["parameters"]["data.root"]["value"] = "images"
    small = [
        "--model.img_size=32",
        "--model.mask_patch_size=8",
        "--model.encoder=vit_tiny_patch16_224",
        "--model.encoder_kwargs={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
        "--model.drop_path_rate=0",
        "--model.compile=false",
        "--data.batch_size=8",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.precision=32-true",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
    ]
    environment = {
        # Without the address of a W&B service that another test here has begun and ended.
        **{k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"},
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "local",
        "PYTHONPATH": str(Path(simmim.__file__).parents[1]),
    }
    found = {}
    for number, command in enumerate(islice(command_lines(sweep), 2)):
        environment["WANDB_RUN_ID"] = f"sweep{number}"
        done = subprocess.run(
            [*command, *small], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        run = tmp_path / "runs" / "swin_base_100ep" / f"version_{number}"
        ratio = yaml.safe_load((run / "config.yaml").read_text())["model"]["mask_ratio"]
        (board,) = (run / "wandb").glob(f"offline-run-*-sweep{number}")
        values = history(board)
        found[ratio] = values[sweep["metric"]["name"]][-1]
        assert values["val/avg_dist"]
    assert list(found) == [0.4, 0.5]
    assert all(0 <= score <= 1 for score in found.values())
    assert sweep["metric"]["goal"] == "maximize"
