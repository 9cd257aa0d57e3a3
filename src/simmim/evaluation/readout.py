"""What a probe reads of an encoder: tokens of a layer, pooled to one embedding."""

import sys
from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor, nn

Tokens = tuple[Tensor, Tensor | None]  # of the patches, (B, L, D), and the class token, (B, D)


def choose_layers(layer: int | list[int] | str | None, model: Any, name: str) -> list[int]:
    """Say which layers of a timm model are read.

    Args:
        layer: Blocks of a plain transformer, stages of a hierarchical model, counted from 1; or
            "all". None: the last, behind the final norm.
        model: The timm model.
        name: Its name, for the error.

    Returns:
        Layers, counted from 1 and in order; none = the last, behind the final norm.

    Raises:
        ValueError: If there is no such layer.
    """
    if layer is None:
        return []
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{name} gives no middle layers: leave layer out to read the last")
    last = len(model.feature_info)
    if isinstance(layer, str):
        return list(range(1, last + 1))
    layers = sorted(set(layer)) if isinstance(layer, list) else [layer]
    if not layers or layers[0] < 1 or layers[-1] > last:
        raise ValueError(f"layer {layer} of {name} does not exist: use 1 to {last}, or all")
    return layers


def read_tokens(
    model: Any, images: Tensor, layers: list[int], *, class_token: bool = False
) -> list[Tokens]:
    """Run a timm model once and read its tokens.

    Args:
        model: The timm model.
        images: Normalised, (B, C, H, W).
        layers: From `choose_layers`.
        class_token: Whether the class tokens of middle layers are wanted too.

    Returns:
        The tokens of each layer, without its norm; or without layers those of the last, with it.
    """
    if not layers:
        return [_split(model, model.forward_features(images))]
    found = model.forward_intermediates(
        images,
        indices=[layer - 1 for layer in layers],
        stop_early=True,
        output_fmt="NCHW",
        intermediates_only=True,
        **({"return_prefix_tokens": True} if class_token else {}),
    )
    pairs = found if class_token else [(features, None) for features in found]
    return [
        (features.flatten(2).transpose(1, 2), None if prefix is None else prefix[:, 0])
        for features, prefix in pairs  # NCHW -> NLC
    ]


@torch.no_grad()
def embed_layers(
    module: Any,
    loader: Any,
    layer: int | list[int] | str = "all",
    pooling: Literal["mean", "max"] = "mean",
) -> tuple[dict[int, Tensor], Tensor]:
    """Embed the images of a loader by several layers of a `SimMIM`, in one pass.

    Args:
        module: The `SimMIM`, on the device that is to compute. It is left as it was.
        loader: The data module's, or any other that the module takes.
        layer: As in `choose_layers`.
        pooling: How the patch tokens become one vector: their mean (the paper's) or maximum.

    Returns:
        The embeddings by each layer, counted from 1: float32 on the CPU, (N, D); and the labels,
        int64, (N,), -1 where the loader has none.
    """
    encoder = module.encoder
    layers = choose_layers(layer, encoder.model, encoder.name)
    found: dict[int, list[Tensor]] = {number: [] for number in layers}
    labels = []
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    for i, batch in enumerate(Tqdm(loader, desc="Embed", delay=1.0, leave=False, file=sys.stdout)):
        _, images, _ = module.inputs(move_data_to_device(batch, module.device), i)
        for number, (tokens, _) in zip(
            layers, read_tokens(encoder.model, images, layers), strict=True
        ):
            found[number].append(pool(tokens.float(), pooling).cpu())
        known = labels_of(batch)
        labels.append(torch.full((len(images),), -1) if known is None else known)
    for part, training in modes:
        part.training = training
    return {number: torch.cat(parts) for number, parts in found.items()}, torch.cat(labels)


def labels_of(batch: Any) -> Any:
    """The labels of a batch: a dict's `label`, or what stands behind the images; None if none."""
    if isinstance(batch, Mapping):
        return batch.get("label")
    return batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None


def pool(tokens: Tensor, pooling: str, class_token: Tensor | None = None) -> Tensor:
    """Pool the tokens of an image to one embedding, (B, D).

    Args:
        tokens: Of the patches, (B, L, D).
        pooling: mean or max of the patch tokens, or token (the class token).
        class_token: (B, D), where it is pooled.
    """
    if pooling == "token":
        assert class_token is not None
        return class_token
    return tokens.amax(1) if pooling == "max" else tokens.mean(1)


def describe(layer: int | None, pooling: str) -> str:
    """Say what an embedding is, for people: "the mean of the patch tokens of layer 8"."""
    which = "the class token" if pooling == "token" else f"the {pooling} of the patch tokens"
    return f"{which} of {'the last layer, behind its norm' if layer is None else f'layer {layer}'}"


class Reader(nn.Module):
    """Images as they come from the loader -> embeddings.

    Args:
        model: The timm model.
        mean: Of the pixels' channels in 0..1, by which they are normalised.
        std: Their standard deviation.
        layers: From `choose_layers`, one at most.
        pooling: mean, max or token.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        layers: list[int],
        pooling: str,
    ) -> None:
        super().__init__()
        self.model, self.layers, self.pooling = model, layers, pooling
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, raw: Tensor) -> Tensor:
        """Embed uint8, or float in 0..1, (B, C, H, W) -> float32, (B, D)."""
        images = raw.float() / 255 if raw.dtype == torch.uint8 else raw.float()
        images = (images - self.mean) / self.std
        read = read_tokens(self.model, images, self.layers, class_token=self.pooling == "token")
        tokens, class_token = read[0]
        class_token = None if class_token is None else class_token.float()
        return pool(tokens.float(), self.pooling, class_token)


class Probe(nn.Module):
    """A linear classifier on pooled tokens.

    Args:
        in_features: Width of the tokens.
        num_classes: Classes.
        pooling: mean, token or attention.
        batch_norm: Normalise each feature over the batch first.
    """

    def __init__(self, in_features: int, num_classes: int, pooling: str, batch_norm: bool) -> None:
        super().__init__()
        self.pooling = pooling
        if pooling == "attention":
            self.query = nn.Parameter(torch.randn(1, 1, in_features) * 0.02)
            heads = gcd(max(in_features // 64, 1), in_features)  # of 64 channels
            self.attention = nn.MultiheadAttention(in_features, heads, batch_first=True)
        self.norm = nn.BatchNorm1d(in_features, affine=False, eps=1e-6) if batch_norm else None
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, tokens: Tensor, class_token: Tensor | None = None) -> Tensor:
        """Classify patch tokens, (B, L, D), or the class token, (B, D) -> logits, (B, K)."""
        if self.pooling == "attention":
            query = self.query.expand(tokens.shape[0], -1, -1)  # len() would fix it in an export
            embedding = self.attention(query, tokens, tokens, need_weights=False)[0][:, 0]
        else:
            embedding = pool(tokens, self.pooling, class_token)
        return cast(Tensor, self.linear(embedding if self.norm is None else self.norm(embedding)))


def init_head_(head: Any, scale: float) -> None:
    """Initialise a classifier as the official code does: std 0.02 times a scale, biases 0."""
    for module in head.modules() if isinstance(head, nn.Module) else ():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            with torch.no_grad():
                module.weight.mul_(scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _split(model: Any, features: Tensor) -> Tokens:
    """What forward_features gives, in any layout -> patch tokens, (B, L, D), and class token."""
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    if features.ndim == 3:
        return features[:, prefix:], features[:, 0] if prefix else None
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2), None  # NHWC -> NLC
    return features.flatten(2).transpose(1, 2), None  # NCHW -> NLC
