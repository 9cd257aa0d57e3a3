"""What makes a step quick on its device, and changes its result by rounding only."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from timm.layers import use_fused_attn
from timm.models.swin_transformer_v2 import WindowAttention
from torch import nn

from simmim.encoder import Encoder
from simmim.encoders.attention import FusedWindowAttention

HALF = ("bf16", "16", "transformer-engine")  # how the names of such precisions begin


def suit_device(model: Any, trainer: L.Trainer) -> None:
    """Choose attention kernels and memory layout of a model, and warn of a slow precision.

    Args:
        model: The model, on any device yet, with its encoder.
        trainer: Says on which device it will run, and in which precision.
    """
    on_cpu = trainer.strategy.root_device.type == "cpu"
    half = str(trainer.precision).startswith(HALF)
    choose_attention(model, fused=not (on_cpu and half))
    encoder: Encoder = model.encoder
    if encoder.is_convolutional:  # the first convolution turns the images round, and all go on so
        encoder.to(memory_format=torch.channels_last)
    if on_cpu and half and not multiplies_bf16():
        rank_zero_warn(
            f"precision {trainer.precision} is slow on this processor, which cannot multiply "
            "bfloat16: use --trainer.precision 32-true"
        )


def choose_attention(model: nn.Module, fused: bool) -> None:
    """Let every attention of timm's that can use torch's fused kernels, or none.

    On a CPU their backward pass in half precision takes 1.1 to 3 times as long as plain products
    and a softmax; in float32 they are the quicker ones, in Swin's windows as well, where timm
    leaves them out by default, and in SwinV2's, for which it has none. TIMM_FUSED_ATTN=0 in the
    environment still turns them off.

    Args:
        model: Any module.
        fused: Whether to use them.
    """
    module: Any
    for module in model.modules():
        if type(module) is WindowAttention:
            module.__class__ = FusedWindowAttention  # the same weights; timm's model stays timm's
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused and use_fused_attn()


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for it: otherwise bfloat16 is emulated, and slow.

    x86 has them in AVX512-BF16 and AMX, Arm in its BF16 extension.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.9, which knows x86 (AVX2) alone
        return torch.cpu._is_avx512_bf16_supported() or not torch.cpu._is_avx2_supported()
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
