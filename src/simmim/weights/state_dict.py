"""State dicts of timm models: MAE's releases, `torch.save(model.state_dict())`, other projects'.

The names are timm's, perhaps behind a prefix (DDP's `module.`, Lightning's `model.`). No tensor
tells the name of the model, nor the attention heads of a ViT: the user does.
"""

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import timm
import torch
from torch import Tensor, nn

from simmim.encoder import create_timm_model
from simmim.weights.fit import BUFFERS, MODEL, Architecture, Weights

VIT = "vit_base_patch16_224"
VIT_NAMES = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
OFFICIAL = re.compile(  # names of the official releases, which official.py reads
    r"encoder\.mask_token|(encoder\.)?"
    r"(layers\.0\.downsample\.|rel_pos_bias\.|blocks\.0\.attn\.relative_position_bias_table)"
)
NOT_ENCODER = ("mask_token", "decoder")  # MAE's
NOT_SHAPES = ("img_size", "in_chans", "num_classes", "pretrained")  # options that change no name


def find_tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The state dict in what `torch.save` wrote: the content itself, or a table in it.

    Raises:
        ValueError: If there is none.
    """
    tables = [content, content.get("model"), content.get("state_dict"), *content.values()]
    found = [t for t in tables if isinstance(t, Mapping) and t]
    for table in found:
        if all(isinstance(tensor, Tensor) for tensor in table.values()):
            ddp = "module." if all(str(name).startswith("module.") for name in table) else ""
            return {str(name).removeprefix(ddp): tensor for name, tensor in table.items()}
    if len(found) < 2:
        raise ValueError(f"{source} holds no tensors under 'model' or 'state_dict'")
    wrong = next(name for name, tensor in found[1].items() if not isinstance(tensor, Tensor))
    raise ValueError(f"{source} holds no state dict: {wrong!r} is not a tensor")


def is_official(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file is a release of SimMIM or Swin Transformer, by its names or configuration."""
    if isinstance(content.get("config"), Mapping):
        return True
    return any(OFFICIAL.match(name) for name in tensors)


def timm_state_dict(
    tensors: Mapping[str, Tensor],
    source: str,
    encoder: str | None,
    given: Mapping[str, Any],
    *,
    trust: bool = False,
) -> Weights:
    """Read a state dict with timm's names.

    Args:
        tensors: The state dict.
        source: What a user calls it.
        encoder: Name of the timm model. None: a ViT, whose `num_heads` are given.
        given: Options of the model that is to be built.
        trust: Whether an encoder of a user's own may be imported.

    Returns:
        The tensors, and the model that they are for.

    Raises:
        ValueError: If the model is not known, or the tensors are of another one.
    """
    prefix = _prefix(tensors, _stem(encoder))
    inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    rest = [name for name in tensors if not name.startswith(prefix)]
    is_vit = all(name in inner for name in VIT_NAMES)
    options = {name: value for name, value in given.items() if name not in NOT_SHAPES}
    if encoder is None and not (is_vit and options.get("num_heads")):
        raise ValueError(
            f"{source} does not tell the name of its model: give it, --model.encoder NAME (in "
            "Python encoder=NAME), or write a checkpoint that names it: simmim convert "
            f"--weights {source} --encoder NAME --out CKPT"
        )
    if is_vit and ("fc_norm.weight" in inner or "cls_token" not in inner):
        options.setdefault("global_pool", "avg")
    kernel = inner.get(_stem(encoder))
    chans = kernel.shape[1] if kernel is not None and kernel.ndim == 4 else given.get("in_chans", 3)
    size = (_vit_size(inner) if is_vit else None) or given.get("img_size") or 224
    if is_vit:
        model = _build(encoder, size, chans, options, trust) if encoder else _build(VIT, 224, 3, {})
        asked = _vit_options(model.state_dict())
        differ = {
            name: value
            for name, value in _vit_options(inner).items()
            if asked and value != asked[name]
        }
        if differ and encoder is not None:
            differ |= {"global_pool": "avg"} if differ.get("class_token") is False else {}
            heads = " and its num_heads" if "embed_dim" in differ else ""
            raise ValueError(
                f"{source} is not of {encoder} as it is asked for: give the name of its model, or "
                f"encoder_kwargs {differ}{heads}"
            )
        options = {**differ, **options}
    weights = Weights(
        source,
        Architecture(encoder or VIT, size, chans, options, trust=trust),
        dropped=dict.fromkeys(rest, "no part of an encoder"),
        remedy="give the name of its model (encoder) and its encoder_kwargs",
    )
    for name, tensor in inner.items():
        if name.startswith(NOT_ENCODER) or name.endswith(BUFFERS):
            weights.skip(prefix + name)
        else:
            weights.add(prefix + name, f"{MODEL}{name}", tensor)
    return weights


def _stem(encoder: str | None) -> str:
    """Name of the kernel that sees the image; empty where timm does not say it."""
    if encoder is None:
        return VIT_NAMES[0]
    config = timm.get_pretrained_cfg(encoder) if timm.is_model(encoder) else None
    names = (config.first_conv if config else None) or ()
    first = names if isinstance(names, str) else "".join(names[:1])
    return f"{first}.weight"


def _prefix(tensors: Mapping[str, Tensor], stem: str) -> str:
    """What stands before the names of the encoder; the shortest, where a file holds several."""
    found = [n.removesuffix(stem) for n in tensors if n == stem or n.endswith(f".{stem}")]
    return min(found, key=len, default="")


def _build(
    name: str, size: int | list[int], chans: int, options: dict[str, Any], trust: bool = False
) -> nn.Module:
    """The model without its weights."""
    sides = (size, size) if isinstance(size, int) else (size[0], size[1])
    rates = {"drop_rate": 0.0, "drop_path_rate": 0.0}
    with torch.device("meta"):
        return create_timm_model(name, sides, chans, rates, options, trust=trust)


def _vit_prefix(tensors: Mapping[str, Tensor]) -> int:
    """Class, distillation and register tokens of a ViT."""
    tokens = (tensors.get(name) for name in ("cls_token", "dist_token", "reg_token"))
    return sum(token.shape[1] for token in tokens if token is not None)


def _vit_size(tensors: Mapping[str, Tensor]) -> int | None:
    """Side of the images in pixels, where the positions are of a square."""
    positions = tensors.get("pos_embed")
    if positions is None:
        return None
    patch, length = tensors[VIT_NAMES[0]].shape[-1], positions.shape[1]
    sides = (isqrt(length - tokens) for tokens in (_vit_prefix(tensors), 0))
    return next(
        (side * patch for side in sides if length - side**2 in (0, _vit_prefix(tensors))), None
    )


def _vit_options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of timm's VisionTransformer that the tensors tell."""
    if any(name not in tensors for name in VIT_NAMES):
        return {}
    hidden, width = tensors[VIT_NAMES[2]].shape
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    tokens, positions = _vit_prefix(tensors), tensors.get("pos_embed")
    registers = tensors.get("reg_token")
    return {
        "patch_size": tensors[VIT_NAMES[0]].shape[-1],
        "embed_dim": width,
        "depth": len(blocks),
        "mlp_ratio": hidden / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "class_token": "cls_token" in tensors,
        "reg_tokens": 0 if registers is None else registers.shape[1],
        "pre_norm": "norm_pre.weight" in tensors,
        "no_embed_class": tokens > 0
        and positions is not None
        and isqrt(positions.shape[1]) ** 2 == positions.shape[1],
    }
