"""What a figure is worth: on which machine, with which versions, by which command, and when."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from simmim import __version__
from simmim.base.files import write_whole
from simmim.data.workers import cpu_count

PACKAGES = ("torch", "torchvision", "lightning", "timm", "numpy", "pillow", "simplejpeg")


def circumstances() -> dict[str, Any]:
    """Say where and when something is measured."""
    return {
        "machine": machine(),
        "versions": {
            "simmim": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "command": " ".join(["simmim", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    """Describe this machine."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe(machine: Mapping[str, Any]) -> str:
    """A machine in a line."""
    cores = f"{machine['cores']} core" + "s" * (machine["cores"] != 1)
    return ", ".join(part for part in (machine["cpu"], cores, machine["gpu"]) if part)


def write_record(out: str | None, figures: Mapping[str, Any]) -> str:
    """Write the figures with their circumstances to a JSON file, if there is to be one.

    Returns:
        A line that says where they are; or nothing.
    """
    if out is None:
        return ""
    text = json.dumps({**circumstances(), **figures}, indent=1)
    write_whole(Path(out), text)
    return f"{out}: these figures"


def check_out(out: str | None) -> None:
    """Refuse a file that there is, or that cannot be, before minutes are spent.

    Raises:
        ValueError: If it exists, or its folder does not.
    """
    if out is None:
        return
    if os.path.exists(out):
        raise ValueError(f"out {out!r} exists: give the name of a new file")
    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"out {out!r} lies in no folder that there is: make it first")


def _cpu() -> str:
    """The processor's name; Python knows it on some systems alone."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
