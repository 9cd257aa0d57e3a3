"""Losses: by hand, against the official formula, in float32, right across processes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from simmim.loss import (
    LOSSES,
    cosine_loss,
    cross_entropy_loss,
    fourier_loss,
    l1_loss,
    masked_mean,
    mse_loss,
    smooth_l1_loss,
)
from simmim.masking import draw_masks, random_mask, sample_keys, upsample_mask
from simmim.testing import check_loss

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
OURS: list[Loss] = [l1_loss, mse_loss, smooth_l1_loss, cosine_loss, fourier_loss]


def draw(batch: int, cells: int, ratio: float | list[float] = 0.6) -> Tensor:
    return draw_masks(random_mask, sample_keys(torch.arange(batch), 0, 0), (cells, cells), ratio)


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """A prediction, its target and a mask of cells four pixels wide."""
    return torch.randn(6, 3, 24, 24), torch.randn(6, 3, 24, 24), draw(6, 6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    # Errors of 1 and 3 in one channel and of 0 and 0.5 in the other; a hidden cell is two pixels.
    [
        (l1_loss, (1 + 3 + 0 + 0.5) / 4),
        (mse_loss, (1 + 9 + 0 + 0.25) / 4),
        (smooth_l1_loss, (0.5 + 2.5 + 0 + 0.125) / 4),
    ],
)
def test_losses_by_hand(loss: Loss, expected: float) -> None:
    target = torch.zeros(1, 2, 1, 4)
    prediction = torch.tensor([[[[1.0, -3.0, 99.0, 99.0]], [[0.0, 0.5, 99.0, 99.0]]]])
    mask = torch.tensor([[[True, False]]])
    assert loss(prediction, target, mask).item() == pytest.approx(expected)


def test_cosine_loss_by_hand() -> None:
    target = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
    prediction = torch.tensor([[5.0, 0.0, 3.0, -2.0], [0.0, 2.0, 4.0, 0.0]]).view(1, 2, 1, 4)
    # Angles of 0, 90 degrees, arccos(3/5), 180 degrees.
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    assert cosine_loss(prediction, target, mask).item() == pytest.approx((0 + 1 + 0.4 + 2) / 4)
    assert cosine_loss(prediction, target, mask & (prediction[:, 0] > 3)).item() == 0


def test_cross_entropy_loss_by_hand() -> None:
    """Two channels of three classes: the classes of the first channel come first."""
    chances = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    prediction = chances.log().view(1, 6, 1, 1).expand(1, 6, 1, 2) + 7  # a constant does not matter
    target = torch.tensor([[0, 1], [2, 0]]).view(1, 2, 1, 2)
    mask = torch.tensor([[[True, False]]])
    loss = cross_entropy_loss(prediction, target, mask)
    assert loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = cross_entropy_loss(prediction.bfloat16(), target, mask)
    assert low.dtype == torch.float32
    assert low == cross_entropy_loss(prediction.bfloat16().float(), target, mask)


def test_l1_loss_is_the_official_one() -> None:
    """SimMIM's formula, with its mask of 4-px patches and its 1e-5."""
    images, prediction = torch.randn(2, 2, 3, 96, 96).unbind(0)
    mask = draw(2, 3)
    official = mask.long().repeat_interleave(8, 1).repeat_interleave(8, 2)  # of 4-px patches
    official = official.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).contiguous()
    difference = F.l1_loss(images, prediction, reduction="none")
    expected = (difference * official).sum() / (official.sum() + 1e-5) / 3
    torch.testing.assert_close(l1_loss(prediction, images, mask), expected, rtol=1e-6, atol=1e-7)


def test_a_mask_may_come_at_any_resolution(case: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, target, mask = case
    finer = [upsample_mask(mask, (n, n))[:, 0] for n in (6, 12, 24)]
    losses = [mse_loss(prediction, target, m) for m in finer]
    assert losses[0] == losses[1] == losses[2]
    hidden = finer[-1][:, None].expand_as(target)
    torch.testing.assert_close(losses[0], F.mse_loss(prediction[hidden], target[hidden]))


@pytest.mark.parametrize("loss", OURS)
def test_visible_pixels_count_for_nothing(loss: Loss, case: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, target, mask = case
    prediction.requires_grad_()
    loss(prediction, target, mask).backward()
    assert prediction.grad is not None
    hidden = upsample_mask(mask, (24, 24)).expand_as(prediction)
    assert prediction.grad[~hidden].eq(0).all()
    assert prediction.grad[hidden].ne(0).all()


@pytest.mark.parametrize("loss", [l1_loss, mse_loss, smooth_l1_loss, cosine_loss])
def test_without_a_mask_everything_counts(loss: Loss, case: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, target, mask = case
    whole = loss(prediction, target, None)
    torch.testing.assert_close(whole, loss(prediction, target, torch.ones_like(mask)))
    assert loss(target, target, None).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [*OURS, cross_entropy_loss])
def test_nothing_hidden_is_a_loss_of_zero_with_a_gradient_of_zero(loss: Loss) -> None:
    prediction = torch.randn(2, 6, 4, 4, requires_grad=True)
    target = torch.randn(2, 6, 4, 4)
    if loss is cross_entropy_loss:
        target = torch.randint(2, (2, 3, 4, 4))
    value = loss(prediction, target, torch.zeros(2, 2, 2, dtype=torch.bool))
    assert value.item() == 0
    value.backward()
    assert prediction.grad is not None
    assert prediction.grad.eq(0).all()


def test_nan_that_is_not_hidden_stays_out_of_the_loss(case: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, target, mask = case
    expected = l1_loss(prediction, target, mask)
    target = torch.where(upsample_mask(mask, (24, 24)), target, math.nan)
    assert l1_loss(prediction, target, mask) == expected


@pytest.mark.parametrize("loss", OURS)
def test_losses_are_in_float32(loss: Loss, case: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, target, mask = case
    for dtype in (torch.bfloat16, torch.float16):
        low = (prediction * 300).to(dtype)  # a square of 90,000 does not fit into float16
        expected = loss(low.float(), target, mask)
        assert expected.isfinite()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = loss(low, target, mask)
        assert ours.dtype == torch.float32
        assert ours == expected


def test_the_mean_is_right_where_processes_hide_different_numbers() -> None:
    """What DDP averages, from losses and gradients of each process, is that of the common batch."""
    prediction, target = torch.randn(8, 3, 16, 16, requires_grad=True), torch.randn(8, 3, 16, 16)
    mask = draw(8, 4, [0.1, 0.9])
    mask[:2] = False  # one of the processes has nothing at all
    parts = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    counts = torch.stack([mask[part].sum() * 4 * 4 * 3 for part in parts])
    seen = []

    def mean_count(count: Tensor) -> Tensor:
        seen.append(count.item())
        return counts.float().mean()

    error = LOSSES["l1"](prediction, target)
    apart = torch.stack([masked_mean(error[p], mask[p], mean_count) for p in parts]).mean()
    together = l1_loss(prediction, target, mask)
    assert seen == counts.tolist()
    torch.testing.assert_close(apart, together)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, prediction, retain_graph=True)[0] for loss in (apart, together))
    )


def released_fourier_loss(
    prediction: Tensor, images: Tensor, mask: Tensor, visible_weight: float
) -> Tensor:
    """A2MIM's as its released code words it, step by step."""
    mask = upsample_mask(mask, images.shape[2:]).float()
    mask = mask + (1 - mask) * visible_weight
    substitute = 0.5 * prediction.detach() + 0.5 * images
    mixed = prediction * mask + substitute * (1 - mask)
    spectra = [torch.fft.fft2(x, dim=(2, 3), norm="ortho") for x in (mixed, images)]
    ours, theirs = (torch.stack([x.real, x.imag], -1).mean(0, keepdim=True) for x in spectra)
    squared = (ours - theirs)[..., 0] ** 2 + (ours - theirs)[..., 1] ** 2
    weight = torch.log(torch.sqrt(squared) + 1.0)
    weight = (weight / weight.max()).clamp(0.0, 1.0).detach()
    return (weight * squared).mean()


@pytest.mark.parametrize("visible_weight", [0.0, 0.001])
def test_fourier_loss_is_the_released_one(
    visible_weight: float, case: tuple[Tensor, Tensor, Tensor]
) -> None:
    prediction, target, mask = case
    prediction.requires_grad_()
    ours = fourier_loss(prediction, target, mask, visible_weight)
    theirs = released_fourier_loss(prediction, target, mask, visible_weight)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, prediction)[0] for loss in (ours, theirs))
    )


def test_fourier_loss_by_hand() -> None:
    """A wave of one frequency has its energy in two coefficients, the only ones with a weight."""
    wave = torch.cos(2 * math.pi * torch.arange(8) / 8).expand(1, 1, 8, 8)
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    # Energy 64 / 2, half in each of 2 of the 64 coefficients, both with the largest weight, 1.
    ours = fourier_loss(wave, torch.zeros_like(wave), mask)
    assert ours.item() == pytest.approx(32 / 64, rel=1e-4)


def test_a_perfect_prediction_has_a_fourier_loss_of_zero(
    case: tuple[Tensor, Tensor, Tensor],
) -> None:
    target = case[1].requires_grad_()
    loss = fourier_loss(target, target.detach(), case[2])
    loss.backward()
    assert loss.item() == 0
    assert target.grad is not None
    assert target.grad.eq(0).all()


def test_shapes_that_would_be_broadcast_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)
    for loss in OURS:
        with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and target \(2, 1, 4, 4\) differ"):
            loss(torch.rand(2, 3, 4, 4), torch.rand(2, 1, 4, 4), None)
    with pytest.raises(ValueError, match="channels must be a multiple of 3"):
        cross_entropy_loss(torch.rand(2, 7, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.long), None)


@pytest.mark.parametrize("name", ["l1", "l2", "smooth_l1", "cosine"])
def test_errors_of_the_table_are_their_losses_before_the_mean(
    name: str, case: tuple[Tensor, Tensor, Tensor]
) -> None:
    check_loss(LOSSES[name])
    prediction, target, mask = case
    loss = {"l1": l1_loss, "l2": mse_loss, "smooth_l1": smooth_l1_loss, "cosine": cosine_loss}[name]
    error = LOSSES[name](prediction.half(), target)
    assert error.dtype == torch.float32
    torch.testing.assert_close(masked_mean(error, mask), loss(prediction.half(), target, mask))
