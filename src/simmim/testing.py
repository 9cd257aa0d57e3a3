"""What a masking, target, head, loss or encoder must hold to: simmim's own are tested by it too.

Each check makes its own small inputs, and raises an AssertionError that says what is wrong. Use
them in a test of yours:

    from simmim.testing import check_masking

    def test_checker():
        check_masking(checker, tolerance=0.2)
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from simmim.encoder import Encoder
from simmim.loss import LOSSES, masked_mean
from simmim.masking import draw_masks, mask_count, sample_keys, upsample_mask
from simmim.parts.checks import check_shape
from simmim.target import Target

GRIDS = ((6, 6), (7, 7), (4, 9), (14, 14))  # cells, of Swin and ViT as published, and oblong
RATIOS = (0.0, 0.25, 0.6, 0.9)


def check_masking(
    masking: Callable[..., Tensor], *, tolerance: float = 0.0, **options: Any
) -> None:
    """Check a masking: shape, type, the number of hidden cells, and that the key alone decides.

    Args:
        masking: (keys, grid, counts) -> bool (B, h, w), True = hidden.
        tolerance: How far the number of hidden cells may be from what is asked, as a share of all
            cells. 0: every sample hides exactly `counts` cells.
        options: As `masking_kwargs`.

    Raises:
        AssertionError: If it does not hold to one of these.
    """
    keys = sample_keys(torch.arange(48), seed=3, epoch=5)
    for grid in GRIDS:
        cells = grid[0] * grid[1]
        for ratio in RATIOS:
            where = f"on {grid[0]} x {grid[1]} cells at ratio {ratio}"
            state = torch.get_rng_state()
            mask = draw_masks(masking, keys, grid, ratio, **options)
            _require(
                torch.equal(torch.get_rng_state(), state),
                "the masking draws from torch's global generator: draw from the keys alone, with "
                "simmim.masking.hash_integers",
            )
            wanted = mask_count(cells, ratio)
            off = (mask.flatten(1).sum(1) - wanted).abs().max().item()
            _require(
                off <= tolerance * cells,
                f"the masking hides up to {off} cells more or less than the {wanted} asked for "
                f"{where}: hide exactly `counts`, or allow a tolerance",
            )
            order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
            parts = [draw_masks(masking, k, grid, ratio, **options) for k in keys[order].split(7)]
            _require(
                torch.equal(torch.cat(parts), mask[order]),
                f"a sample's mask is another one in another batch {where}: let its key alone "
                "decide, not its place or its neighbours",
            )


def check_target(
    target: type[Target] | Callable[..., Target], *, in_chans: int = 3, **options: Any
) -> None:
    """Check a target: its shape, that it is float32 and the same each time, and trains nothing.

    Args:
        target: A subclass of `Target`.
        in_chans: Channels of the images that it is tried on.
        options: As `target_kwargs`.

    Raises:
        AssertionError: If it does not hold to one of these.
    """
    size, mean, std = (32, 48), [0.5] * in_chans, [0.25] * in_chans
    made = target(in_chans=in_chans, img_size=size, mean=mean, std=std, **options)
    _require(isinstance(made, Target), "a target must be a subclass of simmim.target.Target")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, in_chans, *size, generator=generator)
    grid = [side // made.stride for side in size]
    with torch.no_grad():
        element, again = made(images), made(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = made(images)
    _shape("the target", element, [None, *grid])
    _require(
        {element.dtype, under_autocast.dtype} in ({torch.float32}, {torch.int64}),
        f"the target is {element.dtype}, under autocast {under_autocast.dtype}: give float32, or "
        "int64 for classes",
    )
    _require(
        torch.equal(again, element),
        "the target is another one the second time: compute it without chance",
    )
    apart = torch.cat([made(one[None]) for one in images])
    _require(
        torch.allclose(apart, element, atol=1e-4, rtol=1e-4),
        "the target of an image depends on the others in its batch",
    )
    _require(
        not any(p.requires_grad for p in made.parameters()) and not made(images).requires_grad,
        "a target must not be trained: freeze its parameters and compute without gradients",
    )
    prediction = torch.randn(2, made.out_chans, *grid, generator=generator)
    for name in made.losses:
        try:
            error = LOSSES[name](prediction, element) if name in LOSSES else None
        except (ValueError, RuntimeError) as problem:
            raise AssertionError(
                f"loss {name} does not take the target and a prediction of out_chans "
                f"{made.out_chans}: {problem}"
            ) from problem
        _require(error is None or bool(error.isfinite().all()), f"loss {name} is not finite")
    shown = made.to_pixels(prediction, images)
    if shown is None:
        picture = made.picture(prediction, element)
        _shape("picture()", picture, [3, *size])
        _require(bool(picture.min() >= 0 and picture.max() <= 1), "picture() must lie in 0..1")
    else:
        _shape("to_pixels()", shown, [in_chans, *size])


def check_head(
    head: Callable[..., nn.Module], *, upsample: int | Fraction = 4, **options: Any
) -> None:
    """Check a head: its shape, that images do not mix, and that every parameter learns.

    Args:
        head: A class of (in_features, out_chans, upsample).
        upsample: Target elements along the side of one feature.
        options: As `head_kwargs`.

    Raises:
        AssertionError: If it does not hold to one of these.
    """
    made = head(24, 5, upsample, **options)
    features = torch.randn(3, 24, 4, 6, generator=torch.Generator().manual_seed(0))
    features.requires_grad_()
    prediction = made(features)
    size = [int(side * upsample) for side in (4, 6)]
    _shape("the head", prediction, [5, *size])
    prediction.square().mean().backward()
    for name, parameter in made.named_parameters():
        learns = parameter.grad is not None and parameter.grad.abs().sum() > 0
        if parameter.requires_grad:
            _require(bool(learns), f"no gradient reaches {name} of the head: DDP would stop at it")
    grad = features.grad
    reached = grad is not None and bool(grad.abs().sum(1).ne(0).all())
    _require(reached, "some features have no part in what the head predicts")
    made.eval()
    with torch.no_grad():
        together, apart = made(features), torch.cat([made(one[None]) for one in features])
        _require(
            torch.allclose(together, apart, atol=1e-5, rtol=1e-4),
            "what the head predicts of an image depends on the others in its batch",
        )
        if getattr(made, "is_pointwise", False):
            _check_pointwise(made, features, int(upsample))


def _check_pointwise(head: nn.Module, features: Tensor, upsample: int) -> None:
    """That a feature predicts its own elements alone, as the head says and the loss relies on."""
    moved = features.clone()
    moved[:, :, 1, 3] += 1
    changed = (head(moved) - head(features)).abs().amax((0, 1)) > 1e-6
    own = torch.zeros_like(changed)
    own[upsample : 2 * upsample, 3 * upsample : 4 * upsample] = True
    _require(
        not (changed & ~own).any(),
        "the head says is_pointwise, but a feature changes what is predicted beside it: set "
        "is_pointwise to False",
    )


def check_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Check a loss: an error for each element, float32, and nothing of what is visible.

    Args:
        loss: (prediction, target) -> error, (B, C, H, W), with C or 1 channels.

    Raises:
        AssertionError: If it does not hold to one of these.
    """
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, 3, 8, 12, generator=generator) for _ in range(2))
    prediction.requires_grad_()
    error = loss(prediction, target)
    _shape("the loss", error, [None, 8, 12])
    mask = torch.rand(2, 2, 3, generator=generator) < 0.5
    mask[:, 0, 0], mask[:, 1, 2] = True, False
    masked_mean(error, mask).backward()
    hidden = upsample_mask(mask, (8, 12)).expand_as(prediction)
    assert prediction.grad is not None
    _require(
        not prediction.grad[~hidden].any(),
        "the error of an element depends on other places: what is visible would be learned from",
    )
    _require(bool(prediction.grad[hidden].any()), "no gradient reaches the prediction")
    half = loss(prediction.detach().bfloat16(), target)
    _require(half.dtype == torch.float32, f"the loss of bfloat16 is {half.dtype}: use .float()")


def check_encoder(
    name: str, *, img_size: int = 64, mask_patch_size: int = 32, **options: Any
) -> None:
    """Check an encoder: its features, and that no hidden pixel has any part in them.

    Args:
        name: A timm model, one that is registered, or the import path of a class.
        img_size: Height and width of the images that it is tried on.
        mask_patch_size: Side of a cell in pixels.
        options: As `encoder_kwargs`.

    Raises:
        AssertionError: If a hidden pixel has a part in the features.
        ValueError: If the encoder cannot be used at all.
    """
    encoder = Encoder(name, img_size, mask_patch_size=mask_patch_size, trust=True, **options).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, img_size, img_size, generator=generator)
    mask = torch.rand(2, *encoder.mask_grid, generator=generator) < 0.5
    mask[:, 0, 0], mask[:, -1, -1] = True, False
    features = encoder(images, mask)
    _shape("the encoder", features, [encoder.num_features, *encoder.grid_size])
    other = torch.where(upsample_mask(mask, encoder.img_size), images.flip(0) + 9, images)
    _require(
        torch.equal(encoder(other, mask), features),
        f"hidden pixels have a part in the features of {name}",
    )
    encoder.train()(images, mask).square().mean().backward()
    for key, parameter in encoder.named_parameters():
        reached = parameter.grad is not None
        _require(reached or not parameter.requires_grad, f"no gradient reaches {key} of {name}")


def _shape(what: str, found: object, shape: list[int | None]) -> None:
    try:
        check_shape(what, found, shape)
    except ValueError as error:
        raise AssertionError(str(error)) from error


def _require(holds: bool, sentence: str) -> None:
    """Assert, also where Python was told to leave assertions out."""
    if not holds:
        raise AssertionError(sentence)
