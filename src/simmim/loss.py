"""How far a prediction is from its target, averaged over what was hidden.

A loss is two steps: an error for each element (`LOSSES`), and its mean over the hidden cells
(`masked_mean`). Both are computed in float32, whatever the prediction comes in.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from simmim.masking import upsample_mask

Error = Callable[..., Tensor]


def l1_loss(
    prediction: Float[Tensor, "b c H W"],
    target: Float[Tensor, "b c H W"],
    mask: Bool[Tensor, "b h w"] | None,
) -> Float[Tensor, ""]:
    """Mean absolute error over the hidden pixels and the channels (the paper's section 3.4).

    Args:
        prediction: Any floating type.
        target: Of the prediction's shape.
        mask: True = hidden, at the resolution of the cells or any finer; None: everything counts.

    Returns:
        A float32 scalar; 0, with a gradient, where nothing is hidden.
    """
    return masked_mean(l1_error(prediction, target), mask)


def mse_loss(
    prediction: Float[Tensor, "b c H W"],
    target: Float[Tensor, "b c H W"],
    mask: Bool[Tensor, "b h w"] | None,
) -> Float[Tensor, ""]:
    """Mean squared error over the hidden pixels and the channels; arguments as in `l1_loss`."""
    return masked_mean(l2_error(prediction, target), mask)


def smooth_l1_loss(
    prediction: Float[Tensor, "b c H W"],
    target: Float[Tensor, "b c H W"],
    mask: Bool[Tensor, "b h w"] | None,
) -> Float[Tensor, ""]:
    """Mean of e^2 / 2 below an error of 1 and e - 1/2 above; arguments as in `l1_loss`."""
    return masked_mean(smooth_l1_error(prediction, target), mask)


def cosine_loss(
    prediction: Float[Tensor, "b c H W"],
    target: Float[Tensor, "b c H W"],
    mask: Bool[Tensor, "b h w"] | None,
) -> Float[Tensor, ""]:
    """1 - cosine of the angle between the channel vectors; arguments as in `l1_loss`."""
    return masked_mean(cosine_error(prediction, target), mask)


def cross_entropy_loss(
    prediction: Float[Tensor, "b cn H W"],
    target: Int[Tensor, "b c H W"],
    mask: Bool[Tensor, "b h w"] | None,
) -> Float[Tensor, ""]:
    """Mean of `cross_entropy_error` over the hidden pixels and the channels."""
    return masked_mean(cross_entropy_error(prediction, target), mask)


def masked_mean(
    error: Float[Tensor, "b c H W"],
    mask: Bool[Tensor, "b h w"] | None,
    denominator: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Mean of the error over the hidden positions and the channels.

    The official loss divides by (hidden pixels + 1e-5) and then by the channels; the 1e-5, which
    only keeps it from dividing by zero, is a 1 here where the count is 0.

    Args:
        error: One for each element.
        mask: True = hidden; each cell covers a whole number of elements. None: everything counts.
        denominator: Maps this process's number of hidden elements to the mean number over all
            processes. With it, the mean of the processes' losses (which is what DDP makes of the
            gradients) is the mean over all hidden elements, however unequal the processes' shares.

    Returns:
        A float32 scalar; 0, with a gradient, where nothing is hidden.
    """
    error = error.float()
    if mask is None:
        mask = torch.ones_like(error[:, 0], dtype=torch.bool)
    hidden = upsample_mask(mask, (error.shape[2], error.shape[3]))
    count = (hidden.sum() * error.shape[1]).float()
    if denominator is not None:
        count = denominator(count)
    # A number that is not counted may be anything, NaN too: 0 x NaN would not be 0.
    return torch.where(hidden, error, 0).sum() / torch.where(count > 0, count, 1)


def take_hidden(
    maps: Num[Tensor, "b c H W"], mask: Bool[Tensor, "b h w"], count: int
) -> Num[Tensor, "b c H2 W2"]:
    """The hidden cells of a map, below each other in the order in which they lie in the image.

    Args:
        maps: Of images, features or targets; a cell covers a whole number of places.
        mask: True = hidden.
        count: Cells that are hidden in each image; it is not checked, as that would wait for the
            device.

    Returns:
        A map as wide as a cell, and as high as `count` of them.
    """
    height, width = mask.shape[1:]
    # The lowest first: a stable sort leaves the order alone and its shapes are static.
    place = (~mask).flatten(1).int().argsort(dim=1, stable=True)[:, :count]
    place = place + height * width * torch.arange(len(mask), device=mask.device)[:, None]
    cells = maps.unflatten(3, (width, -1)).unflatten(2, (height, -1))
    cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # b x cells, c, rows, columns
    hidden = cells.index_select(0, place.flatten()).unflatten(0, (len(mask), count))
    return hidden.transpose(1, 2).flatten(2, 3)


def l1_error(
    prediction: Float[Tensor, "b c H W"], target: Float[Tensor, "b c H W"]
) -> Float[Tensor, "b c H W"]:
    """Absolute difference of each element."""
    return _difference(prediction, target).abs()


def l2_error(
    prediction: Float[Tensor, "b c H W"], target: Float[Tensor, "b c H W"]
) -> Float[Tensor, "b c H W"]:
    """Squared difference of each element."""
    return _difference(prediction, target).square()


def smooth_l1_error(
    prediction: Float[Tensor, "b c H W"], target: Float[Tensor, "b c H W"]
) -> Float[Tensor, "b c H W"]:
    """Half the squared difference e of each element where e < 1, e - 1/2 elsewhere."""
    difference = _difference(prediction, target)
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")


def cosine_error(
    prediction: Float[Tensor, "b c H W"], target: Float[Tensor, "b c H W"]
) -> Float[Tensor, "b 1 H W"]:
    """1 - cosine of the angle between the channel vectors: 0 if alike, 2 if opposite."""
    _check_shapes(prediction, target)
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=1)[:, None]


def cross_entropy_error(
    prediction: Float[Tensor, "b cn H W"], target: Int[Tensor, "b c H W"]
) -> Float[Tensor, "b c H W"]:
    """Minus the log probability of the right class, for each channel of each pixel.

    Args:
        prediction: Logits: the n classes of channel 0, then those of channel 1, ...
        target: The right class of each element, from 0 to n - 1.
    """
    channels = target.shape[1]
    if prediction.shape[1] % channels or prediction.shape[2:] != target.shape[2:]:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} has no classes for each element of the "
            f"target {tuple(target.shape)}: its channels must be a multiple of {channels}"
        )
    logits = prediction.float().unflatten(1, (channels, -1)).transpose(1, 2)  # B, n, C, H, W
    return F.cross_entropy(logits, target.long(), reduction="none")


LOSSES: Mapping[str, Error] = {
    "l1": l1_error,
    "l2": l2_error,
    "smooth_l1": smooth_l1_error,
    "cosine": cosine_error,
    "cross_entropy": cross_entropy_error,
}


def fourier_loss(
    prediction: Float[Tensor, "b c H W"],
    target: Float[Tensor, "b c H W"],
    mask: Bool[Tensor, "b h w"] | None,
    visible_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """A2MIM's loss in the Fourier domain, to be added to another one (arXiv:2205.13943).

    As released (`MIMHead` with `fft_focal` and `fft_unmask_replace="mixed"` at
    https://github.com/Westlake-AI/openmixup): visible pixels become the mean of prediction and
    target, without a gradient; the spectra are averaged over the batch; and the squared distance of
    each frequency is weighted by how wrong it is, with focal frequency loss's logarithmic weights
    (Jiang et al., ICCV 2021), scaled to at most 1 and without a gradient. The transform is linear,
    so the average is taken first and one image is transformed. A2MIM adds it with a weight of 0.1
    for ViT and 0.5 for ResNet and Swin.

    Args:
        prediction: Any floating type.
        target: Of the prediction's shape.
        mask: True = hidden, at the resolution of the cells or any finer; None: everything counts.
        visible_weight: Share of a visible pixel's prediction that takes part (A2MIM's
            `fft_unmask_weight`: 0 for ViT and Swin, 0.001 for ResNet).

    Returns:
        A float32 scalar; 0, with a gradient, where nothing is hidden. It belongs to the batch as a
        whole: two processes' losses are not the loss of their common batch.
    """
    error = _difference(prediction, target)
    if mask is None:
        mask = torch.ones_like(error[:, 0], dtype=torch.bool)
    hidden = upsample_mask(mask, (error.shape[2], error.shape[3]))
    share = torch.where(hidden, 1.0, visible_weight)
    error = share * error + (1 - share) * error.detach() / 2
    spectrum = torch.view_as_real(torch.fft.fft2(error.mean(0), norm="ortho"))
    squared = spectrum.square().sum(-1)  # c, H, W
    weight = (squared.detach().sqrt() + 1).log()
    weight = weight / weight.amax().clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight * squared).mean() * mask.any()


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    _check_shapes(prediction, target)
    return prediction.float() - target.float()


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:  # it would be broadcast, silently
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
