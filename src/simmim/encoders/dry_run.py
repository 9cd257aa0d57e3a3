"""One run of a timm model, watched: where its grid of tokens is, and what its features depend on.

No name of a model or a module is known here. A run on noise tells which module's output is the
first grid of tokens over the image, in which layout, and which parameters the features never see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isqrt, lcm, nan
from typing import Any

import torch
from torch import Tensor, nn

from simmim.masking import upsample_mask


@dataclass(frozen=True)
class Grid:
    """How a tensor holds a grid of tokens, behind a few that are not of the grid (prefix)."""

    layout: str  # NCHW, NHWC or NLC
    size: tuple[int, int]  # height and width, in tokens
    channels: int
    stride: int  # pixels per token
    prefix: int = 0

    def to_nchw(self, tokens: Tensor) -> Tensor:
        """The grid's tokens, without the prefix, as (B, C, h, w)."""
        if self.layout == "NCHW":
            return tokens
        if self.layout == "NHWC":
            return tokens.permute(0, 3, 1, 2)
        grid = tokens[:, self.prefix :].transpose(1, 2)  # NLC -> NCL
        return grid.reshape(tokens.shape[0], self.channels, *self.size)

    def spread(self, mask: Tensor) -> Tensor:
        """A mask of cells as a mask of tokens in this layout, with one channel."""
        hidden = upsample_mask(mask, self.size)
        if self.layout == "NHWC":
            return hidden.permute(0, 2, 3, 1)
        return hidden.flatten(2).transpose(1, 2) if self.layout == "NLC" else hidden

    def align(self, token: Tensor) -> Tensor:
        """A token (1, 1, C) so that it broadcasts over this layout."""
        return token.view(1, -1, 1, 1) if self.layout == "NCHW" else token


@dataclass
class Call:
    """A module's call in a run."""

    module: nn.Module
    parent: "Call | None"  # the call inside which it happened
    output: Any = None
    grids: list[Grid] = field(default_factory=list)  # ways to read the output
    ended: int = 0  # calls that ended before it

    @property
    def grid(self) -> Grid:
        """How to read the output; `Run` leaves the likeliest in front."""
        return self.grids[0]


class Run:
    """A run of a model on one image of noise.

    Attributes:
        images: The noise, the same for each run of a size; the global random state is not touched.
        calls: The modules' calls, in the order in which they ended.
        features: What forward_features gave.
        grid: How to read the features.
    """

    def __init__(
        self, model: Any, name: str, in_chans: int, img_size: tuple[int, int], cell: int
    ) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.rand(1, in_chans, *img_size, generator=generator, device="cpu")
        self.images = (2 * noise - 1).to(next(model.parameters())).requires_grad_()
        self.model, self.name, self.img_size = model, name, img_size
        self.calls: list[Call] = []
        try:
            self.features = self._watch()
        except (AssertionError, RuntimeError, ValueError) as error:
            self._check_size(cell)
            made_for = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
            raise ValueError(
                f"encoder {name} does not take images of {(in_chans, *img_size)} (channels, height,"
                f" width): {str(error) or repr(error)}; it was made for {made_for}"
            ) from error
        self.grid = self._feature_grid(cell)
        for call in self.calls:  # (B, 96, 96, 96) can be read in two ways: as the features are
            call.grids.sort(key=lambda grid: grid.layout != self.grid.layout)

    def find_stem(self) -> Call | None:
        """The call of the first module whose output is a grid of tokens of the image.

        What ends first may be a part of the stem (Swin's patch embedding goes on with a LayerNorm):
        we climb to the outermost module around it that gives a grid as well, but not to one that
        holds most of the network (VGG's `features`). None where there is no such module, or where
        it is called again for something else.
        """
        image = id(self.images)
        stem = next((c for c in self.calls if c.grids and image in _leaves(c.output)), None)
        outer = stem.parent if stem else None
        while outer is not None:
            if outer.grids and outer.ended < 0.75 * len(self.calls):
                stem = outer
            outer = outer.parent
        if stem is None or sum(call.module is stem.module for call in self.calls) > 1:
            return None
        return stem

    def find_stages(self) -> dict[int, Call]:
        """The last call of each stage by its stride, where timm says which module that is."""
        modules = dict(self.model.named_modules())
        stages = {}
        for info in _feature_info(self.model):
            for call in self.calls:
                if call.module is modules.get(info["module"]):
                    stages[info["reduction"]] = call
        return {s: call for s, call in stages.items() if call.grids and call.grid.stride == s}

    def unreached(self) -> list[nn.Parameter]:
        """The trainable parameters on which the features do not depend.

        Where class tokens lie beside the grid, their attention is in its graph all the same: there,
        NaN sent back from the grid marks what it depends on, whatever the weights.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.grid.prefix:
            leaves = _leaves(self.features)
            return [parameter for parameter in parameters if id(parameter) not in leaves]
        features = self.grid.to_nchw(self.features)
        sent = torch.full_like(features, nan)
        back = torch.autograd.grad(features, parameters, sent, allow_unused=True)
        received = zip(parameters, back, strict=True)
        return [p for p, gradient in received if gradient is None or not gradient.isnan().any()]

    def _watch(self) -> Any:
        """Run the model, taking down each module's call and the grids that it may have given."""
        active: list[Call | None] = [None]

        def enter(module: nn.Module, args: Any) -> None:
            active.append(Call(module, active[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            call = active.pop()
            assert call is not None
            call.output = output[0] if isinstance(output, tuple) else output
            call.grids = [g for g in _grids(call.output, self.images) if g.stride > 1]
            call.ended = len(self.calls)
            self.calls.append(call)

        inner = [module for module in self.model.modules() if module is not self.model]
        hooks = [module.register_forward_pre_hook(enter) for module in inner]
        hooks += [module.register_forward_hook(leave) for module in inner]
        try:
            return self.model.forward_features(self.images)
        finally:
            for hook in hooks:
                hook.remove()

    def _feature_grid(self, cell: int) -> Grid:
        model, features, stride = self.model, self.features, self._declared_stride()
        if not isinstance(features, Tensor):
            raise ValueError(
                f"encoder {self.name} gives {len(features)} feature maps at once, not one"
            )
        if not features.isfinite().all():
            raise ValueError(f"encoder {self.name} gives nan or inf: its weights are not set")
        self._check_size(cell)
        prefixes = [model.num_prefix_tokens] if hasattr(model, "num_prefix_tokens") else range(9)
        grids = [grid for prefix in prefixes for grid in _grids(features, self.images, prefix)]
        grids = [grid for grid in grids if grid.stride <= (stride or grid.stride)]
        if not grids:
            raise ValueError(
                f"encoder {self.name} gives features of shape {list(features.shape[1:])}, which is "
                f"no grid that tiles images of {self.img_size[0]} x {self.img_size[1]} pixels"
            )
        channels = getattr(model, "num_features", None)
        return max(grids, key=lambda grid: grid.channels == channels)

    def _check_size(self, cell: int) -> None:
        """Refuse sizes that the features do not tile, naming the next that they do."""
        stride = self._declared_stride() or 1
        for side in self.img_size:
            if side % stride:
                raise ValueError(
                    f"img_size {side} is not a multiple of {stride} pixels, the stride of "
                    f"{self.name}: use {multiples(side, lcm(stride, cell))}"
                )

    def _declared_stride(self) -> int | None:
        """Pixels per feature by timm's own account."""
        info = _feature_info(self.model)
        return info[-1]["reduction"] if info else None


def multiples(value: int, step: int) -> str:
    """The multiples of a step beside a value, as they read in a sentence."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _grids(tokens: Any, images: Tensor, prefix: int = 0) -> list[Grid]:
    """The ways in which an output can be a grid of square patches that tile the images."""
    height, width = images.shape[2:]
    if not isinstance(tokens, Tensor) or tokens.shape[0] != images.shape[0]:
        return []
    if tokens.ndim == 4:
        _, a, b, c = tokens.shape
        readings = [("NCHW", b, c, a), ("NHWC", a, b, c)]
    elif tokens.ndim == 3 and tokens.shape[1] > prefix:
        length = tokens.shape[1] - prefix
        stride = max(isqrt(height * width // length), 1)
        h, w = height // stride, width // stride
        readings = [("NLC", h, w, tokens.shape[2])] if h * w == length else []
    else:
        readings = []
    return [
        Grid(layout, (h, w), channels, height // h, prefix)
        for layout, h, w, channels in readings
        if h and w and height % h == 0 and width % w == 0 and height // h == width // w
    ]


def _leaves(output: Tensor) -> set[int]:
    """The ids of the leaf tensors in an output's graph."""
    nodes, seen, leaves = [output.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves.add(id(node.variable))
        nodes += [earlier for earlier, _ in node.next_functions]
    return leaves


def _feature_info(model: Any) -> Sequence[dict[str, Any]]:
    return getattr(model, "feature_info", None) or []
