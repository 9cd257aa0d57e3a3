"""Run by test_tasks_in_processes, in each of some processes: command lines, one after the other.

Usage: python commands.py FILE, with torchrun's variables in the environment. A line that begins
with "!" is to be refused.
"""

import shlex
import sys
from pathlib import Path

import torch

from simmim.cli import main


def run(file: Path) -> None:
    torch.set_num_threads(1)
    for line in file.read_text().splitlines():
        print(f"> {line}", file=sys.stderr, flush=True)
        status = main(shlex.split(line.removeprefix("! ")))
        if (status != 0) != line.startswith("! "):
            sys.exit(f"exit status {status}")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
