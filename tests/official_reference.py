"""The official SimMIM models, stated a second time in plain torch, for the tests to compare with.

Written from what github.com/microsoft/SimMIM (models/simmim.py, vision_transformer.py,
swin_transformer.py) and github.com/microsoft/Swin-Transformer (swin_transformer_v2.py) compute,
as functions of the tensors in an official file. Nothing here uses simmim or timm.
"""

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]


@dataclass
class ViT:
    """Sizes of an official ViT; `positions` is shared, per_block, absolute or none."""

    img_size: int = 32
    patch_size: int = 8
    in_chans: int = 3
    embed_dim: int = 24
    depth: int = 3
    num_heads: int = 3
    mlp_ratio: int = 2
    positions: str = "shared"
    layer_scale: bool = True

    eps = 1e-6
    kind = "vit"

    @property
    def side(self) -> int:
        return self.img_size // self.patch_size

    @property
    def features(self) -> tuple[int, int]:
        """Channels and stride of the features."""
        return self.embed_dim, self.patch_size


@dataclass
class Swin:
    """Sizes of an official Swin, or SwinV2 (`v2`)."""

    img_size: int = 32
    patch_size: int = 2
    in_chans: int = 3
    embed_dim: int = 12
    depths: list[int] = field(default_factory=lambda: [2, 3])
    num_heads: list[int] = field(default_factory=lambda: [2, 3])
    window_size: int = 4
    mlp_ratio: int = 2
    v2: bool = False

    eps = 1e-5

    @property
    def kind(self) -> str:
        return "swinv2" if self.v2 else "swin"

    @property
    def side(self) -> int:
        return self.img_size // self.patch_size

    @property
    def features(self) -> tuple[int, int]:
        stages = len(self.depths) - 1
        return self.embed_dim * 2**stages, self.patch_size * 2**stages

    def window(self, stage: int) -> tuple[int, int]:
        """Window and shift of a stage's second block: a small stage is one window, unshifted."""
        side = self.side // 2**stage
        return (side, 0) if side <= self.window_size else (self.window_size, self.window_size // 2)


Spec = ViT | Swin


# Files -------------------------------------------------------------------------------------------


def make_tensors(spec: Spec, seed: int = 0) -> Tensors:
    """A pretraining file's tensors, with weights so large that every part of the model matters.

    The stem's are small instead: there the epsilon of the next norm matters.
    """
    make = _Maker(seed)
    make("encoder.mask_token", 1, 1, spec.embed_dim, std=0.5)
    kernel = (spec.embed_dim, spec.in_chans, spec.patch_size, spec.patch_size)
    make("encoder.patch_embed.proj.weight", *kernel, std=0.02 / spec.patch_size)
    make("encoder.patch_embed.proj.bias", spec.embed_dim, std=0.02)
    if isinstance(spec, ViT):
        _make_vit(make, spec)
    else:
        _make_swin(make, spec)
    width, stride = spec.features
    make.norm("encoder.norm", width)
    make("decoder.0.weight", stride**2 * spec.in_chans, width, 1, 1, std=width**-0.5)
    make("decoder.0.bias", stride**2 * spec.in_chans, std=0.1)
    return make.tensors


class _Maker:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: Tensors = {}

    def __call__(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        self.tensors[name] = mean + std * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, outputs: int, inputs: int, bias: bool = True) -> None:
        self(f"{name}.weight", outputs, inputs, std=1.2 * inputs**-0.5)
        if bias:
            self(f"{name}.bias", outputs, std=0.2)

    def norm(self, name: str, width: int) -> None:
        self(f"{name}.weight", width, mean=1.0, std=0.2)
        self(f"{name}.bias", width, std=0.2)

    def block(self, name: str, width: int, hidden: int, separate_bias: bool) -> None:
        self.norm(f"{name}.norm1", width)
        self.linear(f"{name}.attn.qkv", 3 * width, width, bias=not separate_bias)
        if separate_bias:
            self(f"{name}.attn.q_bias", width, std=0.3)
            self(f"{name}.attn.v_bias", width, std=0.3)
        self.linear(f"{name}.attn.proj", width, width)
        self.norm(f"{name}.norm2", width)
        self.linear(f"{name}.mlp.fc1", hidden, width)
        self.linear(f"{name}.mlp.fc2", width, hidden)


def _make_vit(make: _Maker, spec: ViT) -> None:
    make("encoder.cls_token", 1, 1, spec.embed_dim, std=0.5)
    table = ((2 * spec.side - 1) ** 2 + 3, spec.num_heads)
    if spec.positions == "absolute":
        make("encoder.pos_embed", 1, spec.side**2 + 1, spec.embed_dim, std=0.3)
    if spec.positions == "shared":
        make("encoder.rel_pos_bias.relative_position_bias_table", *table, std=1.0)
        make.tensors["encoder.rel_pos_bias.relative_position_index"] = vit_index(spec.side)
    for i in range(spec.depth):
        name = f"encoder.blocks.{i}"
        make.block(name, spec.embed_dim, spec.embed_dim * spec.mlp_ratio, separate_bias=True)
        if spec.layer_scale:
            make(f"{name}.gamma_1", spec.embed_dim, mean=0.5, std=0.2)
            make(f"{name}.gamma_2", spec.embed_dim, mean=0.5, std=0.2)
        if spec.positions == "per_block":
            make(f"{name}.attn.relative_position_bias_table", *table, std=1.0)
            make.tensors[f"{name}.attn.relative_position_index"] = vit_index(spec.side)


def _make_swin(make: _Maker, spec: Swin) -> None:
    make.norm("encoder.patch_embed.norm", spec.embed_dim)
    for stage, depth in enumerate(spec.depths):
        width, heads = spec.embed_dim * 2**stage, spec.num_heads[stage]
        window, shift = spec.window(stage)
        for i in range(depth):
            name = f"encoder.layers.{stage}.blocks.{i}"
            make.block(name, width, width * spec.mlp_ratio, separate_bias=spec.v2)
            if spec.v2:
                make(f"{name}.attn.logit_scale", heads, 1, 1, mean=1.5, std=0.3)
                make.linear(f"{name}.attn.cpb_mlp.0", 512, 2)
                make.linear(f"{name}.attn.cpb_mlp.2", heads, 512, bias=False)
                make.tensors[f"{name}.attn.relative_coords_table"] = coords_table(window)
            else:
                table = ((2 * window - 1) ** 2, heads)
                make(f"{name}.attn.relative_position_bias_table", *table, std=1.0)
            make.tensors[f"{name}.attn.relative_position_index"] = window_index(window)
            if i % 2 and shift:
                side = spec.side // 2**stage
                make.tensors[f"{name}.attn_mask"] = shift_mask(side, window, shift)
        if stage < len(spec.depths) - 1:
            merge = f"encoder.layers.{stage}.downsample"
            make.linear(f"{merge}.reduction", 2 * width, 4 * width, bias=False)
            make.norm(f"{merge}.norm", 2 * width if spec.v2 else 4 * width)


def config_of(spec: Spec) -> dict[str, Any]:
    """What the official configuration says of such a model."""
    sizes: dict[str, Any] = {
        "PATCH_SIZE": spec.patch_size,
        "IN_CHANS": spec.in_chans,
        "EMBED_DIM": spec.embed_dim,
        "NUM_HEADS": spec.num_heads,
        "MLP_RATIO": spec.mlp_ratio,
        "QKV_BIAS": True,
    }
    if isinstance(spec, ViT):
        sizes |= {
            "DEPTH": spec.depth,
            "INIT_VALUES": 0.1 if spec.layer_scale else None,
            "USE_APE": spec.positions == "absolute",
            "USE_RPB": spec.positions == "per_block",
            "USE_SHARED_RPB": spec.positions == "shared",
            "USE_MEAN_POOLING": False,
        }
    else:
        sizes |= {"DEPTHS": spec.depths, "WINDOW_SIZE": spec.window_size, "APE": False}
    return {
        "DATA": {"IMG_SIZE": spec.img_size, "MASK_PATCH_SIZE": 8, "MASK_RATIO": 0.5},
        "MODEL": {"TYPE": spec.kind, spec.kind.upper(): sizes, "DROP_PATH_RATE": 0.1},
        "TRAIN": {"OPTIMIZER": {"BETAS": (0.9, 0.999)}, "BASE_LR": 2e-4},
    }


def save_file(path: Path, tensors: Tensors, config: Mapping[str, Any] | None) -> Path:
    """Write a .pth as the official code does, its configuration a pickled yacs CfgNode."""
    with fake_yacs() as cfg_node:
        content = {
            "model": tensors,
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "lr_scheduler": {"t_initial": 10},
            "max_accuracy": 0.0,
            "epoch": 3,
        }
        if config is not None:
            content["config"] = cfg_node(config)
        torch.save(content, path)
    return path


@contextmanager
def fake_yacs() -> Iterator[type]:
    """A class that pickles under the name, and in the manner, of yacs.config.CfgNode."""

    class CfgNode(dict):  # type: ignore[type-arg]
        def __init__(self, content: Mapping[str, Any]) -> None:
            super().__init__(
                {k: CfgNode(v) if isinstance(v, Mapping) else v for k, v in content.items()}
            )
            self.__dict__ |= {"__immutable__": True, "__deprecated_keys__": set()}
            self.__dict__ |= {"__renamed_keys__": {}, "__new_allowed__": False}

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    sys.modules |= {"yacs": package, "yacs.config": module}
    try:
        yield CfgNode
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]


# The forward pass --------------------------------------------------------------------------------


def reconstruct(tensors: Tensors, spec: Spec, images: Tensor, mask: Tensor) -> Tensor:
    """Predict the images from their visible part; mask at the resolution of tokens, 1 = hidden."""
    features = encode(tensors, spec, images, mask)
    pixels = F.conv2d(features, tensors["decoder.0.weight"], tensors["decoder.0.bias"])
    _, stride = spec.features
    batch, _, rows, columns = pixels.shape
    pixels = pixels.view(batch, spec.in_chans, stride, stride, rows, columns)
    return pixels.permute(0, 1, 4, 2, 5, 3).reshape(batch, spec.in_chans, *images.shape[2:])


def loss_of(images: Tensor, prediction: Tensor, mask: Tensor, spec: Spec) -> Tensor:
    """The published loss: mean absolute error over the hidden pixels."""
    hidden = mask.float().repeat_interleave(spec.patch_size, 1)
    hidden = hidden.repeat_interleave(spec.patch_size, 2)[:, None]
    return ((images - prediction).abs() * hidden).sum() / (hidden.sum() + 1e-5) / spec.in_chans


def encode(tensors: Tensors, spec: Spec, images: Tensor, mask: Tensor) -> Tensor:
    """Features, (B, D, h, w)."""
    t = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    x = F.conv2d(
        images, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=spec.patch_size
    )
    x = x.flatten(2).transpose(1, 2)
    if isinstance(spec, Swin):
        x = norm(x, t, "patch_embed.norm", spec.eps)
    x = torch.where(mask.flatten(1)[:, :, None].bool(), t["mask_token"], x)
    x = _vit(x, t, spec) if isinstance(spec, ViT) else _swin(x, t, spec)
    x = norm(x, t, "norm", spec.eps)
    side = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).reshape(len(x), -1, side, side)


def norm(x: Tensor, t: Tensors, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * t[f"{name}.weight"] + t[f"{name}.bias"]


def linear(x: Tensor, t: Tensors, name: str) -> Tensor:
    y = x @ t[f"{name}.weight"].T
    return y + t[f"{name}.bias"] if f"{name}.bias" in t else y


def mlp(x: Tensor, t: Tensors, name: str) -> Tensor:
    hidden = linear(x, t, f"{name}.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return linear(hidden, t, f"{name}.fc2")


def query_key_value(x: Tensor, t: Tensors, name: str, heads: int) -> Tensor:
    """(3, ..., heads, tokens, channels); a bias kept apart is of query and value alone."""
    y = linear(x, t, f"{name}.qkv")
    if f"{name}.q_bias" in t:
        q, v = t[f"{name}.q_bias"], t[f"{name}.v_bias"]
        y = y + torch.cat([q, torch.zeros_like(q), v])
    return y.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2)


def attend(logits: Tensor, value: Tensor, t: Tensors, name: str) -> Tensor:
    y = logits.softmax(-1) @ value
    return linear(y.transpose(-3, -2).flatten(-2), t, f"{name}.proj")


def vit_index(side: int) -> Tensor:
    """Row of the table for each pair of tokens, the class token first: its three rows are last."""
    inner = window_index(side)
    rows = (2 * side - 1) ** 2
    index = torch.empty(side**2 + 1, side**2 + 1, dtype=torch.long)
    index[1:, 1:] = inner
    index[0, :] = rows  # from the class token
    index[:, 0] = rows + 1  # to it
    index[0, 0] = rows + 2
    return index


def window_index(side: int) -> Tensor:
    """Row of the table for each pair of tokens in a window: by the offset, down then across."""
    y, x = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    down, across = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (down + side - 1) * (2 * side - 1) + across + side - 1


def _vit(x: Tensor, t: Tensors, spec: ViT) -> Tensor:
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1)
    if spec.positions == "absolute":
        x = x + t["pos_embed"]
    index = vit_index(spec.side)
    for i in range(spec.depth):
        name = f"blocks.{i}"
        q, k, v = query_key_value(
            norm(x, t, f"{name}.norm1", spec.eps), t, f"{name}.attn", spec.num_heads
        )
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        own = f"{name}.attn" if spec.positions == "per_block" else "rel_pos_bias"
        if f"{own}.relative_position_bias_table" in t:
            logits = logits + t[f"{own}.relative_position_bias_table"][index].permute(2, 0, 1)
        y = attend(logits, v, t, f"{name}.attn")
        x = x + (t[f"{name}.gamma_1"] * y if spec.layer_scale else y)
        y = mlp(norm(x, t, f"{name}.norm2", spec.eps), t, f"{name}.mlp")
        x = x + (t[f"{name}.gamma_2"] * y if spec.layer_scale else y)
    return x[:, 1:]


def _swin(x: Tensor, t: Tensors, spec: Swin) -> Tensor:
    for stage, depth in enumerate(spec.depths):
        side = spec.side // 2**stage
        window, shift = spec.window(stage)
        for i in range(depth):
            name = f"layers.{stage}.blocks.{i}"
            grid = x if spec.v2 else norm(x, t, f"{name}.norm1", spec.eps)
            grid = grid.unflatten(1, (side, side))
            moved = shift if i % 2 else 0
            y = _windowed(grid, t, f"{name}.attn", spec.num_heads[stage], window, moved, spec.v2)
            y = y.flatten(1, 2)
            if spec.v2:  # the norms stand behind the branches
                x = x + norm(y, t, f"{name}.norm1", spec.eps)
                x = x + norm(mlp(x, t, f"{name}.mlp"), t, f"{name}.norm2", spec.eps)
            else:
                x = x + y
                x = x + mlp(norm(x, t, f"{name}.norm2", spec.eps), t, f"{name}.mlp")
        if stage < len(spec.depths) - 1:
            x = _merge(x.unflatten(1, (side, side)), t, f"layers.{stage}.downsample", spec)
    return x


def _merge(grid: Tensor, t: Tensors, name: str, spec: Swin) -> Tensor:
    """Four neighbours to one: upper left, lower left, upper right, lower right."""
    four = [grid[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
    x = torch.cat(four, -1).flatten(1, 2)
    if spec.v2:
        return norm(linear(x, t, f"{name}.reduction"), t, f"{name}.norm", spec.eps)
    return linear(norm(x, t, f"{name}.norm", spec.eps), t, f"{name}.reduction")


def _windowed(
    grid: Tensor, t: Tensors, name: str, heads: int, window: int, shift: int, v2: bool
) -> Tensor:
    """Attention within windows of a grid that is moved up and left by the shift."""
    batch, side, _, width = grid.shape
    n = side // window
    grid = grid.roll((-shift, -shift), (1, 2))
    tokens = grid.view(batch, n, window, n, window, width).transpose(2, 3)
    tokens = tokens.reshape(batch, n * n, window * window, width)
    q, k, v = query_key_value(tokens, t, name, heads)
    index = window_index(window)
    if v2:
        q, k = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
        scale = t[f"{name}.logit_scale"].clamp(max=torch.log(torch.tensor(100.0))).exp()
        logits = q @ k.transpose(-2, -1) * scale
        hidden = linear(coords_table(window), t, f"{name}.cpb_mlp.0").relu()
        table = linear(hidden, t, f"{name}.cpb_mlp.2").view(-1, heads)
        logits = logits + 16 * table[index].permute(2, 0, 1).sigmoid()
    else:
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        logits = logits + t[f"{name}.relative_position_bias_table"][index].permute(2, 0, 1)
    if shift:
        logits = logits + shift_mask(side, window, shift)[:, None]
    out = attend(logits, v, t, name).view(batch, n, n, window, window, width)
    return out.transpose(2, 3).reshape(batch, side, side, width).roll((shift, shift), (1, 2))


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """-100 between tokens of a window that only the shift has brought together."""
    wrapped = (torch.arange(side) >= side - shift).long()
    regions = (wrapped[:, None] * 2 + wrapped[None, :]).view(
        side // window, window, side // window, window
    )
    regions = regions.transpose(1, 2).reshape(-1, window * window)
    return (regions[:, :, None] != regions[:, None, :]) * -100.0


def coords_table(window: int, pretrained: int | None = None) -> Tensor:
    """SwinV2's log-spaced offsets, down and across, (1, 2 w - 1, 2 w - 1, 2)."""
    offsets = torch.arange(1 - window, window) / ((pretrained or window) - 1) * 8
    offsets = offsets.sign() * (offsets.abs() + 1).log2() / 3
    return torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)[None]
