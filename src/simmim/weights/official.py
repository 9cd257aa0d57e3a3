"""The official releases: names and sizes of SimMIM's and Swin Transformer's .pth files.

Pretraining files have `encoder.*`, `encoder.mask_token` and `decoder.0.*`, fine-tuned ones the same
names without `encoder.`, and a `head`. Beside the tensors a file holds a pickled configuration,
from which comes what no shape tells.
"""

import re
from collections.abc import Mapping, Sequence
from math import isqrt, log2
from typing import Any

from torch import Tensor

from simmim.weights.fit import BUFFERS, HEAD, MODEL, TOKEN, Architecture, Weights

PARTS = {
    *("patch_embed", "cls_token", "pos_embed", "absolute_pos_embed", "rel_pos_bias"),
    *("blocks", "layers", "norm", "fc_norm", "head"),
}
TABLE = "attn.relative_position_bias_table"
Config = Mapping[str, Any]


def official_weights(
    content: Mapping[str, Any],
    source: str,
    *,
    img_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    num_heads: int | Sequence[int] | None = None,
    window_size: int | None = None,
    hints: Mapping[str, Any] | None = None,
) -> Weights:
    """Read an official file.

    Args:
        content: What the file holds: {model, config, ...}, or the tensors by their official names.
        source: What a user calls it.
        img_size: Size of the images in pixels; like the rest, what is given wins over what the
            tensors imply, and that over what the configuration says.
        patch_size: Pixels per token of the stem.
        num_heads: Attention heads, of Swin one number a stage.
        window_size: Swin's window, in tokens.
        hints: The same and others by their names, for what neither the file nor the tensors tell.

    Returns:
        The tensors under our names, and the model that they are for.

    Raises:
        ValueError: If it is no file of a ViT, Swin or SwinV2, or if a size is neither given nor
            follows.
    """
    tensors, config = _open(content, source)
    given = {
        "img_size": img_size,
        "patch_size": patch_size,
        "num_heads": num_heads,
        "window_size": window_size,
    }
    inner = {_inner(name): tensor for name, tensor in tensors.items()}
    if "patch_embed.proj.weight" not in inner:
        raise ValueError(
            f"{source} is no official SimMIM or Swin file: it has no patch_embed.proj.weight, but "
            f"{', '.join(list(tensors)[:3])}"
        )
    is_swin = any(name.startswith("layers.") for name in inner)
    sizes = _Sizes(source, inner, config, given, hints or {})
    architecture = _swin(sizes) if is_swin else _vit(sizes)
    architecture.task = _task(config)
    weights = Weights(source, architecture)
    for name, tensor in tensors.items():
        place = _place(name, is_swin)
        if place is None:
            weights.skip(name)
        else:
            weights.add(name, place, tensor)
    return weights


def _open(content: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], Config]:
    """Tensors and configuration of a file, or of a bare mapping."""
    config = content.get("config")
    tensors = content.get("model", content)
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{source} holds no tensors under 'model'")
    wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{source} is no official file: {wrong[0]!r} is not a tensor")
    return dict(tensors), config if isinstance(config, Mapping) else {}


def _inner(name: str) -> str:
    """A tensor's name within the encoder, in today's spelling."""
    return name.removeprefix("encoder.").replace(".rpe_mlp.", ".cpb_mlp.")


def _place(name: str, is_swin: bool) -> str | None:
    """Our name of a tensor, or None where there is none."""
    inner = _inner(name)
    if name.endswith(BUFFERS):
        return None
    if inner == "mask_token":
        return TOKEN
    if name.startswith("decoder.0."):
        return f"{HEAD}proj.{name.removeprefix('decoder.0.')}"
    if is_swin:
        # Officially a stage ends with its downsampling, in timm the next one begins with it.
        inner = re.sub(
            r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", inner
        )
        inner = re.sub(r"^head\.", "head.fc.", inner)
    return f"{MODEL}{inner}" if inner.split(".")[0] in PARTS else None


class _Sizes:
    """What is given, follows from the tensors, or stands in the configuration: in this order."""

    def __init__(
        self,
        source: str,
        tensors: Mapping[str, Tensor],
        config: Config,
        given: dict[str, Any],
        hints: Mapping[str, Any],
    ) -> None:
        self.source, self.tensors, self.given, self.hints = source, tensors, given, hints
        model = _part(config, "MODEL")
        kind = str(model.get("TYPE", "")).upper()
        self.config = {**_part(config, "DATA"), **_part(model, kind)}
        kernel = tensors["patch_embed.proj.weight"]
        self.embed_dim, self.in_chans = kernel.shape[0], kernel.shape[1]
        self.patch_size = given["patch_size"] or kernel.shape[-1]

    def find(self, what: str, implied: Any) -> Any:
        """A size that must be known."""
        value = self.given[what] or implied or self.config.get(what.upper())
        value = self.hints.get(what) if value is None else value
        if value is None:
            raise ValueError(
                f"{self.source} does not tell the {what} of its model: say it, as in {what}=..."
            )
        return list(value) if isinstance(value, Sequence) else value

    def count(self, prefix: str) -> int:
        """Number of modules in a list."""
        found = {name.removeprefix(prefix).split(".")[0] for name in self.tensors}
        return sum(f"{index}" in found for index in range(len(found)))

    def mlp_ratio(self, block: str) -> float:
        """Width of a block's MLP by its input."""
        hidden, width = self.tensors[f"{block}.mlp.fc1.weight"].shape
        return hidden / width


def _part(config: Config, name: str) -> Config:
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}


def _vit(sizes: _Sizes) -> Architecture:
    """The paper's ViT and its variants, which in timm are of the class Beit."""
    tensors = sizes.tensors
    shared = tensors.get("rel_pos_bias.relative_position_bias_table")
    own, positions = tensors.get(f"blocks.0.{TABLE}"), tensors.get("pos_embed")
    table = own if shared is None else shared
    side = heads = None
    if table is not None:
        side, heads = (isqrt(len(table) - 3) + 1) // 2, table.shape[1]
    elif positions is not None:
        side = isqrt(positions.shape[1] - 1)
    mean_pooling = "fc_norm.weight" in tensors
    options = {
        "patch_size": sizes.patch_size,
        "embed_dim": sizes.embed_dim,
        "depth": sizes.count("blocks."),
        "num_heads": sizes.find("num_heads", heads),
        "mlp_ratio": sizes.mlp_ratio("blocks.0"),
        "qkv_bias": "blocks.0.attn.q_bias" in tensors,
        "init_values": 0.1 if "blocks.0.gamma_1" in tensors else 0.0,  # timm drops a None
        "use_abs_pos_emb": positions is not None,
        "use_rel_pos_bias": own is not None,
        "use_shared_rel_pos_bias": shared is not None,
        "global_pool": "avg" if mean_pooling else "token" if "head.weight" in tensors else "",
    }
    size = sizes.find("img_size", side and side * sizes.patch_size)
    return Architecture("beit_base_patch16_224", size, sizes.in_chans, options)


def _swin(sizes: _Sizes) -> Architecture:
    """Swin, or SwinV2 where a block has an MLP for its position bias."""
    tensors, is_v2 = sizes.tensors, "layers.0.blocks.0.attn.logit_scale" in sizes.tensors
    depths = [sizes.count(f"layers.{i}.blocks.") for i in range(sizes.count("layers."))]
    for name, what in (("absolute_pos_embed", "has"), ("patch_embed.norm.weight", "lacks")):
        if (name in tensors) == (what == "has"):
            raise ValueError(f"{sizes.source} {what} {name}, unlike any Swin of timm")
    if sizes.config.get("QK_SCALE"):
        raise ValueError(f"{sizes.source} has a qk_scale of its own, unlike any Swin of timm")
    windows = [_window(tensors, f"layers.{i}.blocks.0.attn.") for i in range(len(depths))]
    window = sizes.find("window_size", max(windows, key=lambda w: w or 0))
    heads = [
        len(tensors[f"layers.{i}.blocks.0.attn.logit_scale"])
        if is_v2
        else tensors[f"layers.{i}.blocks.0.{TABLE}"].shape[1]
        for i in range(len(depths))
    ]
    attn = "layers.0.blocks.0.attn."
    options = {
        "patch_size": sizes.patch_size,
        "embed_dim": sizes.embed_dim,
        "depths": depths,
        "num_heads": sizes.find("num_heads", heads),
        "window_size": window,
        "mlp_ratio": sizes.mlp_ratio("layers.0.blocks.0"),
        "qkv_bias": f"{attn}q_bias" in tensors or f"{attn}qkv.bias" in tensors,
    }
    if is_v2:
        options["pretrained_window_sizes"] = _pretrained_windows(sizes, windows)
    side = _swin_resolution(tensors, depths, windows)
    size = sizes.find("img_size", side and side * sizes.patch_size)
    name = "swinv2_base_window12_192" if is_v2 else "swin_base_patch4_window7_224"
    return Architecture(name, size, sizes.in_chans, options)


def _window(tensors: Mapping[str, Tensor], attn: str) -> int | None:
    """Window of a stage: its side is w in the index, 2 w - 1 in the tables."""
    for name, window in (
        ("relative_position_bias_table", lambda t: (isqrt(len(t)) + 1) // 2),
        ("relative_coords_table", lambda t: (t.shape[1] + 1) // 2),
        ("relative_position_index", lambda t: isqrt(len(t))),
    ):
        if attn + name in tensors:
            return window(tensors[attn + name])
    return None


def _swin_resolution(
    tensors: Mapping[str, Tensor], depths: list[int], windows: list[int | None]
) -> int | None:
    """Tokens along the side of stage 0, as far as the tensors tell.

    A shifted block's attention mask has one entry a window; a block that is not shifted where it
    should be, and a window smaller than another stage's, cover their whole stage.
    """
    has_buffers = any(name.endswith("relative_position_index") for name in tensors)
    largest = max(window or 0 for window in windows)
    for i, (depth, window) in enumerate(zip(depths, windows, strict=True)):
        if window is None:
            continue
        mask = tensors.get(f"layers.{i}.blocks.1.attn_mask")
        if mask is not None:
            return isqrt(len(mask)) * window * 2**i
        if window < largest or (has_buffers and depth > 1):
            return window * 2**i
    return None


def _pretrained_windows(sizes: _Sizes, windows: list[int | None]) -> list[int]:
    """The windows to which SwinV2's coordinates are relative: 0 for its own.

    The largest coordinate is log2(8 (w - 1) / (p - 1) + 1) / log2(8), for a window w pretrained
    with p.
    """
    said = sizes.config.get("PRETRAINED_WINDOW_SIZES") or [0] * len(windows)
    found = []
    for i, (window, by_config) in enumerate(zip(windows, said, strict=True)):
        table = sizes.tensors.get(f"layers.{i}.blocks.0.attn.relative_coords_table")
        if table is None or window is None or window < 2:
            found.append(int(by_config))
            continue
        scale = 2 ** (table.max().item() * log2(8)) - 1
        pretrained = round(1 + 8 * (window - 1) / scale)
        found.append(0 if pretrained == window else pretrained)
    return found


def _task(config: Config) -> dict[str, Any]:
    """What the pretraining was about, by SimMIM's names. How it was optimised is not taken over."""
    data, task = _part(config, "DATA"), {}
    for ours, theirs in (("mask_patch_size", "MASK_PATCH_SIZE"), ("mask_ratio", "MASK_RATIO")):
        if theirs in data:
            task[ours] = data[theirs]
    norm = _part(_part(_part(config, "MODEL"), "SIMMIM"), "NORM_TARGET")
    if norm.get("ENABLE"):
        task |= {"target": "normalized_pixels", "target_kwargs": {"window": norm["PATCH_SIZE"]}}
    return task
