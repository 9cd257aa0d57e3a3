"""Any timm image model as the encoder of a masked image: images and a mask -> one feature map."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from math import nan
from typing import Any

import timm
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointError

from simmim.encoders.custom import build_own, find_own_encoder
from simmim.encoders.dry_run import Call, Run, multiples
from simmim.encoders.visible_tokens import PLAIN, VisibleTokens, restore_grid, visible_places
from simmim.encoders.visible_windows import HIERARCHICAL, VisibleInWindows
from simmim.masking import fill_pixels, mask_grid, upsample_mask

MASK_FILLS = ("token", "zero", "mean", "noise")
HIDDEN_TOKENS = ("encode", "skip")
POINTWISE_HEADS = ("linear", "mlp")  # where tokens are skipped, nothing would be left to look at


class Encoder(nn.Module):
    """A timm model that sees a mask token, or a pixel fill, where the mask hides the image.

    One mechanism serves all models. A dry run at construction finds the stem, the first module
    whose output is a grid of tokens, and from then on a mask token stands in the hidden places of
    that output: for ViT and Swin the patch embedding's, before positions and the class token are
    added (SimMIM, section 3.2). Where hidden pixels would reach a prediction all the same, because
    the stem's convolutions overlap or its BatchNorm mixes images, they are set to 0 beforehand;
    where no module gives such a grid, that is all that is done. Parameters that the features do
    not depend on (class attention, a classifier's last convolution) are frozen.

    Args:
        name: A model of timm ("swin_base_patch4_window7_224"), or "hf-hub:..." or "local-dir:...";
            or a user's own, which has `forward_features` and `num_features` as timm's have.
        img_size: Height and width of the images in pixels, or one number for a square.
        in_chans: Channels of the images.
        mask_patch_size: Side of a cell of the mask in pixels. None: the encoder's own patch.
        mask_fill: What stands for hidden cells: a learned "token", or pixels "zero", "mean" (of the
            image's visible pixels) or "noise" (standard normal, seeded by `keys`).
        drop_rate: Dropout inside the blocks and after the position embedding (timm's own
            `drop_rate` is the classifier's).
        drop_path_rate: Stochastic depth, rising linearly to this rate in the last block.
        mask_stage: Add the token to the output of this stage (1 to 4: stride 4 to 32) of a
            hierarchical encoder instead, and fill the hidden pixels ("token": with the mean).
            A2MIM (arXiv:2205.13943) does so after stage 3 of a ResNet.
        hidden_tokens: "encode" them, or "skip" them: the model then sees visible tokens only, and
            the mask token stands in the hidden places of its features.
        grad_checkpointing: Keep no activations inside the blocks: less memory, more time.
        norm_eps: Epsilon of the LayerNorms. None: timm's (Hugging Face has 1e-12 in a ViT).
        trust: Whether a user's own model may be imported, by its import path.
        timm_kwargs: Further options of the timm model.

    Attributes:
        model: The timm model; its state dict has timm's names.
        mask_token: The learned token (1, 1, C), or None where only pixels are filled. C is that of
            the stem, or of the features where hidden tokens are skipped.
        num_features: Channels of the features.
        stride: Pixels per feature.
        patch_size: Pixels per token of the stem; per feature where there is none.
        img_size: Height and width in pixels.
        grid_size: Height and width of the features.
        mask_grid: Height and width of the mask, in cells.
        is_convolutional: Whether the model computes in NCHW, channels first.

    Raises:
        ValueError: If the model is unknown or gives no feature map, a size does not fit, or an
            option would do nothing.
    """

    _mask: Tensor | None  # while `forward` runs, for the hook on the stem
    _fill: str | None  # what hidden pixels become before the model sees them

    def __init__(
        self,
        name: str,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        mask_patch_size: int | None = 32,
        mask_fill: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mask_stage: int | None = None,
        hidden_tokens: str = "encode",
        grad_checkpointing: bool = False,
        norm_eps: float | None = None,
        trust: bool = False,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__()
        if mask_fill not in MASK_FILLS:
            raise ValueError(f"mask_fill {mask_fill!r} is not known: use {', '.join(MASK_FILLS)}")
        if hidden_tokens not in HIDDEN_TOKENS:
            raise ValueError(
                f"hidden_tokens {hidden_tokens!r} is not known: use {' or '.join(HIDDEN_TOKENS)}"
            )
        if in_chans < 1:
            raise ValueError(f"in_chans {in_chans} must be at least 1: 3 for colour, 1 for gray")
        self.name, self.img_size = name, _pair(img_size)
        if mask_patch_size is not None:
            mask_grid(self.img_size, mask_patch_size)  # refuse before a large model is built
        self.mask_token: nn.Parameter | None = None
        self._visible: VisibleTokens | VisibleInWindows | None = None
        device = torch.empty(0).device  # what `with torch.device(...)` asks for
        with torch.device("cpu" if device.type == "meta" else device):  # meta cannot be observed
            rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
            self.model: Any = create_timm_model(
                name, self.img_size, in_chans, rates, timm_kwargs, trust=trust
            )
            set_norm_eps(self.model, norm_eps)
            with _observing(self.model):
                run = Run(self.model, name, in_chans, self.img_size, mask_patch_size or 1)
                self._measure(run, mask_patch_size)
                if hidden_tokens == "skip":
                    self._skip_hidden(run, mask_fill, mask_stage)
                else:
                    self._place_token(run, mask_fill, mask_stage)
                if grad_checkpointing:
                    self._checkpoint(run.images)
        self.to(device)

    def forward(
        self,
        images: Float[Tensor, "b c H W"],
        mask: Bool[Tensor, "b h w"] | None = None,
        keys: Int[Tensor, " b"] | None = None,
        hidden_count: int | None = None,
    ) -> Float[Tensor, "b d h2 w2"]:
        """Features of the images, in which no hidden pixel has any part.

        Args:
            images: Normalised pixels.
            mask: True = hidden, at the resolution of `mask_grid`. None: nothing is hidden, and the
                features are exactly timm's `forward_features`, less class and register tokens.
            keys: What noise is drawn from (`masking.sample_keys`); else the place in the batch.
            hidden_count: Cells that every mask hides, which only skipping asks for. None: it is
                read off the mask, and a GPU is waited for.

        Raises:
            ValueError: If hidden tokens are skipped, and the masks hide different numbers of cells.
        """
        if mask is not None and self._fill is not None:
            images = fill_pixels(images, mask, self._fill, keys)
        if mask is not None and self._visible is not None:
            assert self.mask_token is not None
            place = visible_places(mask, self.grid_size, hidden_count)
            features = self._visible(self.model, images, place)
            return restore_grid(features, place, self.mask_token, self.grid_size)
        self._mask = mask
        try:
            features = self.model.forward_features(images)
        finally:
            self._mask = None
        return self._features.to_nchw(features)

    def tokens(
        self, images: Float[Tensor, "b c H W"], layer: int | None = None
    ) -> Float[Tensor, "b d h2 w2"]:
        """Features of a middle layer, for probes (SimMIM probes the 8th block of ViT-B).

        Args:
            images: Normalised pixels.
            layer: Counted from 1: blocks of a plain transformer, stages of a hierarchical model
                (of some, the stem is the first). None: the last, as `forward` gives it, behind the
                model's final norm; a middle layer is not normalised.

        Raises:
            ValueError: If the model has no such layer, or gives no middle layers at all.
        """
        if layer is None:
            return self(images)
        self.check_layer(layer)
        return self.model.forward_intermediates(
            images, indices=[layer - 1], stop_early=True, output_fmt="NCHW", intermediates_only=True
        )[0]

    def check_layer(self, layer: int) -> None:
        """Refuse a layer that `tokens` cannot read.

        Raises:
            ValueError: If the model has no such layer, or gives no middle layers at all.
        """
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"{self.name} gives no middle layers: use the last")
        layers = len(self.model.feature_info)
        if not 1 <= layer <= layers:
            raise ValueError(f"layer {layer} of {self.name} does not exist: use 1 to {layers}")

    def _measure(self, run: Run, mask_patch_size: int | None) -> None:
        """Read the sizes off a run of the model, and freeze what its features did not need."""
        self._features, stem = run.grid, run.find_stem()
        self.num_features, self.grid_size = run.grid.channels, run.grid.size
        self.stride = run.grid.stride
        self.is_convolutional = run.grid.layout == "NCHW"
        self.patch_size = stem.grid.stride if stem else self.stride
        self.mask_patch_size = mask_patch_size or self.patch_size
        self.mask_grid = mask_grid(self.img_size, self.mask_patch_size)
        for parameter in run.unreached():
            parameter.requires_grad_(False)

    def _skip_hidden(self, run: Run, mask_fill: str, mask_stage: int | None) -> None:
        """Let the model see visible tokens only, and the mask token stand among its features."""
        if mask_fill != "token" or mask_stage is not None:
            raise ValueError(
                "hidden_tokens 'skip' puts a mask token among the features, and nothing else: "
                f"leave mask_fill {mask_fill!r} at token, and mask_stage out"
            )
        kind = _skipping_kind(self.model, self.name)
        if self.mask_patch_size % self.stride:
            raise ValueError(
                f"mask_patch_size {self.mask_patch_size} is not a multiple of the {self.stride} "
                f"pixels of a feature of {self.name}, which hidden_tokens 'skip' keeps or leaves "
                f"out: use {multiples(self.mask_patch_size, self.stride)}"
            )
        self._mask, self._fill, self._adds = None, None, False
        self._visible = kind(self.model, self.name)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.num_features))
        nn.init.normal_(self.mask_token, std=0.02)
        stem = run.find_stem()
        if stem is None or self._leaks(stem.module, run.images):
            self._fill = "zero"

    def _place_token(self, run: Run, mask_fill: str, mask_stage: int | None) -> None:
        """Let the mask token follow the stem or a middle stage, and see which pixels to fill."""
        self._mask = None
        self._fill = mask_fill
        self._adds = mask_stage is not None
        if mask_fill == "token":
            self._fill = "mean" if self._adds else "zero"
        place = run.find_stem() if mask_fill == "token" else None
        if mask_stage is not None:
            place = _find_stage(run, mask_stage)
        if place is None:
            return
        self._place = place.grid
        if self.mask_patch_size % place.grid.stride:
            raise ValueError(
                f"mask_patch_size {self.mask_patch_size} is not a multiple of the "
                f"{place.grid.stride} pixels of a token of {self.name}: "
                f"use {multiples(self.mask_patch_size, place.grid.stride)}"
            )
        self.mask_token = nn.Parameter(torch.empty(1, 1, place.grid.channels))
        nn.init.normal_(self.mask_token, std=0.02)
        # A bound method and no closure: the deep copy of an encoder gets a hook of its own.
        place.module.register_forward_hook(self._put_token)
        if not self._adds and not self._leaks(place.module, run.images):
            self._fill = None

    def _put_token(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._mask is None or self.mask_token is None:
            return output
        tokens = output[0] if isinstance(output, tuple) else output
        hidden = self._place.spread(self._mask)
        token = self._place.align(self.mask_token).to(tokens.dtype)
        # A2MIM adds the token, SimMIM puts it in the place (no product: 0 x inf would be nan).
        masked = tokens + token * hidden if self._adds else torch.where(hidden, token, tokens)
        return (masked, *output[1:]) if isinstance(output, tuple) else masked

    @torch.no_grad()
    def _leaks(self, stem: nn.Module, images: Tensor) -> bool:
        """Whether hidden pixels reach the features past the mask token.

        NaN in hidden pixels spreads to all that they have a part in, whatever the weights.
        """
        if any(isinstance(module, _BatchNorm) for module in stem.modules()):
            return True  # while it trains, hidden tokens are in the statistics of the visible ones
        rows, columns = (torch.arange(n, device=images.device) for n in self.mask_grid)
        chessboard = ((rows[:, None] + columns) % 2 == 1)[None]
        fill, self._fill = self._fill, None
        hidden = upsample_mask(chessboard, self.img_size)
        features = self(images.masked_fill(hidden, nan), chessboard)
        self._fill = fill
        return bool(features.isnan().any())

    def _checkpoint(self, images: Tensor) -> None:
        """Recompute activations in the backward pass, if the mask token is not among them."""
        try:
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"{self.name} cannot recompute its activations: set grad_checkpointing to false"
            ) from error
        if self.mask_token is None or self._visible is not None:
            return
        everything = torch.ones(1, *self.mask_grid, dtype=torch.bool, device=images.device)
        features = self(images, everything).sum()
        try:
            (reached,) = torch.autograd.grad(features, self.mask_token, allow_unused=True)
        except CheckpointError:  # the stage ran again, when there was no mask any more
            reached = None
        if reached is None:  # or its blocks ran without it (ResNet)
            raise ValueError(
                f"{self.name} would recompute the stage that the mask token follows: "
                "set grad_checkpointing to false, or leave mask_stage out"
            )


def check_skip(
    encoder: Encoder,
    head: nn.Module,
    head_name: str,
    masking: str,
    mask_ratio: float | Sequence[float],
    hidden_count: int | None,
) -> None:
    """Refuse what does not go with skipping hidden tokens.

    Raises:
        ValueError: If the head sees one place alone, or masks hide different numbers of cells or
            all of them.
    """
    cells = encoder.mask_grid[0] * encoder.mask_grid[1]
    if is_pointwise(head, encoder):
        raise ValueError(
            f"head {head_name!r} looks at one place alone, where hidden_tokens 'skip' leaves the "
            "same mask token everywhere: use head transformer"
        )
    if masking == "foreground" or isinstance(mask_ratio, Sequence):
        raise ValueError(
            "hidden_tokens 'skip' needs masks that hide the same number of cells of every image, "
            f"not masking {masking!r} with mask_ratio {mask_ratio}: use random, block, square or "
            "token, and one ratio"
        )
    if hidden_count == cells:
        raise ValueError(
            f"mask_ratio {mask_ratio} hides all {cells} cells, and hidden_tokens 'skip' would "
            "leave the encoder nothing: use a lower one"
        )


@torch.no_grad()
def is_pointwise(head: nn.Module, encoder: Encoder) -> bool:
    """Whether a head predicts each place from its own feature alone.

    NaN in one feature spreads to all predictions that it has a part in, whatever the weights.
    """
    modes = [(module, module.training) for module in head.modules()]
    device = next((p.device for p in head.parameters()), torch.device("cpu"))
    features = torch.zeros(1, encoder.num_features, *encoder.grid_size, device=device)
    features[..., 0, 0] = nan
    prediction = head.eval()(features)[0].isnan().any(0)
    for module, training in modes:
        module.training = training
    rows, columns = (n // g for n, g in zip(prediction.shape, encoder.grid_size, strict=True))
    prediction[:rows, :columns] = False
    return not bool(prediction.any())


def _skipping_kind(model: nn.Module, name: str) -> type[VisibleTokens] | type[VisibleInWindows]:
    if isinstance(model, HIERARCHICAL):
        return VisibleInWindows
    if isinstance(model, PLAIN):
        return VisibleTokens
    raise ValueError(
        f"hidden_tokens 'skip' knows how to leave tokens out of timm's ViT, DeiT, BEiT, EVA, Swin "
        f"and SwinV2, not of {name}: use encode"
    )


def create_timm_model(
    name: str,
    size: tuple[int, int],
    in_chans: int,
    rates: dict[str, float],
    given: dict[str, Any],
    *,
    trust: bool = False,
) -> nn.Module:
    """Build a timm model without its classifier, for this size and with these rates if it can."""
    wished = {"img_size": size[0] if size[0] == size[1] else size, **_rate_options(rates)}
    fixed = {"in_chans": in_chans, "num_classes": 0}
    own = find_own_encoder(name, trust=trust)
    try:
        if own is not None:
            model = build_own(own, name, {**fixed, **wished}, given)
        else:
            _check_name(name)
            model = _build(name, fixed, wished, given)
    except (AssertionError, RuntimeError) as error:  # a size, or a tag of weights
        raise ValueError(
            f"encoder {name} cannot be built for images of {size[0]} x {size[1]} pixels with "
            f"options {given}: {str(error) or repr(error)}"
        ) from error
    if not hasattr(model, "forward_features"):
        raise ValueError(
            f"encoder {name} with options {given} has no forward_features: define "
            "forward_features(images) -> (B, D, h, w), or (B, h w, D)"
        )
    _check_rates(model, name, rates)
    return model


def _build(
    name: str, fixed: dict[str, Any], wished: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    """Call timm, withdrawing the wishes that the model does not know."""
    options = {**fixed, **wished, **given}
    while True:
        try:
            return timm.create_model(name, **options)
        except TypeError as error:
            # "unexpected keyword argument 'img_size'", "... argument(s): ['img_size', ...]", or
            # "multiple values for keyword argument 'depths'" where the name settles the depths.
            keys = re.findall(r"'(\w+)'", str(error).partition("keyword argument")[2])
            for key in given:
                if key in keys:
                    raise ValueError(f"encoder {name} does not take {key!r}: {error}") from error
            if not any(key in wished for key in keys):
                raise
            options = {key: value for key, value in options.items() if key not in keys}


def _rate_options(rates: dict[str, float]) -> dict[str, float]:
    """Our rates by timm's names. Many models drop paths by default: 0 is said, not left out."""
    dropout = {"proj_drop_rate": rates["drop_rate"], "pos_drop_rate": rates["drop_rate"]}
    return {"drop_path_rate": rates["drop_path_rate"], **(dropout if rates["drop_rate"] else {})}


def _check_name(name: str) -> None:
    if ":" in name or timm.is_model(name):  # "hf-hub:..." and "local-dir:..." are timm's to check
        return
    plain = name.partition(".")[0]
    near = timm.list_models(f"{plain}*")[:3] or get_close_matches(plain, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names all"
    raise ValueError(f"encoder {name!r} is not a model of timm: {hint}")


def _check_rates(model: nn.Module, name: str, rates: dict[str, float]) -> None:
    """Refuse a rate that no module of the model heeds."""
    dropout = rates["drop_rate"]
    heeded = {
        "drop_rate": any(isinstance(m, nn.Dropout) and m.p == dropout for m in model.modules()),
        "drop_path_rate": any(getattr(m, "drop_prob", 0) for m in model.modules()),
    }
    for rate, value in rates.items():
        if value and not heeded[rate]:
            raise ValueError(f"{rate} {value} would do nothing in the blocks of {name}: leave it 0")


def set_norm_eps(model: nn.Module, eps: float | None) -> None:
    """Set the epsilon of every LayerNorm, which timm has no option for."""
    for module in model.modules():
        if eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = eps


@contextmanager
def _observing(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients, in which NaN is no anomaly."""
    model.eval()
    with torch.enable_grad(), torch.autograd.set_detect_anomaly(False):
        yield
    model.train()


def _find_stage(run: Run, stage: int) -> Call:
    stages = run.find_stages()
    place = stages.get(2 ** (stage + 1))
    if place is None:
        legal = [str(number) for number in range(1, 5) if 2 ** (number + 1) in stages]
        remedy = f"use {', '.join(legal)}" if legal else "it is not hierarchical, leave it out"
        raise ValueError(f"mask_stage {stage} of {run.name} does not exist: {remedy}")
    return place


def _pair(img_size: int | Sequence[int]) -> tuple[int, int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size {list(sides)} is neither a number nor [height, width]")
    if min(sides) < 1:
        raise ValueError(f"img_size {img_size} must be at least 1 pixel: 224 is usual")
    return sides[0], sides[1]
