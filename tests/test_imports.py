"""Who may import whom: the reading order is the order of the data, without circles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "simmim"
ENCODER = {
    "encoder",
    "observe",
    "visible",
    "windows",
    "attention",
    "own_encoder",
}  # encoder, and parts of its own
METHOD = {"masking", "head", "target", "loss"} | ENCODER
TASKS = {"pretrain", "classify", "segment", "detect", "callbacks"}
SHARED = {
    "optim",
    "weights",
    "probe",
    "training",
    "speed",
    "downstream",
    "augment",
    "transfer",
    "scores",
    "readout",
    "pyramid",
    "dense",
    "sliding",
    "rcnn",
    "average_precision",
    "strategies",
    "xla",
    "recipe",
    "own",
}
COMMANDS = {"embed", "export", "compare", "doctor", "benchmark"}
REPORT = {"report", "checkpoints"}  # from what lies in a run's folder; knows no task
RUNS = {"run", "configuration", "mistakes", "inner_runs"}  # where a run lies, how one is begun
FREE = {"parts", "durable", "bar"}  # find a part by its name, write a file, show progress
MAY_IMPORT = {
    **{area: {"masking"} for area in METHOD},
    "encoder": {"masking"} | ENCODER,
    "windows": {"attention"},
    **{area: METHOD | SHARED | {"pretrain"} for area in SHARED},
    **{area: METHOD | SHARED | TASKS for area in TASKS},
    "strategies": {"checkpoints", "weights"},
    "data": {"data", "masking"},
    "report": RUNS | REPORT | {"scores"},
    **{area: METHOD | SHARED | TASKS | {"data"} for area in COMMANDS},
    "compare": METHOD | SHARED | TASKS | RUNS | REPORT | {"data"},
    "doctor": METHOD | SHARED | TASKS | RUNS | REPORT | {"data"},
    "benchmark": METHOD | SHARED | TASKS | RUNS | {"data", "task", "loggers"},
}


def _area(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simmim."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("simmim.")}
    return found


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_follow_the_data(path: Path) -> None:
    area = _area(path)
    if area in MAY_IMPORT:
        assert _imports(path) <= MAY_IMPORT[area] | FREE | {area}


def test_method_files_stay_small_enough_to_read() -> None:
    for name in METHOD | {"pretrain"}:
        lines = len((SRC / f"{name}.py").read_text().splitlines())
        most = 250 if name == "pretrain" else 500  # it is the page to begin with
        assert lines < most, f"{name}.py has {lines} lines"


def test_importing_simmim_does_not_import_torch() -> None:
    code = "import sys, simmim, simmim.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
