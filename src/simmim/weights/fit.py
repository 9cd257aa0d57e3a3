"""Fit tensors from elsewhere into a model, and account for every one of them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, cast

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from simmim.weights.resize import Resize, resize_positions, resize_table

MODEL = "encoder.model."  # timm's names, in the state dict of SimMIM
TOKEN = "encoder.mask_token"
HEAD = "head."
BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")  # computed anew
SHARED_TABLE = f"{MODEL}rel_pos_bias.relative_position_bias_table"


@dataclass
class Architecture:
    """What a file says of the model that its tensors are for.

    Attributes:
        encoder: Name of a timm model.
        img_size: One number, or [height, width].
        in_chans: Channels of the images.
        options: Options of the timm model.
        task: Further arguments of SimMIM: mask_patch_size, target, ...
        norm_eps: Epsilon of the LayerNorms, where it is not timm's for this model.
        trust: Whether an encoder of a user's own may be imported.
    """

    encoder: str
    img_size: int | list[int]
    in_chans: int
    options: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None
    trust: bool = False


@dataclass
class Weights:
    """Tensors of a file under the names that they have in SimMIM.

    Attributes:
        source: What a user calls the file.
        tensors: By our name: encoder.model.*, encoder.mask_token, head.*.
        used: Name in the file -> our name. Two may share one: query, key and value become qkv.
        dropped: Name in the file -> why it is not needed.
        changed: Our name -> how a tensor was brought to another size.
        architecture: What the tensors are for.
        grid: Rows and columns of patches that positions are for; None where that is a square.
        remedy: What to do where the model is another one than that of the tensors.
    """

    source: str
    architecture: Architecture
    tensors: dict[str, Tensor] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    remedy: str = ""

    def __post_init__(self) -> None:
        self.remedy = self.remedy or f"build it as {_described(self.architecture)}"

    def add(self, name: str, ours: str, tensor: Tensor) -> None:
        """Take a tensor of the file."""
        if ours in self.tensors:
            raise ValueError(f"{self.source} has two tensors for {ours}, {name} is one of them")
        self.tensors[ours], self.used[name] = tensor, ours

    def skip(self, name: str) -> None:
        """Leave a tensor of the file that the encoder has no use for."""
        self.dropped[name] = "computed anew" if name.endswith(BUFFERS) else "no part of an encoder"

    def drop(self, ours: str, why: str) -> None:
        """Leave a tensor that was taken before."""
        del self.tensors[ours]
        for name in [name for name, place in self.used.items() if place == ours]:
            del self.used[name]
            self.dropped[name] = why


@dataclass
class Report:
    """What became of each tensor.

    Attributes:
        source: What a user calls the file.
        used: Name in the file -> name in the model.
        dropped: Name in the file -> why it is not needed.
        missing: Name in the model -> why the file need not have it.
        changed: Name in the file -> how a tensor that is used was brought to another size.
    """

    source: str
    used: dict[str, str]
    dropped: dict[str, str]
    missing: dict[str, str]
    changed: dict[str, str] = field(default_factory=dict)

    @property
    def head_is_new(self) -> bool:
        """Whether the prediction head begins from scratch on top of a trained encoder."""
        return any(name.startswith(HEAD) for name in self.missing)

    def __str__(self) -> str:
        parts = [f"{self.source}: {len(self.used)} tensors used"]
        for how, count in Counter(self.changed.values()).items():
            parts.append(f"{count} of them {how}")
        for what, names in (("dropped", self.dropped), ("missing", self.missing)):
            for why, count in Counter(names.values()).items():
                parts.append(f"{count} {what} ({why})")
        return ", ".join(parts)


def fit(
    weights: Weights, places: Mapping[str, Tensor], model: nn.Module, resize: Resize = "official"
) -> Report:
    """Copy tensors into a model, resizing positions where the image or the window is another.

    Args:
        weights: The tensors.
        places: Where they go: our names -> the model's own tensors.
        model: The timm model among them.
        resize: How positions change size: as the "official" code or as "timm" does it.

    Returns:
        The report.

    Raises:
        ValueError: If a part of the encoder is not in the file, does not fit, or if the file has a
            part that the encoder has no place for.
    """
    _share_table(weights, places)
    _move_norm(weights, places)
    whole_head = _head(places) == _head(weights.tensors)
    for ours in list(weights.tensors):
        if why := _not_needed(ours, weights.tensors[ours], places, model, whole_head):
            weights.drop(ours, why)
    unplaced = [ours for ours in weights.tensors if ours not in places]
    if unplaced:
        raise ValueError(
            f"{weights.source} has {_listed(unplaced)}, for which the encoder has no place: "
            f"{weights.remedy}"
        )
    missing = {name: _may_miss(name, model) for name in places if name not in weights.tensors}
    incomplete = [name for name, why in missing.items() if not why]
    if incomplete:
        raise ValueError(
            f"{weights.source} is not complete: it lacks {_listed(incomplete)} of the encoder: "
            f"{weights.remedy}"
        )
    with torch.no_grad():
        for ours, tensor in weights.tensors.items():
            places[ours].copy_(_resized(ours, tensor, places[ours], weights, model, resize))
    if weights.architecture.norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = weights.architecture.norm_eps
    places_of = {name: ours.replace("*", "0") for name, ours in weights.used.items()}
    changed = {n: weights.changed[ours] for n, ours in places_of.items() if ours in weights.changed}
    return Report(weights.source, dict(weights.used), dict(weights.dropped), missing, changed)


def _share_table(weights: Weights, places: Mapping[str, Tensor]) -> None:
    """Give each block its copy of a shared table, as the official fine-tuning does."""
    tables = [
        name
        for name in places
        if name.endswith(".relative_position_bias_table") and ".attn." in name
    ]
    if SHARED_TABLE not in weights.tensors or SHARED_TABLE in places or not tables:
        return
    shared = weights.tensors.pop(SHARED_TABLE)
    weights.tensors |= {name: shared for name in tables}
    names = [name for name, ours in weights.used.items() if ours == SHARED_TABLE]
    weights.used |= {name: f"{MODEL}blocks.*.attn.relative_position_bias_table" for name in names}


def _move_norm(weights: Weights, places: Mapping[str, Tensor]) -> None:
    """Give the tokens the norm that a mean-pooled classifier has behind its pooling."""
    for part in ("weight", "bias"):
        norm, behind = f"{MODEL}norm.{part}", f"{MODEL}fc_norm.{part}"
        if norm in places and behind not in places and norm not in weights.tensors:
            if behind in weights.tensors:
                weights.tensors[norm] = weights.tensors.pop(behind)
            weights.used |= {name: norm for name, ours in weights.used.items() if ours == behind}


def _head(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items() if name.startswith(HEAD)}


def _not_needed(
    ours: str, tensor: Tensor, places: Mapping[str, Tensor], model: nn.Module, whole_head: bool
) -> str | None:
    """Why a tensor may be left out, or None."""
    if ours.startswith(HEAD):
        return None if whole_head else "the head of another prediction"
    if ours.startswith(_classifiers(model)):
        fits = ours in places and places[ours].shape == tensor.shape
        return None if fits else "the classifier of other classes"
    if ours == TOKEN and ours in places and places[ours].shape != tensor.shape:
        return "the mask token of another place"
    if ours in places:
        return None
    if ours == TOKEN:
        return "no mask token is used here"
    if ours.startswith(f"{MODEL}fc_norm."):
        return "the norm of a classifier"
    if ours.startswith(f"{MODEL}norm.") and f"{MODEL}fc_norm.weight" in places:
        return "mean pooling has its norm behind it (fc_norm)"
    return None


def _may_miss(ours: str, model: nn.Module) -> str:
    """Why a file need not have a tensor; empty if it must."""
    if ours.startswith((HEAD, *_classifiers(model), f"{MODEL}fc_norm.")):
        return "the head begins anew"
    return "the mask token begins anew" if ours == TOKEN else ""


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of a timm model's classifier, there or not."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{MODEL}{name}." for name in ([names] if isinstance(names, str) else names))


def _resized(
    ours: str, tensor: Tensor, place: Tensor, weights: Weights, model: Any, resize: Resize
) -> Tensor:
    """The tensor at the size of its place."""
    name = ours.removeprefix(MODEL)
    if name.endswith(".relative_position_bias_table") and tensor.ndim == 2:
        new = tuple(model.get_submodule(name.rpartition(".")[0]).window_size)
        # A ViT's window is the image; Swin's are smaller, and square.
        old = None if name.startswith("layers.") else weights.grid
        if tensor.shape != place.shape or old not in (None, new):
            side = (isqrt(len(tensor)) + 1) // 2
            weights.changed[ours] = _resize_of(old or (side, side), new)
            tensor = resize_table(tensor, new, old, resize)
    elif name == "pos_embed" and tensor.ndim == 3 and (grid := _grid_size(model)):
        new = grid
        if tensor.shape != place.shape or weights.grid not in (None, new):
            prefix = place.shape[1] - new[0] * new[1]
            side = isqrt(tensor.shape[1] - prefix)
            weights.changed[ours] = _resize_of(weights.grid or (side, side), new)
            tensor = resize_positions(tensor, new, prefix, weights.grid, resize)
    elif name in first_convs(model) and _takes_images(tensor, weights):
        if tensor.shape[1] != place.shape[1]:
            weights.changed[ours] = f"adapted from {tensor.shape[1]} to {place.shape[1]} channels"
        tensor = _adapted(tensor, place.shape[1], weights.source)
    if tensor.shape != place.shape:
        raise ValueError(
            f"{weights.source} has {name} of shape {tuple(tensor.shape)}, the encoder of "
            f"{tuple(place.shape)}: {weights.remedy}"
        )
    return tensor


def _resize_of(old: tuple[int, int], new: tuple[int, ...]) -> str:
    return f"resized from {old[0]} x {old[1]} to {new[0]} x {new[1]}"


def _grid_size(model: Any) -> tuple[int, int] | None:
    """Rows and columns of a model's patches, where timm says them."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return None if grid is None else (grid[0], grid[1])


def first_convs(model: nn.Module) -> list[str]:
    """The kernels that see the image, by timm's account."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    return [f"{name}.weight" for name in ([names] if isinstance(names, str) else names)]


def _takes_images(kernel: Tensor, weights: Weights) -> bool:
    """Whether the channels of a kernel are the image's, and not its rearranged pixels."""
    return kernel.ndim == 4 and kernel.shape[1] == weights.architecture.in_chans


def _adapted(kernel: Tensor, chans: int, source: str) -> Tensor:
    """A kernel for other channels; from or to gray it gives the same where all are equal."""
    old = kernel.shape[1]
    if chans == old:
        return kernel
    if chans == 1:
        return kernel.sum(1, keepdim=True)
    if old == 1:
        return kernel.expand(-1, chans, -1, -1) / chans
    if old == 3:  # timm's rule: colours in turn, scaled by 3 / chans
        return cast(Tensor, adapt_input_conv(chans, kernel))
    raise ValueError(
        f"{source} has weights for {old} channels, and nothing says which of them belong to which "
        f"of {chans}: use in_chans {old}, or 1 for their sum"
    )


def _described(architecture: Architecture) -> str:
    size, chans = architecture.img_size, architecture.in_chans
    return (
        f"{architecture.encoder} of img_size {size} and in_chans {chans} with encoder_kwargs "
        f"{architecture.options}"
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(name.removeprefix(MODEL) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
