"""Attention of the encoder: its entropy and distance in the log, its maps for pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from simmim.callbacks.base import call, fixed_samples, log_now, undisturbed
from simmim.callbacks.schedule import EpochPictures


class Inside(EpochPictures):
    """Log where the attention looks in a few fixed validation images, every few epochs.

    `attention/entropy_LAYER` is that of the attention's weights as a share of the largest possible
    (1: it looks at all tokens alike), a mean over images, heads and queries, for the first, the
    middle and the last layer; `attention/distance_LAYER` how far it looks, in pixels, where a layer
    sees the whole grid of patches (not within windows). Both are of unmasked images. Encoders
    without attention, or whose attention does not call PyTorch's, have neither.

    Args:
        every_n_epochs: Epochs between two looks; the last epoch always has one. 0: none.
        num_images: Validation images to look at.
    """

    NAME, AT_START = "attention", True

    def __init__(self, every_n_epochs: int = 10, num_images: int = 8) -> None:
        super().__init__(every_n_epochs, num_images)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule, epochs: int) -> bool:
        """Look inside, and log what is seen; there is no picture."""
        with undisturbed(pl_module):
            samples = fixed_samples(trainer, self.num_images)
            if samples is None:
                return False
            attention = call(trainer, lambda images: inspect(pl_module, images), samples[0])
        if trainer.is_global_zero:
            log_now(trainer, attention)
        return True


@torch.no_grad()
def inspect(module: Any, images: Tensor) -> dict[str, float]:
    """Entropies and distances of the attention of a `SimMIM` by name.

    Args:
        module: The module.
        images: Normalised images, (B, C, H, W).
    """
    encoder = module.encoder
    grid, stride = getattr(encoder, "grid_size", (0, 0)), getattr(encoder, "stride", 0)
    with WatchAttention(grid, stride, len(images)) as watch:
        encoder(images)
    return watch.summary()


@torch.no_grad()
def attention_maps(
    encoder: Any, images: Tensor, place: tuple[int, int], mask: Tensor | None = None
) -> Tensor:
    """Where one patch looks: its attention in each layer, for pictures.

    Args:
        encoder: That of a `SimMIM`, in eval mode.
        images: Normalised images, (B, C, H, W).
        place: Row and column of the patch in the encoder's grid, from 0.
        mask: Cells that are hidden from the encoder, (B, h, w); None: none.

    Returns:
        The attention's weights over the grid of patches, (layers, B, heads, h, w), float32. They
        sum to 1, less what goes to class and register tokens.

    Raises:
        ValueError: If there is no such patch, or no layer whose attention sees the whole grid.
    """
    height, width = encoder.grid_size
    row, column = place
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"place {place} is outside of the {height} x {width} patches")
    watch = WatchAttention((height, width), encoder.stride, len(images), keep=True)
    with watch, _fused(encoder):
        encoder(images, mask)
    whole = [w for w in watch.weights if watch.prefix_of(w) is not None]
    if not whole:
        raise ValueError(
            f"no layer of {encoder.name} looks at the whole image by PyTorch's attention: use a "
            "plain transformer"
        )
    rows = [w[..., -height * width :, -height * width :][:, :, row * width + column] for w in whole]
    return torch.stack(rows).unflatten(-1, (height, width))


class WatchAttention(TorchFunctionMode):
    """Note the entropy and distance of each call of PyTorch's attention.

    Args:
        grid: Height and width of the encoder's grid of patches.
        stride: Pixels of one.
        batch_size: Images that are encoded together; a layer that sees more has cut them into
            windows. None: that is not known.
        keep: Whether the weights are kept as well.
    """

    MOST = 2**26  # weights of one layer that are computed; longer sequences are left out

    def __init__(
        self,
        grid: tuple[int, int],
        stride: int,
        batch_size: int | None = None,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.stride, self.batch_size, self.keep = grid, stride, batch_size, keep
        self.entropies: list[Tensor] = []
        self.distances: list[Tensor | None] = []
        self.weights: list[Tensor] = []  # of each layer, (B, heads, queries, keys)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the attention's arguments, and go on."""
        if func is F.scaled_dot_product_attention:
            self._note(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def summary(self) -> dict[str, float]:
        """The first, the middle and the last layer's, counted from 1."""
        n, found = len(self.entropies), {}
        for layer in sorted({0, n // 2, n - 1}) if n else ():
            found[f"attention/entropy_{layer + 1}"] = float(self.entropies[layer])
            if (distance := self.distances[layer]) is not None:
                found[f"attention/distance_{layer + 1}"] = float(distance)
        return found

    def prefix_of(self, weights: Tensor) -> int | None:
        """Tokens before the grid's; None where the layer does not see the whole grid."""
        patches = self.grid[0] * self.grid[1]
        prefix = weights.shape[-1] - patches
        alike = weights.shape[-2] == weights.shape[-1]
        cut = self.batch_size is not None and len(weights) != self.batch_size
        return prefix if patches and 0 <= prefix <= 16 and alike and not cut else None

    def _note(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        queries, keys = query.shape[-2], key.shape[-2]
        if query.shape[:-2].numel() * queries * keys > self.MOST or keys < 2:
            return
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query.float() @ key.float().transpose(-2, -1) * scale
        if attn_mask is not None:
            bias = attn_mask.float()
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + bias
        weights = scores.softmax(-1)
        self.entropies.append(torch.special.entr(weights).sum(-1).mean() / torch.tensor(keys).log())
        self.distances.append(self._distance(weights))
        if self.keep:
            self.weights.append(weights)

    def _distance(self, weights: Tensor) -> Tensor | None:
        """Mean distance between a patch and what it looks at, in px; prefix tokens are left out."""
        prefix = self.prefix_of(weights)
        if prefix is None:
            return None
        rows, columns = (torch.arange(n, device=weights.device) for n in self.grid)
        places = torch.cartesian_prod(rows, columns).float() * self.stride
        among = weights[..., prefix:, prefix:]
        among = among / among.sum(-1, keepdim=True).clamp_min(1e-12)
        return (among * torch.cdist(places, places)).sum(-1).mean()


@contextmanager
def _fused(encoder: Any) -> Iterator[None]:
    """Let all of timm's attention call PyTorch's, whatever was chosen for speed."""
    chosen = [(part, part.fused_attn) for part in encoder.modules() if hasattr(part, "fused_attn")]
    try:
        for part, _ in chosen:
            part.fused_attn = True
        yield
    finally:
        for part, fused in chosen:
            part.fused_attn = fused
