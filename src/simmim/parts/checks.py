"""A user's own parts, used once on zeros, so that what does not fit is named before any data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simmim.head import HEADS
from simmim.loss import LOSSES
from simmim.masking import MASKINGS, draw_masks
from simmim.parts.names import check_call
from simmim.target import TARGETS, Target


def check_target(target: object, name: str) -> None:
    """Refuse a target that does not have what one must have.

    Raises:
        ValueError: If it is no `Target`.
    """
    if not isinstance(target, Target):
        raise ValueError(
            f"target {name!r} is no subclass of simmim.target.Target: derive it from that, which "
            "says what a target has"
        )


@torch.no_grad()
def try_own_parts(model: Any) -> None:
    """Use the parts of a `SimMIM` once, where one is not of our tables.

    Args:
        model: The model, built.

    Raises:
        ValueError: If a part does not take what it is given, or gives another shape.
    """
    names, encoder = model.hparams, model.encoder
    if names["masking"] not in MASKINGS:
        keys = torch.zeros(1, dtype=torch.int64, device="cpu")
        given, options = (keys, encoder.mask_grid, keys + 1), model.masking_kwargs
        check_call(model.masking, names["masking"], "masking", *given, options=options)
        draw_masks(model.masking, keys, encoder.mask_grid, model.mask_ratio, **options)
    if names["target"] in TARGETS and names["head"] in HEADS and names["loss"] in LOSSES:
        return
    with torch.random.fork_rng(devices=[]):
        target = model.target(torch.zeros(1, names["in_chans"], *encoder.img_size))
        size = [side // model.target.stride for side in encoder.img_size]
        check_shape(f"target {names['target']!r}", target, [None, *size])
        features = torch.zeros(1, encoder.num_features, *encoder.grid_size)
        prediction = model.head.eval()(features)
        model.head.train()
        check_shape(f"head {names['head']!r}", prediction, [model.target.out_chans, *size])
        if names["loss"] not in LOSSES:
            check_call(model.error, names["loss"], "loss", prediction, target)
        error = model.error(prediction, target)
        check_shape(f"loss {names['loss']!r}", error, [None, *size])


def check_shape(what: str, found: object, shape: Sequence[int | None]) -> None:
    """Refuse a batch of maps of another shape.

    Args:
        what: What gave it, as it should read in the error.
        found: What it gave.
        shape: Channels, height and width; None: any number.

    Raises:
        ValueError: With both shapes.
    """
    wanted = f"(B, {', '.join('C' if side is None else str(side) for side in shape)})"
    if not isinstance(found, Tensor):
        raise ValueError(f"{what} gives a {type(found).__name__}: return a tensor {wanted}")
    sides = found.shape[1:]
    if len(sides) != 3 or any(w not in (None, n) for w, n in zip(shape, sides, strict=True)):
        shown = "".join(f", {n}" for n in sides)
        raise ValueError(f"{what} gives (B{shown}): return {wanted}")
