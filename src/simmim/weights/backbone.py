"""From pretraining to a task: the encoder in a file, built as the task wants it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from torch import nn

from simmim.encoder import set_norm_eps
from simmim.encoders.dry_run import multiples
from simmim.weights import find_checkpoint
from simmim.weights.api import check_heads, count_classes
from simmim.weights.fit import MODEL, Architecture, Report, Weights, fit
from simmim.weights.shards import is_sharded, read_sharded
from simmim.weights.sources import TIMM, build_encoder, is_ours, open_weights

ENCODER = "vit_base_patch16_224"  # where neither a name nor weights are given
Size = int | list[int]


@dataclass
class Backbone:
    """A timm model to go on with.

    Attributes:
        model: The model; its weights are the file's, or new.
        encoder: Its name.
        img_size: Height and width, or one number.
        in_chans: Channels.
        options: Its other options, plain values: together with the name they build it again.
        num_classes: Classes of timm's classifier; 0 = none.
        classes: Their names, where the weights are a classifier of ours or a folder of timm's.
        report: What became of each tensor of the file; None without a file.
        statistics: Mean and standard deviation of each channel (pixels in 0..1) that the weights
            were made with, where they are known.
    """

    model: Any
    encoder: str
    img_size: Size
    in_chans: int
    options: dict[str, Any]
    num_classes: int = 0
    classes: list[str] = field(default_factory=list)
    report: Report | None = None
    statistics: tuple[list[float], list[float]] | None = None


def open_backbone(
    weights: str | None,
    encoder: str | None = None,
    img_size: Size | None = None,
    in_chans: int | None = None,
    encoder_kwargs: Mapping[str, Any] | None = None,
    *,
    classifier: int | None = 0,
    drop_path_rate: float = 0.0,
    global_pool: str | None = None,
    class_token: bool = False,
    trust: bool = False,
) -> Backbone:
    """Build the encoder of a file, or a new one.

    Args:
        weights: As `path` of `load_encoder`; None begins from scratch.
        encoder: Name of a timm model; by default the file's.
        img_size: By default that of the file, or 224.
        in_chans: By default those of the file, or 3.
        encoder_kwargs: Options of the timm model that are to differ from the file's.
        classifier: Classes of timm's classifier: 0 = none; None = the file's, if it has one.
        drop_path_rate: Stochastic depth.
        global_pool: "avg", "token" or "" (none), for models that can choose.
        class_token: Whether the task reads a class token.
        trust: Whether an encoder of a user's own may be imported.

    Raises:
        ValueError: If the encoder in the file is not complete, does not fit, or would not see all
            of an image.
    """
    given = dict(encoder_kwargs or {})
    eps = given.pop("norm_eps", None)
    sizes = {"img_size": img_size, "in_chans": in_chans}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    found = None
    if weights is not None:
        found = open_weights(weights, {**given, **sizes}, encoder=encoder, trust=trust)
    described = (
        found.architecture if found else Architecture(encoder or ENCODER, 224, 3, trust=trust)
    )
    if encoder not in (None, described.encoder):  # the user's own name: the tensors must fit it
        size, chans = described.img_size, described.in_chans
        described = Architecture(str(encoder), size, chans, trust=trust)
    options = {**described.options, **given}
    for name in ("num_classes", "global_pool", "pretrained", "img_size", "in_chans"):
        options.pop(name, None)
    if options.get("class_token") is False:  # timm would pool the token that is not there
        options["global_pool"] = "avg"
    built: dict[str, Any] = {**options, **sizes}
    plan = _plan(described, built)
    _check_patches(plan, described.encoder, img_size or described.img_size)
    if class_token and not getattr(plan, "num_prefix_tokens", 0):
        raise ValueError(f"{described.encoder} has no class token to pool: use pooling mean")
    if global_pool is not None and getattr(plan, "global_pool", None) not in (None, global_pool):
        built["global_pool"] = options["global_pool"] = global_pool
    if found and not global_pool and _has_no_norm(found):  # then there is none behind the tokens
        built["global_pool"] = options["global_pool"] = "avg"
    classes = count_classes(found) if found and classifier is None else classifier or 0
    rates = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    model: Any = build_encoder(described, {**built, **rates, "num_classes": classes})
    backbone = Backbone(
        model=model,
        encoder=described.encoder,
        img_size=img_size or described.img_size,
        in_chans=in_chans or described.in_chans,
        options=options,
        num_classes=classes,
    )
    if found:
        check_heads(found, model)
        for ours in [name for name in found.tensors if not name.startswith(MODEL)]:
            found.drop(ours, "for pretraining alone")
        places = {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
        backbone.report = fit(found, places, model)
        eps = found.architecture.norm_eps if eps is None else eps
        backbone.statistics = statistics_of(str(weights), backbone.in_chans)
        backbone.classes = class_names(str(weights))
    set_norm_eps(model, eps)
    if eps is not None:
        options["norm_eps"] = eps
    return backbone


def image_size(img_size: Size | None, weights: str | None, *model: Any) -> Size:
    """The size that is asked for, or else that of the weights, or 224."""
    return img_size or _shape(weights, *model)[0]


def channels(in_chans: int | None, weights: str | None, *model: Any) -> int:
    """The channels that are asked for, or else those of the weights, or 3."""
    return in_chans or _shape(weights, *model)[1]


def _shape(
    weights: str | None, encoder: str | None, encoder_kwargs: Mapping[str, Any] | None
) -> tuple[Size, int]:
    if weights is None:
        return 224, 3
    if weights.startswith(TIMM):
        config = timm.get_pretrained_cfg(weights.removeprefix(TIMM))
        return (config.input_size[-1] if config else 224), 3
    if (ours := our_checkpoint(weights)) is not None:
        hparams = ours["hyper_parameters"]
        return hparams.get("img_size") or 224, hparams.get("in_chans") or 3
    # Not ours: it names no code.
    architecture = open_weights(weights, encoder_kwargs or {}, encoder=encoder).architecture
    return architecture.img_size, architecture.in_chans


def _has_no_norm(weights: Weights) -> bool:
    """Whether it was pretrained without a norm behind the tokens: fc_norm is a classifier's."""
    tensors = weights.tensors
    behind = f"{MODEL}fc_norm.weight" in tensors and f"{MODEL}norm.weight" not in tensors
    return behind and not count_classes(weights)


def _plan(described: Architecture, options: Mapping[str, Any]) -> nn.Module:
    """The model without its weights, to see what it can do."""
    with torch.device("meta"):
        return build_encoder(described, options)


def _check_patches(model: Any, name: str, img_size: Size) -> None:
    """Refuse a size of which timm's patches would leave out the last rows or columns."""
    patches = getattr(model, "patch_embed", None)
    if not isinstance(patches, PatchEmbed) or patches.dynamic_img_pad:
        return
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    for side, patch in zip(sides, patches.patch_size, strict=True):
        if side % patch:
            raise ValueError(
                f"img_size {side} is not a multiple of the {patch} pixels of a patch of {name}: "
                f"use {multiples(side, patch)}"
            )


def statistics_of(weights: str, in_chans: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that the weights were made with, for so many channels."""
    mean: Any = IMAGENET_DEFAULT_MEAN
    std: Any = IMAGENET_DEFAULT_STD
    folder = Path(weights).expanduser()
    if weights.startswith(TIMM):
        config = timm.get_pretrained_cfg(weights.removeprefix(TIMM))
        mean, std = (config.mean, config.std) if config else (mean, std)
    elif (folder / "preprocessor_config.json").is_file():
        said = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        mean, std = said.get("image_mean", mean), said.get("image_std", std)
    elif (folder / "config.json").is_file():
        said = json.loads((folder / "config.json").read_text("utf-8")).get("pretrained_cfg") or {}
        mean, std = said.get("mean", mean), said.get("std", std)
    elif (ours := our_checkpoint(weights)) is not None:
        state = ours["state_dict"]
        if "mean" not in state:
            return None
        mean, std = state["mean"].flatten().tolist(), state["std"].flatten().tolist()
    return (list(mean), list(std)) if len(mean) == in_chans else None


def class_names(weights: str) -> list[str]:
    """Names of the classes that a classifier was trained for; none where they are not known."""
    config = Path(weights).expanduser() / "config.json"
    if config.is_file():
        names = json.loads(config.read_text("utf-8")).get("label_names") or []
        return [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    return list((our_checkpoint(weights) or {}).get("classes") or [])


def our_checkpoint(weights: str) -> dict[str, Any] | None:
    """A checkpoint of ours, one file's tensors left on the disk; None if it is anything else."""
    if weights.startswith(TIMM) or (Path(weights).expanduser() / "config.json").is_file():
        return None
    try:
        path = find_checkpoint(weights)
        if is_sharded(path):
            return read_sharded(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ValueError:
        raise
    except Exception:  # no zip file of torch's, or asks for code: open_weights says what it is
        return None
    return content if is_ours(content) else None
