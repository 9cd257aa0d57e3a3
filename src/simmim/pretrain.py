"""SimMIM: hide part of an image, encode the rest, predict what was hidden.

The whole method is `SimMIM.loss_of`; everything else here says how it is called and looked at.
Paper: Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling", CVPR 2022,
arXiv:2111.09886. Which parts there are to choose from, and how they are optimised: recipe.py.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from simmim.loss import fourier_loss, masked_mean, take_hidden
from simmim.masking import (
    average_distance,
    draw_masks,
    foreground_cells,
    sample_keys,
    upsample_mask,
)
from simmim.recipe import Recipe
from simmim.weights.api import places_of
from simmim.weights.files import find_checkpoint, read_checkpoint
from simmim.weights.fit import HEAD, TOKEN, fit
from simmim.weights.official import official_weights
from simmim.weights.resize import Resize
from simmim.weights.sources import is_ours
from simmim.weights.state_dict import find_tensors, is_official, timm_state_dict

VAL_SEED = 2111_09886  # the validation masks' own seed: equal in every epoch and every run
TINY = 1e-30  # added to a weight: the mean loss of images that hide nothing is 0, and not 0 / 0


class SimMIM(Recipe):
    """Masked image modelling: masking, encoder, prediction head, target and loss.

    The defaults are the published method on timm's plain ViT-B/16; the paper's exact models are
    the configs `vit_base_800ep` and `swin_*`. `Recipe` has the options and makes the parts of
    them, each from the file of its name:

    - `masking` says which cells are hidden (`draw_mask` asks it);
    - `encoder` turns images and a mask into features of what is visible, (B, D, h, w);
    - `head` turns features into the prediction;
    - `target` turns images into what is to be predicted;
    - `error`, of loss.py, compares the two element by element.
    """

    # The method ------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        keys: Tensor | None = None,
        count: int | None = None,
    ) -> Tensor:
        """Predict the target from what is visible.

        Args:
            images: Normalised images, (B, C, H, W).
            mask: Cells, (B, H / mask_patch_size, W / mask_patch_size), True = hidden. Without a
                mask nothing is hidden.
            keys: One random key an image, (B,), which only `mask_fill="noise"` reads.
            count: Cells that every mask hides, where that is known. Only `hidden_tokens="skip"`
                asks for it; it reads the mask otherwise, and a GPU is waited for.

        Returns:
            The prediction, of the target's shape: (B, C, H, W) for pixels.
        """
        return cast(Tensor, self.head(self.encoder(images, mask, keys, count)))

    def loss_of(
        self, images: Tensor, mask: Tensor, keys: Tensor, count: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of normalised images under a mask, and the prediction.

        Args:
            images: Normalised images, (B, C, H, W).
            mask: Cells, (B, h, w), True = hidden.
            keys: As in `forward`.
            count: Cells that every mask hides, where that is known. Head and loss then see these
                alone if they can: the loss is the same, and a GPU moves less memory. None: the
                whole map.
        """
        loss, prediction, _ = self._compare(images, mask, keys, count)
        return loss, prediction

    def _compare(
        self, images: Tensor, mask: Tensor, keys: Tensor, count: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `loss_of`, and the error of each element that the loss is taken over."""
        region = mask if self.loss_region == "hidden" else None
        if count is None or not self._hidden_alone:
            prediction, target = self(images, mask, keys, count), self.target(images)
        else:
            features, region = self.encoder(images, mask, keys), None
            prediction = self.head(take_hidden(features, mask, count))
            target = take_hidden(self.target(images), mask, count)
        error = self.error(prediction, target)
        loss = masked_mean(error, region, denominator=self._mean_over_processes)
        if self.fourier_weight:
            loss = loss + self.fourier_weight * fourier_loss(prediction, target, mask)
        return loss, prediction, error

    def draw_mask(self, raw: Tensor, index: Tensor, *, validation: bool) -> tuple[Tensor, Tensor]:
        """Draw the mask of each sample from (seed, epoch, sample index) and nothing else.

        Args:
            raw: The images as the loader gave them, (B, C, H, W).
            index: The samples' places in the data set, int64, (B,).
            validation: Whether the mask depends on the index alone, as for validation.

        Returns:
            The mask, bool, (B, H / mask_patch_size, W / mask_patch_size), and the keys, (B,).
        """
        seed, epoch = (VAL_SEED, 0) if validation else (self.seed, self.current_epoch)
        keys = sample_keys(index, seed, epoch)
        grid = self.encoder.mask_grid
        valid = None
        kwargs = self.masking_kwargs
        if self.hparams["masking"] == "foreground":
            valid, kwargs = foreground_cells(raw, grid, **kwargs), {}
        return draw_masks(self.masking, keys, grid, self.mask_ratio, valid, **kwargs), keys

    # Lightning's steps -----------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: hide, encode, predict, compare."""
        raw, images, index = self.inputs(batch, batch_idx)
        mask, keys = self.draw_mask(raw, index, validation=False)
        loss, _ = self.loss_of(images, mask, keys, self.hidden_count)
        self.log("train/loss", loss, sync_dist=self.trainer.world_size > 1)
        self.log_lr()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The masked loss under fixed masks.

        Returns:
            For callbacks: the images' index, (B,), their mask, and the error, (B, C, h, w).
        """
        return self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`, of the test images."""
        return self._evaluate("test", batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Pictures of the reconstruction, as `reconstruct` gives them."""
        raw, images, index = self.inputs(batch, batch_idx)
        mask, keys = self.draw_mask(raw, index, validation=True)
        return self.reconstruct(images, mask, keys)

    def _evaluate(self, part: str, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        raw, images, index = self.inputs(batch, batch_idx)
        mask, keys = self.draw_mask(raw, index, validation=True)
        # The error is wanted of the whole map; skipping asks for the count all the same.
        count = self.hidden_count if self.hparams["hidden_tokens"] == "skip" else None
        loss, _, error = self._compare(images, mask, keys, count)
        # Weighted, so that the mean is over hidden cells, however they fall into batches.
        weight = mask.sum().float() if self.loss_region == "hidden" else len(images)
        self.val_loss.update(loss, weight + TINY)
        self.log(f"{part}/loss", self.val_loss, prog_bar=True)
        if batch_idx == 0:
            distance = average_distance(mask, self.encoder.mask_patch_size).nanmean()
            self.log(f"{part}/avg_dist", distance, sync_dist=True)
        return {"index": index, "mask": mask, "error": error}

    def inputs(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take a batch apart: a dict of ours, (images, labels), or images alone.

        Returns:
            The images as they came and normalised, (B, C, H, W), and the samples' index, (B,).
            Floats of a plain loader count as normalised already; where there is no index, the
            place in the epoch serves.
        """
        if isinstance(batch, Mapping):
            raw = batch["image"]
            images, index = self.normalize(raw), batch.get("index")
        else:
            raw = batch[0] if isinstance(batch, Sequence) else batch
            images, index = self.normalize(raw) if raw.dtype == torch.uint8 else raw, None
        if index is None:
            index = self._places(batch_idx, len(raw), raw.device)
        return raw, images, index

    def _places(self, batch_idx: int, size: int, device: torch.device) -> Tensor:
        """Places in the epoch of a batch without an index, as DistributedSampler deals them out."""
        ranks, rank, stage = 1, 0, None
        if self._trainer:
            ranks, rank, stage = self.trainer.world_size, self.global_rank, self.trainer.state.stage
        # The last batch may be shorter: it begins where whole ones end.
        whole = self._batch_sizes[stage] = max(size, self._batch_sizes.get(stage, 0))
        return (batch_idx * whole + torch.arange(size, device=device)) * ranks + rank

    def _mean_over_processes(self, count: Tensor) -> Tensor:
        """The number of hidden elements, averaged over processes.

        DDP averages gradients; numerators divided by the *mean* denominator make that average the
        gradient of the loss over all hidden elements, however unevenly they are spread.
        """
        if self._trainer is None or self.trainer.world_size == 1 or not self.trainer.training:
            return count
        return cast(Tensor, self.trainer.strategy.reduce(count, reduce_op="mean"))

    # Pictures --------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, mask: Tensor, keys: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Show what the model makes of a masked image.

        Args:
            images: Normalised images, (B, C, H, W).
            mask: Cells, (B, h, w), True = hidden.
            keys: As in `forward`.

        Returns:
            Pictures in 0..1, each (B, 1 or 3, H, W): original, masked, prediction, pasted (the
            prediction under the visible part), error; and target, where it is not the image.
        """
        prediction, target = self(images, mask, keys).float(), self.target(images)
        hidden = upsample_mask(mask, (images.shape[-2], images.shape[-1]))
        original = self._picture(images)
        shown = {"original": original, "masked": original.masked_fill(hidden, 0.5)}
        pixels = self.target.to_pixels(prediction, images)
        if pixels is None:
            truth, guess = self.target.picture(target), self.target.picture(prediction, target)
            shown["target"] = truth
        else:
            truth, guess = original, self._picture(pixels)
        shown["prediction"] = guess
        shown["pasted"] = torch.where(hidden, guess, truth)
        shown["error"] = (guess - truth).abs() * hidden
        return shown

    def _picture(self, images: Tensor) -> Tensor:
        """Normalised images -> what a person can look at: 1 or 3 channels in 0..1."""
        chans = 3 if images.shape[1] >= 3 else 1
        return (images * self.std + self.mean)[:, :chans].clamp(0, 1)


def load_official(
    source: str | Path | Mapping[str, Any],
    *,
    encoder: str | None = None,
    img_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    num_heads: int | Sequence[int] | None = None,
    window_size: int | None = None,
    mask_patch_size: int | None = None,
    target: str | None = None,
    resize: Resize = "official",
    **encoder_kwargs: Any,
) -> SimMIM:
    """Build the model of an official pretraining release, decoder included.

    The state dict of a timm model gives the encoder; the decoder begins anew.

    What the file says or its shapes imply need not be given; what is given wins. How the release
    was optimised (learning rates, drop path) is not taken over: pass drop_path_rate=0.1 to go on
    with the ViT as it was.

    Args:
        source: A .pth file, or a mapping: of official names to tensors, buffers included, or what
            such a file holds. Or the state dict of a timm model.
        encoder: Name of the timm model that a state dict is of; of a ViT num_heads will do.
        img_size: Size of the images in pixels.
        patch_size: Pixels per token of the stem.
        num_heads: Attention heads, of Swin a number for each stage. No shape tells those of a ViT
            without position-bias tables.
        window_size: Swin's window, in tokens.
        mask_patch_size: Side of a mask cell in pixels; 32 where the file does not say.
        target: What is predicted; pixels where the file does not say.
        resize: How positions change size, as the "official" code or as "timm" does it.
        encoder_kwargs: Further options of the encoder, or of SimMIM.

    Returns:
        The model; its attribute `report` says what became of each tensor.

    Raises:
        ValueError: If the file is no pretraining file, lacks a part, or asks for code to be run.
    """
    is_mapping = isinstance(source, Mapping)
    content = source if isinstance(source, Mapping) else read_checkpoint(find_checkpoint(source))
    if is_ours(content):
        raise ValueError(f"{source} is no official file, but a checkpoint of ours: use it as it is")
    file = "the mapping" if is_mapping else str(source)
    options = {
        name: encoder_kwargs.pop(name)
        for name in {*encoder_kwargs} & {*inspect.signature(SimMIM).parameters}
    }
    tensors = find_tensors(content, file)
    sizes: dict[str, Any] = {
        "img_size": img_size,
        "patch_size": patch_size,
        "num_heads": num_heads,
        "window_size": window_size,
    }
    if not is_official(content, tensors):
        given = {name: value for name, value in sizes.items() if value is not None}
        weights = timm_state_dict(tensors, file, encoder, {**encoder_kwargs, **given})
    elif encoder is None:
        weights = official_weights({**content, "model": tensors}, file, **sizes)
        if f"{HEAD}proj.weight" not in weights.tensors or TOKEN not in weights.tensors:
            raise ValueError(
                f"{file} is no pretraining file, it has no decoder or no mask token: use it as it "
                "is, --model.weights FILE, or open it with load_encoder"
            )
    else:
        raise ValueError(f"{file} is an official file, which tells its model: leave encoder out")
    task = weights.architecture.task
    if target is not None and target != task.get("target", "pixels"):
        task = {**task, "target": target, "target_kwargs": None}
    if mask_patch_size is not None:
        task = {**task, "mask_patch_size": mask_patch_size}
    model = SimMIM(
        encoder=weights.architecture.encoder,
        **{
            "img_size": img_size or weights.architecture.img_size,
            "in_chans": weights.architecture.in_chans,
            "encoder_kwargs": {**weights.architecture.options, **encoder_kwargs},
            **task,
            **options,
        },
    )
    report = fit(weights, places_of(model), model.encoder.model, resize)
    model.report = report
    return model
