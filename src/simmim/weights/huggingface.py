"""Hugging Face folders (`save_pretrained`) of ViT, DeiT, BEiT, Swin and SwinV2.

Names are those that transformers writes to the file, which its versions keep the same.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simmim.weights.files import read_folder
from simmim.weights.fit import HEAD, MODEL, TOKEN, Architecture, Weights

ENCODERS = {
    "vit": "vit_base_patch16_224",
    "deit": "deit_base_distilled_patch16_224",  # its models always have the distillation token
    "beit": "beit_base_patch16_224",
    "swin": "swin_base_patch4_window7_224",
    "swinv2": "swinv2_base_window12_192",
}

# Theirs -> timm's, tried in this order; a name that none of them covers is no part of the encoder.
RENAMED = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"embeddings\.norm\.(\w+)", r"patch_embed.norm.\1"),
    (
        r"encoder\.relative_position_bias\.relative_position_bias_table",
        "rel_pos_bias.relative_position_bias_table",
    ),
    (r"encoder\.layers\.(\d+)\.downsample\.(.+)", r"layers.\1+.downsample.\2"),
    (r"(?:layernorm|norm)\.(\w+)", r"norm.\1"),
    (r"pooler\.layernorm\.(\w+)", r"fc_norm.\1"),
]
BLOCK = r"encoder\.(?:layer\.(?P<block>\d+)|layers\.(?P<stage>\d+)\.blocks\.(?P<inner>\d+))\."
IN_BLOCK = [
    (
        r"attention\.(?:attention|self)\.(?:relative_position_bias\.)?relative_position_bias_table",
        "attn.relative_position_bias_table",
    ),
    (r"attention\.self\.continuous_position_bias_mlp\.(.+)", r"attn.cpb_mlp.\1"),
    (r"attention\.self\.logit_scale", "attn.logit_scale"),
    (r"attention\.output\.dense\.(\w+)", r"attn.proj.\1"),
    (r"intermediate\.dense\.(\w+)", r"mlp.fc1.\1"),
    (r"output\.dense\.(\w+)", r"mlp.fc2.\1"),
    (r"layernorm_before\.(\w+)", r"norm1.\1"),
    (r"layernorm_after\.(\w+)", r"norm2.\1"),
    (r"lambda_([12])", r"gamma_\1"),
]
QKV = re.compile(BLOCK + r"attention\.(?:attention|self)\.(?P<part>query|key|value)\.(?P<kind>\w+)")


def hugging_face_weights(folder: Path, config: dict[str, Any]) -> Weights:
    """Read a Hugging Face folder.

    Args:
        folder: What `save_pretrained` wrote.
        config: Its config.json.

    Returns:
        The tensors under our names, and the model that they are for.

    Raises:
        ValueError: If its model is none of those that timm has as well.
    """
    weights = Weights(str(folder), _architecture(config, folder))
    prefix, parts = f"{config['model_type']}.", {}
    for name, tensor in read_folder(folder).items():
        inner = name.removeprefix(prefix)
        if match := QKV.fullmatch(inner):
            parts[name] = (match, tensor)
        elif inner == "embeddings.mask_token":
            weights.add(name, TOKEN, tensor)
        elif match := re.fullmatch(r"decoder\.0\.(weight|bias)", inner):
            weights.add(name, f"{HEAD}proj.{match[1]}", tensor)
        elif place := _place(inner):
            weights.add(name, f"{MODEL}{place}", tensor)
        else:
            weights.skip(name)
    _join_attention(weights, parts, separate_bias=config["model_type"] in ("beit", "swinv2"))
    return weights


def _place(name: str) -> str | None:
    """The name in timm, or None."""
    start = re.match(BLOCK, name)
    for pattern, ours in IN_BLOCK if start else RENAMED:
        match = re.fullmatch(pattern, name[start.end() :] if start else name)
        if match:
            place = _block(start) + match.expand(ours) if start else match.expand(ours)
            # timm's stages begin with the downsampling that theirs end with.
            return re.sub(r"(\d+)\+", lambda m: str(int(m[1]) + 1), place)
    return None


def _block(match: re.Match[str]) -> str:
    if match["block"] is not None:
        return f"blocks.{match['block']}."
    return f"layers.{match['stage']}.blocks.{match['inner']}."


def _join_attention(
    weights: Weights,
    parts: Mapping[str, tuple[re.Match[str], Tensor]],
    separate_bias: bool,
) -> None:
    """Make one qkv of query, key and value, but for biases that timm keeps apart (key has none)."""
    joint: dict[str, dict[str, Tensor]] = {}
    for name, (match, tensor) in parts.items():
        part, kind = match["part"], match["kind"]
        if kind == "bias" and separate_bias:
            weights.add(name, f"{MODEL}{_block(match)}attn.{part[0]}_bias", tensor)
        else:
            place = f"{MODEL}{_block(match)}attn.qkv.{kind}"
            joint.setdefault(place, {})[part] = tensor
            weights.used[name] = place
    for place, tensors in joint.items():
        if missing := {"query", "key", "value"} - set(tensors):
            raise ValueError(f"{weights.source} lacks the {' and '.join(missing)} of {place}")
        weights.tensors[place] = torch.cat([tensors[part] for part in ("query", "key", "value")])


def _architecture(config: dict[str, Any], folder: Path) -> Architecture:
    kind = config["model_type"]
    if kind not in ENCODERS:
        raise ValueError(f"{folder} holds a {kind}: use one of {', '.join(ENCODERS)}")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(f"{folder} has the activation {activation!r}, unlike any {kind} of timm")
    size, patch = config.get("image_size", 224), config.get("patch_size", 16)
    if config.get("use_absolute_embeddings"):
        raise ValueError(f"{folder} has absolute positions, unlike any {kind} of timm")
    options = {"patch_size": patch if isinstance(patch, int) else patch[0]}
    options |= _swin(config) if kind.startswith("swin") else _vit(config)
    eps = config.get("layer_norm_eps", 1e-5 if kind.startswith("swin") else 1e-12)
    chans = config.get("num_channels", 3)
    return Architecture(ENCODERS[kind], size, chans, options, norm_eps=eps)


def _vit(config: dict[str, Any]) -> dict[str, Any]:
    width = config.get("hidden_size", 768)
    options = {
        "embed_dim": width,
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "mlp_ratio": config.get("intermediate_size", 4 * width) / width,
    }
    if config["model_type"] != "beit":
        return options | {"qkv_bias": config.get("qkv_bias", True)}
    return options | {
        "init_values": config.get("layer_scale_init_value", 0.1),
        "use_abs_pos_emb": config.get("use_absolute_position_embeddings", False),
        "use_rel_pos_bias": config.get("use_relative_position_bias", False),
        "use_shared_rel_pos_bias": config.get("use_shared_relative_position_bias", False),
        "global_pool": "avg" if _mean_pooling(config) else "",
    }


def _mean_pooling(config: dict[str, Any]) -> bool:
    """Whether a BEiT ends in a pooler with its norm, and so without a norm of its tokens."""
    masked = any("MaskedImage" in name for name in config.get("architectures") or ())
    return bool(config.get("use_mean_pooling", True)) and not masked


def _swin(config: dict[str, Any]) -> dict[str, Any]:
    options = {
        "embed_dim": config.get("embed_dim", 96),
        "depths": config.get("depths", [2, 2, 6, 2]),
        "num_heads": config.get("num_heads", [3, 6, 12, 24]),
        "window_size": config.get("window_size", 7),
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "qkv_bias": config.get("qkv_bias", True),
    }
    if config["model_type"] == "swinv2":
        windows = config.get("pretrained_window_sizes") or [0, 0, 0, 0]
        options["pretrained_window_sizes"] = windows[: len(options["depths"])]
    return options
