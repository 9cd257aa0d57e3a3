"""Every W&B sweep names options that exist, with values that they take."""

from pathlib import Path
from typing import Any

import pytest
import yaml

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
