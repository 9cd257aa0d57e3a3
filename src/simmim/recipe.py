"""The options of SimMIM: which parts it is made of, and how these are optimised.

The method itself is in pretrain.py.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric

from simmim.encoder import Encoder, check_skip
from simmim.head import HEADS
from simmim.loss import LOSSES
from simmim.masking import MASKINGS, draw_masks, ratio_range
from simmim.optim import init_official_, param_groups
from simmim.parts.checks import check_target, try_own_parts
from simmim.parts.names import build_part, find_part
from simmim.target import TARGETS
from simmim.training.base import Trainable, count_steps, imagenet_statistics, optimizer_and_schedule
from simmim.training.kernels import suit_device
from simmim.weights import Report, load_weights
from simmim.weights.backbone import statistics_of

COUNTED = ("random", "block", "square", "token")  # they hide equally many cells of every image
HEAD_ALONE = 0.05  # share of the steps in which a new head trains alone on loaded weights


class Recipe(Trainable):
    """Masking, encoder, head, target and loss by their options, and how these are optimised.

    Your own part is named by its import path, or as `simmim.register` has named it.

    Args:
        encoder: Name of any timm image model, or your own class with forward_features.
        img_size: Height and width in pixels: one number, or [height, width].
        in_chans: Channels of the images.
        mask_patch_size: Side of a mask cell in pixels. 32, whatever the encoder's own patch (the
            paper's section 4.1).
        mask_ratio: Share of the cells that is hidden, or [low, high] to draw it for each image.
            0.6 (the paper's section 4.1).
        masking: Which cells are hidden: random (the paper's), block (BEiT's block-wise), square
            (one square at a random place), token (random, in cells of the encoder's own patch),
            foreground (never nodata), or your own function of (keys, grid, counts).
        masking_kwargs: Options of the masking; foreground takes nodata (the value of a pixel
            without data as a batch has it: 0 to 255, of deeper scans 0 to 1; by default 0) or
            mask_channel (the channel that is 0 there).
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
            model), color_bins (classes), or your own subclass of simmim.target.Target.
        target_kwargs: Options of the target: a size for a lower resolution, a window, a teacher.
        loss: l1 (the paper's), l2, smooth_l1, cosine, cross_entropy, or your own function of
            (prediction, target) that returns the error of each element.
        loss_region: Where the loss is taken: hidden cells (the paper's section 3.4), or all.
        fourier_weight: Weight of A2MIM's loss in the Fourier domain, added to the other. 0 is the
            paper's SimMIM.
        head: linear (the paper's), mlp, transformer (a light decoder), inverse (hierarchical), or
            your own class of (in_features, out_chans, upsample).
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
        compile: Compile encoder and head with torch.compile. On a TPU it changes nothing: there
            the step is compiled as a whole.
        seed: Seed of masks and dropout. On the command line it is `--seed_everything`.
        trust: Import parts that are named by an import path, which runs their code.
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
            trust=trust,
            **(encoder_kwargs or {}),
        )
        mean, std = imagenet_statistics(in_chans)
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
        check_target(self.target, target)
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
        try_own_parts(self)
        self.hidden_count = self._count_hidden()
        self._hidden_alone = self._may_see_hidden_alone()
        if hidden_tokens == "skip":
            check_skip(self.encoder, self.head, head, masking, mask_ratio, self.hidden_count)
        self.val_loss = MeanMetric()
        self._batch_sizes: dict[
            Any, int
        ] = {}  # of a stage's whole batches, where none has an index
        if compat == "official":
            init_official_(self.encoder)
        self.report: Report | None = None  # what became of each tensor of the weights
        self._loaded: set[str] = set()  # parameters that wait for a new head on top of them
        self._steps_head_alone = 0
        if weights is not None:
            report = load_weights(self, weights, trust=trust)
            if report.head_is_new:
                names = (name for name, _ in self.encoder.named_parameters("encoder"))
                self._loaded = {name for name in names if name not in report.missing}
            if (statistics := statistics_of(weights, in_chans)) is not None:
                self.set_statistics(*statistics)  # until data to train on have others

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
        whole = whole or self.hparams["hidden_tokens"] == "skip"
        divides = self.encoder.mask_patch_size % self.encoder.stride == 0
        return bool(self.hidden_count and apart and divides and not whole)

    # Set-up and optimisation -----------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the pixel statistics of the data that it is trained on, and get ready for speed."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.loss_region == "hidden" and not ratio_range(self.mask_ratio)[1]:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} hides nothing, and the loss is that of what is "
                "hidden: use 0.6 (the paper's)"
            )
        if stage == "fit" and getattr(data, "mean", None) is not None:
            self.set_statistics(data.mean, data.std)  # type: ignore[union-attr]
        suit_device(self, self.trainer)
        on_xla = self.trainer.strategy.root_device.type == "xla"  # which compiles whole steps
        if stage == "fit" and self.hparams["compile"] and not on_xla:
            self.encoder.compile()
            self.head.compile()

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and standard deviation of each channel, for pixels in 0..1."""
        super().set_statistics(mean, std)
        for name, values in (("mean", mean), ("std", std)):
            buffer = getattr(self.target, name, None)
            if isinstance(buffer, Tensor):
                buffer.copy_(torch.tensor(values).view_as(buffer))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser, with lr scaled by the global batch, and its per-step schedule."""
        hp = self.hparams
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

    # A new head on loaded weights ------------------------------------------------------------

    def on_train_start(self) -> None:
        """Say for how many steps a new head trains alone."""
        if self._loaded:
            self._steps_head_alone = round(HEAD_ALONE * count_steps(self.trainer)[1])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let a new head come to terms with loaded weights before they move.

        At first its gradients are noise to an encoder that is trained already.
        """
        if self.global_step >= self._steps_head_alone:
            self._loaded = set()
            return
        for name, parameter in self.named_parameters():
            if name in self._loaded:
                parameter.grad = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what waits for the head: a run that goes on does not load the weights again."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["loaded"] = sorted(self._loaded)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the optimiser, and with the head alone, where the run did so."""
        super().on_load_checkpoint(checkpoint)
        self._loaded = set(checkpoint.get("loaded", ()))


def _upsample(encoder_stride: int, target_stride: int) -> int | Fraction:
    """How many target elements there are along the side of one feature."""
    ratio = Fraction(encoder_stride, target_stride)
    return ratio.numerator if ratio.denominator == 1 else ratio
