"""Run by test_sharded_tasks: `simmim` with these arguments, where FSDP finds no GPU.

Usage: python ddp_cli.py COMMAND ...
"""

import sys

import torch

from ddp_step import fsdp_on_cpu
from simmim.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    fsdp_on_cpu()
    sys.exit(main(sys.argv[1:]))
