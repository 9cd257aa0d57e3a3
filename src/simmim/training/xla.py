"""What an XLA device (a TPU) needs beside Lightning's strategy for it."""

from typing import Any

import torch
from lightning.pytorch.accelerators import XLAAccelerator


def wake_xla(accelerator: str, devices: int | str | list[int]) -> None:
    """Make an XLA device before any model, where the process is to have one alone.

    Autograd counts the devices once, at its first backward pass, which is an encoder's trial run on
    the CPU; one that is not there by then is unknown to it. Of several devices each belongs to a
    process of its own, which makes it, and counts anew.

    Args:
        accelerator: As the Trainer takes it.
        devices: Likewise.
    """
    if accelerator not in ("auto", "tpu") or not XLAAccelerator.is_available():
        return
    there: Any = XLAAccelerator.auto_device_count() if devices == "auto" else devices
    if len(XLAAccelerator.get_parallel_devices(there)) == 1:
        import torch_xla

        torch_xla.device()


def run_xla(device: torch.device) -> None:
    """Let XLA compute what was asked of it, so that many batches do not become one large graph.

    Lightning does so at each optimiser step alone.
    """
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()
