"""SimMIM: hide part of an image, encode the rest, predict what was hidden.

The whole method is `SimMIM.loss_of`; everything else here says which parts it is made of, how they
are optimised and what is logged. Paper: Xie et al., "SimMIM: a Simple Framework for Masked Image
Modeling", CVPR 2022, arXiv:2111.09886.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, Self, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric

from simmim.encoder import Encoder, check_skip
from simmim.head import HEADS
from simmim.loss import LOSSES, fourier_loss, masked_mean, take_hidden
from simmim.masking import (
    MASKINGS,
    average_distance,
    draw_masks,
    foreground_cells,
    ratio_range,
    sample_keys,
    upsample_mask,
)
from simmim.optim import init_official_, param_groups
from simmim.parts import build_part, find_part
from simmim.speed import suit_device
from simmim.strategies import WRAPPER, shard
from simmim.target import TARGETS
from simmim.training import (
    count_steps,
    imagenet_statistics,
    normalize,
    optimizer_and_schedule,
    optimizer_from,
    optimizer_spec,
    seed_step,
)
from simmim.weights import Report, load_weights
from simmim.weights.files import load_safely

COUNTED = ("random", "block", "square", "token")  # they hide equally many cells of every image
HEAD_ALONE = 0.05  # share of the steps in which a new head trains alone on loaded weights
VAL_SEED = 2111_09886  # the validation masks' own seed: equal in every epoch and every run


class SimMIM(L.LightningModule):
    """Masked image modelling: masking, encoder, prediction head, target and loss.

    The defaults are the published method on timm's plain ViT-B/16; the paper's exact models are
    the configs `vit_base_800ep` and `swin_*`.

    Args:
        encoder: Name of any timm image model.
        img_size: Height and width in pixels: one number, or [height, width].
        in_chans: Channels of the images.
        mask_patch_size: Side of a mask cell in pixels. 32, whatever the encoder's own patch (the
            paper's section 4.1).
        mask_ratio: Share of the cells that is hidden, or [low, high] to draw it for each image.
            0.6 (the paper's section 4.1).
        masking: Which cells are hidden: random (the paper's), block (BEiT's block-wise), square
            (one square at a random place), token (random, in cells of the encoder's own patch),
            foreground (never nodata), or the import path of your own function.
        masking_kwargs: Options of the masking; foreground takes nodata (the raw value that means
            "no data") or mask_channel (the channel that is 0 there).
        mask_fill: What stands in a hidden cell's place: token (a learned vector, the paper's),
            zero, mean (of the image's visible pixels, as in A2MIM) or noise (standard normal).
        mask_stage: Stage of a convolutional or hierarchical encoder after which a mask token is
            put (A2MIM, arXiv:2205.13943); by default the token goes where the stem ends.
        hidden_tokens: encode (the paper's: the encoder sees mask tokens), or skip: it sees visible
            tokens only, and the head, a light decoder, gets the mask tokens. A method of its own:
            MAE's for a ViT (arXiv:2111.06377: 3 x as fast or more, ViT-B 83.6 top-1 fine-tuned;
            SimMIM 83.8), GreenMIM's for Swin (arXiv:2205.13515: 2.7 x, Swin-B 83.8; SimMIM 84.0),
            and likewise for SwinV2.
        target: What is predicted: pixels (the paper's), normalized_pixels (SwinV2's sliding
            window), patch_normalized_pixels (MAE's), hog (MaskFeat's), features (of a frozen timm
            model), color_bins (classes), or the import path of your own class.
        target_kwargs: Options of the target: a size for a lower resolution, a window, a teacher.
        loss: l1 (the paper's), l2, smooth_l1, cosine, cross_entropy, or the import path of your
            own function of (prediction, target) that returns the error of each element.
        loss_region: Where the loss is taken: hidden cells (the paper's section 3.4), or all.
        fourier_weight: Weight of A2MIM's loss in the Fourier domain, added to the other. 0 is the
            paper's SimMIM.
        head: linear (the paper's), mlp, transformer (a light decoder), inverse (hierarchical), or
            the import path of your own class.
        head_kwargs: Options of the head, such as depth and width.
        encoder_kwargs: Further options of the timm model, such as {window_size: 6}.
        weights: Weights to go on from: a checkpoint of ours, a run's folder, an official SimMIM
            release (.pth), `timm:NAME`, or a Hugging Face folder.
        compat: "official" reproduces the released runs' parameter groups, learning rates and
            initialisation to the letter; "default" is what their authors meant.
        optimizer: Optimiser class and its options; its lr and weight decay are set from base_lr
            and weight_decay. AdamW with betas 0.9 and 0.999 (the paper's appendix).
        base_lr: Learning rate for a global batch of 512; it is scaled linearly with the batch.
            2e-4 (the paper's 100-epoch recipe).
        schedule: cosine, or multistep (the released 800-epoch recipe).
        warmup_epochs: Epochs of linear warm-up. 10 (the paper's).
        warmup_lr: Learning rate that the warm-up begins with, for a global batch of 512. 1e-6
            (the released configs).
        min_lr: Learning rate at the end of the cosine, for a global batch of 512. 1e-5 (the
            released configs).
        milestones: Epochs at which multistep multiplies the learning rate by 0.1. 700 (the
            released 800-epoch recipe).
        weight_decay: AdamW's weight decay; none on biases, norms, tokens and position tables.
            0.05 (the paper's appendix).
        drop_rate: Dropout inside the encoder's blocks. 0 (the paper's).
        drop_path_rate: Stochastic depth, growing linearly over the blocks. 0 for Swin, 0.1 for
            ViT in the paper.
        grad_checkpointing: Recompute activations in the backward pass: less memory, more time.
        compile: Compile encoder and head with torch.compile.
        seed: Seed of masks and dropout. On the command line it is `--seed_everything`.
        trust: Import parts that are named by an import path while a checkpoint is opened.
    """

    def __init__(
        self,
        encoder: str = "vit_base_patch16_224",
        img_size: int | list[int] = 224,
        in_chans: int = 3,
        mask_patch_size: int = 32,
        mask_ratio: float | list[float] = 0.6,
        masking: str = "random",
        masking_kwargs: dict[str, Any] | None = None,
        mask_fill: Literal["token", "zero", "mean", "noise"] = "token",
        mask_stage: int | None = None,
        hidden_tokens: Literal["encode", "skip"] = "encode",
        target: str = "pixels",
        target_kwargs: dict[str, Any] | None = None,
        loss: str = "l1",
        loss_region: Literal["hidden", "all"] = "hidden",
        fourier_weight: float = 0.0,
        head: str = "linear",
        head_kwargs: dict[str, Any] | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        weights: str | None = None,
        compat: Literal["default", "official"] = "default",
        optimizer: OptimizerCallable = AdamW,
        base_lr: float = 2e-4,
        schedule: Literal["cosine", "multistep"] = "cosine",
        warmup_epochs: float = 10,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
        milestones: list[int] | None = None,
        weight_decay: float = 0.05,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
        compile: bool = False,
        seed: int = 0,
        trust: bool = False,
    ) -> None:
        super().__init__()
        # `weights` is where this run began: a checkpoint of it must open without that file.
        self.save_hyperparameters(ignore=["optimizer", "weights", "trust"])
        ratio_range(mask_ratio)  # refuses what is no ratio
        self.masking = find_part(masking, MASKINGS, "masking", trust=trust)
        self.masking_kwargs = masking_kwargs or {}
        self.mask_ratio, self.loss_region, self.seed = mask_ratio, loss_region, seed
        self.error = find_part(loss, LOSSES, "loss", trust=trust)
        self.fourier_weight = fourier_weight
        self.optimizer, self.trust, self.compat = optimizer, trust, compat

        self.encoder = Encoder(
            encoder,
            img_size=img_size,
            in_chans=in_chans,
            mask_patch_size=None if masking == "token" else mask_patch_size,
            mask_fill=mask_fill,
            mask_stage=mask_stage,
            hidden_tokens=hidden_tokens,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            grad_checkpointing=grad_checkpointing,
            **(encoder_kwargs or {}),
        )
        mean, std = imagenet_statistics(in_chans)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.target = build_part(
            target,
            TARGETS,
            "target",
            in_chans=in_chans,
            img_size=self.encoder.img_size,
            mean=mean,
            std=std,
            options=target_kwargs,
            trust=trust,
        )
        self.head = build_part(
            head,
            HEADS,
            "head",
            self.encoder.num_features,
            self.target.out_chans,
            _upsample(self.encoder.stride, self.target.stride),
            options=head_kwargs,
            trust=trust,
        )
        self._check(target, loss)
        self._hidden_count = self._count_hidden()
        self._hidden_alone = self._may_see_hidden_alone()
        if hidden_tokens == "skip":
            check_skip(self.encoder, head, masking, mask_ratio, self._hidden_count, compile)
        self.val_loss = MeanMetric()
        if compat == "official":
            init_official_(self.encoder)
        self.report: Report | None = None  # what became of each tensor of the weights
        self._steps_head_alone = 0
        if weights is not None:
            load_weights(self, weights)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Open a checkpoint as Lightning does, but run no code in it, by path and by URL alike."""
        load = super().load_from_checkpoint
        return load_safely(load, checkpoint_path, *args, **kwargs)

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

    def normalize(self, raw: Tensor) -> Tensor:
        """Turn uint8, or float in 0..1, into what the encoder sees: zero mean, unit variance."""
        return normalize(raw, self.mean, self.std)

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
            ranks = self._trainer.world_size if self._trainer else 1
            first = (batch_idx * ranks + (self.global_rank if self._trainer else 0)) * len(raw)
            index = torch.arange(first, first + len(raw), device=raw.device)
        return raw, images, index

    # Lightning's steps -----------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: hide, encode, predict, compare."""
        raw, images, index = self.inputs(batch, batch_idx)
        mask, keys = self.draw_mask(raw, index, validation=False)
        loss, _ = self.loss_of(images, mask, keys, self._hidden_count)
        self.log("train/loss", loss, sync_dist=self.trainer.world_size > 1)
        self.log("lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
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

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let a new head come to terms with loaded weights before they move.

        At first its gradients are noise to an encoder that is trained already.
        """
        if self.report is not None and self.global_step < self._steps_head_alone:
            loaded = set(self.report.used.values())
            for name, parameter in self.named_parameters():
                if name.replace(WRAPPER, "") in loaded:
                    parameter.grad = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout and drop path from the step, so that a resumed run draws the same."""
        seed_step(self, self.seed, batch_idx)

    def _evaluate(self, part: str, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        raw, images, index = self.inputs(batch, batch_idx)
        mask, keys = self.draw_mask(raw, index, validation=True)
        loss, _, error = self._compare(images, mask, keys)
        # Weighted, so that the mean is over hidden cells, however they fall into batches.
        self.val_loss.update(loss, mask.sum() if self.loss_region == "hidden" else len(images))
        self.log(f"{part}/loss", self.val_loss, prog_bar=True)
        if batch_idx == 0:
            distance = average_distance(mask, self.encoder.mask_patch_size).nanmean()
            self.log(f"{part}/avg_dist", distance, sync_dist=self.trainer.world_size > 1)
        return {"index": index, "mask": mask, "error": error}

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

    # Set-up and optimisation -----------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the pixel statistics of the data that it is trained on, and get ready for speed."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and getattr(data, "mean", None) is not None:
            self.set_statistics(data.mean, data.std)  # type: ignore[union-attr]
        suit_device(self.encoder, self.trainer)
        if stage == "fit" and self.hparams["compile"]:
            self.encoder.compile()
            self.head.compile()

    def configure_model(self) -> None:
        """Share the weights out, where the strategy does."""
        shard(self)

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and standard deviation of each channel, for pixels in 0..1."""
        for module in (self, self.target):
            for name, values in (("mean", mean), ("std", std)):
                buffer = getattr(module, name, None)
                if isinstance(buffer, Tensor):
                    buffer.copy_(torch.tensor(values).view_as(buffer))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser, with lr scaled by the global batch, and its per-step schedule."""
        hp = self.hparams
        if self.report is not None and self.report.head_is_new:
            self._steps_head_alone = round(HEAD_ALONE * count_steps(self.trainer)[1])
        return optimizer_and_schedule(
            self,
            self.optimizer,
            param_groups(self, hp["weight_decay"], compat=self.compat),
            base_lr=hp["base_lr"],
            schedule=hp["schedule"],
            warmup_epochs=hp["warmup_epochs"],
            warmup_lr=hp["warmup_lr"],
            min_lr=hp["min_lr"],
            milestones=hp["milestones"] or [700],
            compat=self.compat,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the optimiser's name and options as plain values, so that the file opens safely."""
        optimizer = cast(Optimizer, self.optimizers(use_pl_optimizer=False))
        checkpoint["optimizer_spec"] = optimizer_spec(optimizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the optimiser that the checkpoint was made with."""
        if spec := checkpoint.get("optimizer_spec"):
            self.optimizer = optimizer_from(spec, trust=self.trust)

    # Small print -----------------------------------------------------------------------------

    def _mean_over_processes(self, count: Tensor) -> Tensor:
        """The number of hidden elements, averaged over processes.

        DDP averages gradients; numerators divided by the *mean* denominator make that average the
        gradient of the loss over all hidden elements, however unevenly they are spread.
        """
        if self._trainer is None or self.trainer.world_size == 1 or not self.trainer.training:
            return count
        return cast(Tensor, self.trainer.strategy.reduce(count, reduce_op="mean"))

    def _count_hidden(self) -> int | None:
        """Cells that every mask hides, where that is settled: one is drawn to see."""
        ratio: Any = self.hparams["mask_ratio"]
        if self.hparams["masking"] not in COUNTED or isinstance(ratio, Sequence):
            return None
        key = torch.zeros(1, dtype=torch.int64, device="cpu")
        return int(draw_masks(self.masking, key, self.encoder.mask_grid, ratio).sum())

    def _may_see_hidden_alone(self) -> bool:
        """Whether head and loss can do without the visible cells."""
        apart = getattr(self.head, "is_pointwise", False) and self.hparams["loss"] in LOSSES
        whole = self.loss_region == "all" or self.fourier_weight
        divides = self.encoder.mask_patch_size % self.encoder.stride == 0
        return bool(self._hidden_count and apart and divides and not whole)

    def _check(self, target: str, loss: str) -> None:
        losses = getattr(self.target, "losses", None)
        if losses and loss in LOSSES and loss not in losses:
            raise ValueError(
                f"loss {loss!r} does not go with target {target!r}: use {' or '.join(losses)}"
            )
        if self.fourier_weight and "cross_entropy" in (losses or ()):
            raise ValueError(
                f"fourier_weight goes with pictures, not with target {target!r}: use 0"
            )
        cell, stride = self.encoder.mask_patch_size, self.target.stride
        if cell % stride:
            raise ValueError(
                f"mask_patch_size {cell} is not a multiple of the {stride} px that one element of "
                f"target {target!r} covers: use {-(-cell // stride) * stride}"
            )


def _upsample(encoder_stride: int, target_stride: int) -> int | Fraction:
    """How many target elements there are along the side of one feature."""
    ratio = Fraction(encoder_stride, target_stride)
    return ratio.numerator if ratio.denominator == 1 else ratio
