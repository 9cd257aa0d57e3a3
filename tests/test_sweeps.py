"""Every W&B sweep names options that exist, with values that they take; two are run."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps import schema_violations_from_proposed_config
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb.sdk.sweeps.run_state import RunState
from wandb.sdk.sweeps.scheduler.optimizer import RunWithMetrics
from wandb.sdk.sweeps.scheduler.wandb import WandbOptimizer
from wandb.sdk.sweeps.sweep_info import SweepInfo

from board_records import history, records, summary
from simmim.pretrain import SimMIM
from support.commands import QUIET, SMALL_SIMMIM
from support.folders import make_classes
from support.processes import run_program

SWEEPS = sorted((Path(__file__).parents[1] / "configs" / "sweep").glob("*.yaml"))


def _values(parameter: dict[str, Any]) -> list[Any]:
    if "value" in parameter:
        return [parameter["value"]]
    return parameter.get("values") or [parameter["min"], parameter["max"]]


@pytest.mark.slow
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


def agent_words(sweep: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The command of a run, as W&B's agent words it."""
    args = create_sweep_command_args({"args": config})["args"]
    filled = {"${env}": [], "simmim": [sys.executable, "-m", "simmim"], "${args}": args}
    return [part for word in sweep["command"] for part in filled.get(word, [word])]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_each_file_is_a_sweep_to_wandb(path: Path) -> None:
    assert schema_violations_from_proposed_config(yaml.safe_load(path.read_text())) == []


OPTIONS = [*SMALL_SIMMIM, *QUIET, "--model.drop_path_rate=0", "--model.compile=false"]
OPTIONS += ["--data.batch_size=8", "--trainer.precision=32-true", "--trainer.max_epochs=1"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "metric"), [("mask_ratio", "val/probe_top1"), ("lr", "val/loss")])
def test_a_sweep_is_run(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, name: str, metric: str
) -> None:
    """W&B's local controller asks for two runs, and is told what each has come to, offline."""
    make_classes(Path("images"), 20)
    sweep = yaml.safe_load((SWEEPS[0].parent / f"{name}.yaml").read_text())
    sweep["parameters"]["data.root"]["value"] = "images"
    assert sweep["metric"]["name"] == metric
    controller = WandbOptimizer(SweepInfo("local", name, "nobody", "simmim", sweep, "controller"))
    # The address of a W&B service that another test here has begun and ended.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    board = {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "local"}
    key = next(key for key, value in sweep["parameters"].items() if "value" not in value)
    tried = []
    for number in range(2):
        (asked,) = controller.ask_n_runs(1)
        run_id = f"sweep{number}"
        words = agent_words(sweep, asked.config.wire_dict())
        run_program(*words, *OPTIONS, **board, WANDB_RUN_ID=run_id)
        run = Path(f"runs/swin_base_100ep/version_{number}")
        model = yaml.safe_load((run / "config.yaml").read_text())["model"]
        tried.append(model[key.removeprefix("model.")])
        assert tried[-1] == pytest.approx(float(asked.config[key].value))
        (log,) = (run / "wandb").glob(f"offline-run-*-{run_id}")
        assert records(log, "run")[0]["sweep_id"] == "local"
        said = summary(log)
        assert said[metric] == history(log)[metric][-1]
        told = RunWithMetrics(asked.config, RunState.FINISHED, run_id, said, [])
        controller.tell_run(asked.run_id, told)
    assert tried[0] != tried[1]
    if name == "mask_ratio":
        assert tried == [0.4, 0.5]
