"""Read back what an offline W&B run has recorded, with wandb's own reader: `wandb leet inspect`."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

Record = dict[str, Any]


def records(folder: Path, kind: str) -> list[Record]:
    """The records of a kind (run, history, artifact ...) of a run's folder, in order."""
    return [record[kind] for record in _read(folder.resolve()) if record["type"] == kind]


def history(folder: Path) -> dict[str, list[Any]]:
    """Each curve and panel: its values in order."""
    found: dict[str, list[Any]] = {}
    for record in records(folder, "history"):
        for key, value in record["item"].items():
            found.setdefault(key, []).append(value)
    return found


def summary(folder: Path) -> dict[str, Any]:
    """What the board shows of a run in its table."""
    found: dict[str, Any] = {}
    for record in records(folder, "summary"):
        found |= record.get("update", {})
    return found


def config(folder: Path) -> dict[str, Any]:
    """The options as the board shows them."""
    found: dict[str, Any] = {}
    for record in [run.get("config", {}) for run in records(folder, "run")]:
        found |= record.get("update", {})
    for record in records(folder, "config"):
        found |= record.get("update", {})
    return found


@cache  # a finished run's file does not change
def _read(folder: Path) -> list[Record]:
    if (reader := _reader()) is None:
        pytest.skip("this wandb has no reader of its own files")
    done = subprocess.run([*reader, "--json", str(folder)], env=_ENV, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


@cache
def _reader() -> list[str] | None:
    command = [sys.executable, "-m", "wandb", "leet", "inspect"]
    known = subprocess.run([*command, "--help"], env=_ENV, capture_output=True).returncode == 0
    return command if known else None


_ENV = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
_ENV.pop("WANDB_SERVICE", None)  # the address of one that another test has begun and ended
