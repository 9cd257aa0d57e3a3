"""What is optimised how: parameter groups, layer decay, warm-up and schedules.

`compat="official"` everywhere means the runs behind the released weights, to the letter: the code
of github.com/microsoft/SimMIM (SwinV2: github.com/microsoft/Swin-Transformer) with timm 0.4.12.
"default" means what its authors meant. Each difference is explained where it is made.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from timm.models import Beit, SwinTransformer, SwinTransformerV2, VisionTransformer
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Compat = Literal["default", "official"]

# Learned positions and tokens are spared weight decay wherever they sit, in the head as well.
OF_SWINV2 = ("cpb_mlp", "logit_scale")  # of its attention: what has no weight decay
POSITIONS_AND_TOKENS = (
    "cls_token",
    "mask_token",
    "reg_token",
    "pos_embed",
    "relative_position_bias_table",
)


# Parameter groups ------------------------------------------------------------------------------


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    layer_decay: float | None = None,
    compat: Compat = "default",
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups of equal weight decay and learning rate.

    Weight decay is for matrices and kernels. Biases, norms, tokens, position embeddings and tables,
    and what a model's `no_weight_decay()` names have none (SimMIM, appendix A).

    Args:
        model: The model: a timm model, or a module that holds one.
        weight_decay: Weight decay of the rest.
        layer_decay: Factor by which the learning rate falls from each layer to the one below, for
            fine-tuning. None: one learning rate for all, as in pretraining.
        compat: "official" takes the released runs' groups. They decay position-bias tables (and
            SwinV2's `logit_scale` and `cpb_mlp`) in pretraining, because the keywords that should
            spare them get the prefix "encoder." and then match no name; and in the ViT the mask
            token and, in fine-tuning too, the tables, which its `no_weight_decay` forgets.

    Returns:
        Groups for a torch optimiser, each parameter in exactly one, with the keys name, params,
        weight_decay and lr_scale. torch ignores lr_scale: `Schedule` applies it.

    Raises:
        ValueError: If layer_decay is given and no part of the model says what its layers are.
    """
    spared = _spared(model, layer_decay is None, compat)
    scales = _lr_scales(model, layer_decay)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if name in spared else weight_decay
        level, scale = scales[name]
        group_name = "no_decay" if name in spared else "decay"
        if level is not None:
            group_name = f"layer_{level}_{group_name}"
        group = groups.setdefault(
            group_name,
            {"name": group_name, "params": [], "weight_decay": decay, "lr_scale": scale},
        )
        group["params"].append(parameter)
    return list(groups.values())


def _spared(model: nn.Module, pretraining: bool, compat: Compat) -> set[str]:
    """Names of the parameters without weight decay."""
    named = set(_named_by_models(model))
    spared, meant = set(), set()
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or name.endswith(".bias"):
            spared.add(name)
        elif name in named or name.endswith(POSITIONS_AND_TOKENS):
            meant.add(name)
    if compat == "official":
        meant = {name for name in meant if not _decays_officially(model, name, pretraining)}
    return spared | meant


def _named_by_models(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        no_weight_decay = getattr(module, "no_weight_decay", None)
        if callable(no_weight_decay):
            for name in cast(set[str], no_weight_decay()):
                yield f"{prefix}.{name}" if prefix else name
        if isinstance(module, SwinTransformerV2):  # before timm 1.0.31 it names modules instead
            for name, _ in module.named_parameters(prefix):
                if any(keyword in name for keyword in OF_SWINV2):
                    yield name


def _decays_officially(model: nn.Module, name: str, pretraining: bool) -> bool:
    """Whether the official code decays a parameter that was meant to be spared."""
    is_swin = any(isinstance(m, SwinTransformer | SwinTransformerV2) for m in model.modules())
    if name.endswith("mask_token"):
        return not is_swin
    by_keyword = ("relative_position_bias_table", *OF_SWINV2)
    return any(keyword in name for keyword in by_keyword) and (pretraining or not is_swin)


# Layer decay -----------------------------------------------------------------------------------


def _lr_scales(model: nn.Module, layer_decay: float | None) -> dict[str, tuple[int | None, float]]:
    """Level of each parameter and the factor of its learning rate."""
    names = [name for name, _ in model.named_parameters()]
    if layer_decay is None:
        return dict.fromkeys(names, (None, 1.0))
    levels, last = _levels(model)
    return {name: (levels[name], layer_decay ** (last - levels[name])) for name in names}


def _levels(model: nn.Module) -> tuple[dict[str, int], int]:
    """Level of each parameter: 0 for the embedding, then the blocks, the head last.

    The blocks are timm's (`group_matcher`). As in the official get_vit_layer and get_swin_layer,
    and unlike timm's own grouping, the final norm and a shared position bias go with the head, and
    Swin's downsampling with the block before it.
    """
    prefix, timm_model = _timm_model(model)
    matcher = timm_model.group_matcher(coarse=False)  # type: ignore[operator]
    # A name that no pattern matches: timm puts it last, where heads go, even if there is no head.
    named = [*timm_model.named_parameters(), ("?", None)]
    by_timm: dict[str, int] = group_with_matcher(named, matcher, reverse=True)
    last = by_timm["?"]
    levels = {}
    for name, _ in model.named_parameters():
        inner = name.removeprefix(prefix)
        if name.endswith("mask_token"):
            levels[name] = 0
        elif inner.startswith(("norm.", "fc_norm.", "rel_pos_bias.")) or not name.startswith(
            prefix
        ):
            levels[name] = last
        else:
            levels[name] = by_timm[inner]
            if ".downsample." in inner and isinstance(
                timm_model, SwinTransformer | SwinTransformerV2
            ):
                levels[name] -= 1  # timm: level of the first block after it
    return levels, last


def _timm_model(model: nn.Module) -> tuple[str, nn.Module]:
    for name, module in model.named_modules():
        if hasattr(module, "group_matcher"):
            return (f"{name}." if name else ""), module
    raise ValueError(
        "layer_decay needs an encoder with a group_matcher, such as any timm model: leave it out "
        "(--model.layer_decay null)"
    )


# Learning rate ---------------------------------------------------------------------------------


def scaled_lr(base_lr: float, global_batch_size: int) -> float:
    """Scale a learning rate that is given for 512 images linearly with the batch."""
    return base_lr * global_batch_size / 512


def lr_at(
    step: int,
    *,
    schedule: str,
    lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    compat: Compat = "default",
) -> float:
    """Say which learning rate an optimiser step has.

    A linear warm-up, then a cosine or a staircase. Both count from the first step of the run and
    the warm-up hides their beginning, like timm's CosineLRScheduler with warmup_prefix=False: where
    the warm-up ends, the cosine is therefore already a little below `lr`.

    Args:
        step: Optimiser step, from 0.
        schedule: "cosine" or "multistep".
        lr: Learning rate at the top.
        total_steps: Optimiser steps in the run, warm-up included.
        warmup_steps: Steps of the warm-up.
        warmup_lr: Learning rate of step 0, where there is a warm-up.
        min_lr: Learning rate at the end of the cosine, and after it.
        milestones: Steps from which on multistep multiplies by gamma once more.
        gamma: That factor. 0.1 (the released 800-epoch recipe).
        compat: "official" lags one step behind, as the released runs do: their scheduler is stepped
            after step k with k instead of k + 1, so that the first two steps have the same rate.

    Returns:
        The learning rate.

    Raises:
        ValueError: If the schedule is not known.
    """
    if schedule not in ("cosine", "multistep"):
        raise ValueError(f"schedule {schedule!r} is not known: use cosine or multistep")
    t = max(step - 1, 0) if compat == "official" else step
    if t < warmup_steps:
        return warmup_lr + t * ((lr - warmup_lr) / warmup_steps)
    if schedule == "multistep":
        return lr * gamma ** bisect_right(sorted(milestones), t)
    if t >= total_steps:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * t / total_steps))


class Schedule(LRScheduler):
    """`lr_at`, for each of an optimiser's groups, stepped once an optimiser step.

    A group's `lr_scale` multiplies the whole curve. `compat="official"` multiplies the top alone,
    as timm 0.4.12 did: all layers begin at `warmup_lr` and end at `min_lr` there. timm's schedulers
    since 0.6 apply `lr_scale` themselves: one of them on top of this would apply it twice.

    Args:
        optimizer: The optimiser; the lr of its groups is overwritten.
        lr: Learning rate at the top.
        compat: As in `lr_at`.
        curve: The other arguments of `lr_at`.
    """

    def __init__(
        self, optimizer: Optimizer, *, lr: float, compat: Compat = "default", **curve: Any
    ) -> None:
        self.lr, self.compat, self.curve = lr, compat, {**curve, "compat": compat}
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = lr * group.get("lr_scale", 1.0)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each group for the coming optimiser step."""
        scales = [group.get("lr_scale", 1.0) for group in self.optimizer.param_groups]
        if self.compat == "official":
            return [lr_at(self.last_epoch, lr=self.lr * scale, **self.curve) for scale in scales]
        now = lr_at(self.last_epoch, lr=self.lr, **self.curve)
        return [now * scale for scale in scales]

    def state_dict(self) -> dict[str, Any]:
        """The place on the curve alone: a run that goes on follows the curve it is given now."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a place on the curve."""
        super().load_state_dict(state_dict)
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


# Initialisation --------------------------------------------------------------------------------


@torch.no_grad()
def init_official_(model: nn.Module) -> None:
    """Initialise an encoder, in place, with the distributions of the official code.

    The prediction head is left alone: there the official code keeps torch's default. timm's BEiT
    draws weights with std 0.02 and its tables from a normal; the official ViT cuts its normals off
    at one standard deviation (which leaves std 0.0108), begins with tables of zeros, and divides
    the last projection of each branch of block i = 1, 2, ... by sqrt(2 i).

    Args:
        model: A module that holds a timm ViT, BEiT, Swin or SwinV2, and its `mask_token`.

    Raises:
        ValueError: If there is no such encoder.
    """
    for encoder in model.modules():
        if isinstance(encoder, Beit | VisionTransformer):
            _init_vit(encoder)
            cut = 0.02
            break
        if isinstance(encoder, SwinTransformer | SwinTransformerV2):
            _init_swin(encoder)
            cut = 2.0  # timm's default bounds: 100 standard deviations
            break
    else:
        raise ValueError(
            'compat="official" is for the encoders of the released runs (ViT, BEiT, Swin, SwinV2): '
            'use compat="default" with others'
        )
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            _truncated_normal(parameter, cut)


def _init_vit(vit: nn.Module) -> None:
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            _truncated_normal(module.weight, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for name, parameter in vit.named_parameters():
        if name in ("cls_token", "pos_embed"):
            _truncated_normal(parameter, 0.02)
        elif name.endswith(("q_bias", "v_bias", "relative_position_bias_table")):
            nn.init.zeros_(parameter)
    for i, block in enumerate(cast(nn.Sequential, vit.blocks), start=1):
        cast(Any, block).attn.proj.weight.div_(math.sqrt(2.0 * i))
        cast(Any, block).mlp.fc2.weight.div_(math.sqrt(2.0 * i))


def _init_swin(swin: nn.Module) -> None:
    for module in swin.modules():
        if isinstance(module, nn.Linear):
            _truncated_normal(module.weight, 2.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.LayerNorm):
            module.reset_parameters()
    for name, parameter in swin.named_parameters():
        if name.endswith("relative_position_bias_table"):
            _truncated_normal(parameter, 2.0)
        elif name.endswith(("q_bias", "v_bias")):
            nn.init.zeros_(parameter)
        elif isinstance(swin, SwinTransformerV2) and (".norm1." in name or ".norm2." in name):
            nn.init.zeros_(parameter)  # each block begins as the identity


def _truncated_normal(parameter: Tensor, cut: float) -> None:
    nn.init.trunc_normal_(parameter, std=0.02, a=-cut, b=cut)
