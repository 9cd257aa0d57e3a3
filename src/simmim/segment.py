"""What an encoder is worth where every pixel has a class: semantic segmentation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from simmim.decoders.sliding_window import count_windows, slide
from simmim.decoders.upernet import AuxiliaryHead, Plain, UPerNet, enlarge
from simmim.training.fine_tuning import Downstream, check_training
from simmim.training.strategies import is_sharding
from simmim.weights.backbone import open_backbone, our_checkpoint

VOID = -1  # a pixel without a class
USUAL_VOID = 255  # in masks that others have read
Images = Tensor | list[Tensor]  # (B, C, H, W), or of several sizes each (C, H, W)


class Segmenter(Downstream):
    """Semantic segmentation on an encoder: a class for each pixel.

    Trained on crops; images of any size are read by a window that slides over them. `val/miou` is
    counted over all pixels of the part, and is the mean over the classes that occur in its masks or
    are predicted (mmsegmentation's rule); `val/iou/NAME` is each class's.

    Args:
        weights: Weights of the encoder: a run's folder or checkpoint of ours, an official SimMIM
            or Swin release (.pth), `timm:NAME`, or a Hugging Face or timm folder. Those of a
            segmenter with the same head bring that along. None: from scratch.
        encoder: Name of a timm model; by default that of the weights, or vit_base_patch16_224.
        img_size: Height and width in pixels of training crops and of the sliding window, one
            number or [height, width]; by default those of the weights, or 224. Positions are
            resized as the official code does it.
        in_chans: Channels of the images; by default those of the weights, or 3.
        num_classes: Number of classes; by default the data's.
        head: upernet (on a feature pyramid; a plain transformer is read in each quarter of its
            depth), or linear: a BatchNorm and one linear classifier on the encoder's last map.
        frozen: Leave the encoder as it is.
        layer: Block (of hierarchical models: stage) that the linear head reads, counted from 1.
            None: the last, behind the encoder's final norm.
        decoder_channels: Channels of UPerNet's decoder. 512 for Swin, 768 for ViT-B (the published
            settings).
        aux_weight: Weight of the loss of UPerNet's auxiliary head, on the last map but one; 0 =
            none. 0.4 (mmsegmentation's).
        dropout: Share of the channels that is dropped before the classifier. 0.1 (likewise).
        dice: Weight of a Dice loss beside the cross-entropy; 0 = none. It helps rare classes.
        class_weights: Weight of each class in the training loss: balanced (by its pixels in the
            training part), or a list. None: all alike.
        stride: Pixels from window to window in evaluation, one number or [down, across]; by
            default two thirds of the window (mmsegmentation's 341 of 512).
        ema_decay: Decay of a moving average of the weights, which is what is validated and kept;
            None = none.
        encoder_kwargs: Options of the timm model that differ from those in the weights.
        drop_path_rate: Stochastic depth, growing linearly over the blocks. 0.1 for ViT-B, 0.3 for
            Swin-B (the published settings).
        layer_decay: Factor by which the learning rate falls from each block to the one below; None
            = none. 0.65 (MAE's ViT-B).
        optimizer: Optimiser class and its options; its lr and weight decay are set from base_lr
            and weight_decay.
        base_lr: Learning rate for a global batch of 512; it is scaled linearly with the batch.
            3.2e-3 is the 1e-4 for batches of 16 that MAE's ViT-B takes.
        schedule: cosine, or multistep.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate that the warm-up begins with, for a global batch of 512.
        min_lr: Learning rate at the end of the cosine, for a global batch of 512.
        milestones: Epochs at which multistep multiplies the learning rate by 0.1.
        weight_decay: AdamW's weight decay; none on biases, norms, tokens and position tables.
        grad_checkpointing: Recompute activations in the backward pass: less memory, more time.
        seed: Seed of dropout. On the command line it is `--seed_everything`.
        trust: Import an encoder that the weights, or an optimiser that a checkpoint, name by an
            import path, which runs their code.
    """

    UNTRAINED = "this model is not trained to segment yet, its answers"
    NAME, NAMED_BY = "this model", "class names"
    REMEDY = "give the same ones, by data.classes"

    def __init__(
        self,
        weights: str | None = None,
        encoder: str | None = None,
        img_size: int | list[int] | None = None,
        in_chans: int | None = None,
        num_classes: int | None = None,
        head: Literal["upernet", "linear"] = "upernet",
        frozen: bool = False,
        layer: int | None = None,
        decoder_channels: int = 512,
        aux_weight: float = 0.4,
        dropout: float = 0.1,
        dice: float = 0.0,
        class_weights: Literal["balanced"] | list[float] | None = None,
        stride: int | list[int] | None = None,
        ema_decay: float | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        drop_path_rate: float = 0.0,
        layer_decay: float | None = None,
        optimizer: OptimizerCallable = AdamW,
        base_lr: float = 3.2e-3,
        schedule: Literal["cosine", "multistep"] = "cosine",
        warmup_epochs: float = 5,
        warmup_lr: float = 3.2e-5,
        min_lr: float = 0.0,
        milestones: list[int] | None = None,
        weight_decay: float = 0.05,
        grad_checkpointing: bool = False,
        seed: int = 0,
        trust: bool = False,
    ) -> None:
        super().__init__()
        # `weights` is where this run began: a checkpoint of it must open without that file.
        self.save_hyperparameters(ignore=["optimizer", "weights", "trust"])
        _check(self.hparams)
        self.frozen, self.seed = frozen, seed
        self.optimizer, self.trust = optimizer, trust

        backbone = open_backbone(
            weights,
            encoder,
            img_size,
            in_chans,
            encoder_kwargs,
            drop_path_rate=0.0 if frozen else drop_path_rate,
            trust=trust,
        )
        self.take_encoder(backbone)
        if grad_checkpointing:
            backbone.model.set_grad_checkpointing(True)
        self.window = _pair(backbone.img_size)
        self.stride = _stride(stride, self.window)
        described = (backbone.model, backbone.encoder, backbone.in_chans, self.window)
        self.decoder: UPerNet | Plain = (
            UPerNet(*described, width=decoder_channels)
            if head == "upernet"
            else Plain(*described, layer=layer)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier: nn.Conv2d | None = None
        self.auxiliary: AuxiliaryHead | None = None
        self.confusion: MulticlassConfusionMatrix | None = None
        self.mean_loss = MeanMetric()
        self.values: list[int] = []  # of the classes, in the masks
        self.colors: list[tuple[int, int, int]] | None = None
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None, persistent=False)
        if num_classes:
            self.set_num_classes(num_classes)
        if weights is not None:
            self._inherit(weights)

    # The model ---------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Segment normalised images of any one size, (B, C, H, W) -> logits, (B, K, H, W)."""
        return slide(lambda crops: self.logits(crops)[0], images, self.window, self.stride)

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Segment images of the window's size: logits, (B, K, H, W), and the auxiliary head's."""
        assert self.classifier is not None, "set_num_classes comes first"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.decoder.read(self.model, images)
        features, middle = self.decoder(maps)
        size = images.shape[-2], images.shape[-1]
        logits = enlarge(self.classifier(self.dropout(features)), size)
        if self.auxiliary is None or not self.training:
            return logits, None
        return logits, enlarge(self.auxiliary(middle), size)

    def inputs(self, batch: Any) -> tuple[Images, Images | None]:
        """Take a batch apart, a dict of ours or (images, masks): normalised images, and masks.

        Floats of a plain loader count as normalised already; in its masks 255 is no class.
        """
        if isinstance(batch, Mapping):
            raw, masks = batch["image"], batch.get("mask")
            if isinstance(raw, Tensor):
                return self.normalize(raw), masks
            return [self.normalize(image[None])[0] for image in raw], masks
        images, masks = batch if isinstance(batch, Sequence) else (batch, None)
        if masks is not None:
            masks = torch.where(masks == USUAL_VOID, VOID, masks.long())
        return (self.normalize(images) if images.dtype == torch.uint8 else images), masks

    def segment(self, images: Images, sizes: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Segment images one after the other, each at its own size: logits, (1, K, H, W).

        Args:
            images: Normalised.
            sizes: Height and width that are wanted of each.
        """
        groups = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        self._keep_step(groups)
        each = (logits for group in groups for logits in self(group))
        for logits, size in zip(each, sizes, strict=True):
            height, width = (int(side) for side in size)
            same = (height, width) == tuple(logits.shape[-2:])
            yield logits[None].float() if same else enlarge(logits[None], (height, width))

    def _keep_step(self, groups: Sequence[Tensor]) -> None:
        """Look at empty windows where other processes, which share the weights, have more windows.

        They gather each block's weights together: one that stopped before would let the rest wait.
        """
        if self._trainer is None or not is_sharding(self.trainer):
            return
        mine = sum(count_windows(group, self.window, self.stride) for group in groups)
        count = torch.tensor(mine, device=groups[0].device)
        for _ in range(int(self.trainer.strategy.reduce(count, reduce_op="max")) - mine):
            self.logits(groups[0].new_zeros(1, groups[0].shape[1], *self.window))

    def loss_of(self, logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy in float32, mean over the pixels that have a class; 0 if none has."""
        masks = masks.long()
        total = F.cross_entropy(logits.float(), masks, weights, ignore_index=VOID, reduction="sum")
        return total / (masks != VOID).sum().clamp_min(1)

    # Lightning's steps -------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: segment crops, compare; the auxiliary head helps."""
        images, masks = self.inputs(batch)
        assert isinstance(images, Tensor)
        assert isinstance(masks, Tensor)
        logits, middle = self.logits(images)
        loss = self.loss_of(logits, masks, self.class_weights)
        if self.hparams["dice"]:
            loss = loss + self.hparams["dice"] * _dice_loss(logits, masks)
        self.log("train/loss", loss, sync_dist=self.trainer.world_size > 1)
        self.log_lr()
        if middle is not None:
            extra = self.loss_of(middle, masks, self.class_weights)
            loss = loss + self.hparams["aux_weight"] * extra
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and scores on the validation images."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and scores on the test images."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, list[Tensor]]:
        """The class of each pixel, (H, W) of each image."""
        images, _ = self.inputs(batch)
        sizes = batch.get("size") if isinstance(batch, Mapping) else None
        sizes = [image.shape[-2:] for image in images] if sizes is None else sizes
        return {"classes": [logits[0].argmax(0) for logits in self.segment(images, sizes)]}

    def on_validation_epoch_end(self) -> None:
        """Score the classes over all pixels."""
        self._score("val")

    def on_test_epoch_end(self) -> None:
        """Score the classes over all pixels."""
        self._score("test")

    def _evaluate(self, part: str, batch: Any) -> None:
        images, masks = self.inputs(batch)
        if masks is None:
            raise ValueError(f"the {part} images have no masks: nothing to compare with")
        assert self.confusion is not None
        sizes = [mask.shape for mask in masks]
        for logits, mask in zip(self.segment(images, sizes), masks, strict=True):
            self.mean_loss.update(self.loss_of(logits, mask[None]), (mask != VOID).sum())
            self.confusion.update(logits.argmax(1), mask[None].long())
        self.log(f"{part}/loss", self.mean_loss, prog_bar=True)

    def _score(self, part: str) -> None:
        """Log what follows from the counts of all images and processes."""
        assert self.confusion is not None
        counts: Tensor = self.confusion.compute()
        self.confusion.reset()
        if not counts.any():
            if self.trainer.sanity_checking:
                return
            raise ValueError(f"no pixel of the {part} masks has a class: all of them are void")
        iou, accuracy = class_iou(counts), counts.diagonal() / counts.sum(1)
        self.log(f"{part}/miou", iou.nanmean(), prog_bar=True, sync_dist=True)
        share = counts.diagonal().sum() / counts.sum()
        self.log(f"{part}/pixel_accuracy", share, sync_dist=True)
        self.log(f"{part}/class_accuracy", accuracy.nanmean(), sync_dist=True)
        for name, value in zip(self.class_names, iou, strict=True):
            if not value.isnan():
                self.log(f"{part}/iou/{name}", value, sync_dist=True)

    # Classes -----------------------------------------------------------------------------------

    def set_num_classes(self, num_classes: int) -> None:
        """Build what depends on the number of classes; a classifier that fits already stays."""
        if num_classes < 2:
            raise ValueError(f"num_classes {num_classes} leaves nothing to tell apart: give 2")
        if self.classifier is not None and self.num_classes == num_classes:
            return
        self.hparams["num_classes"] = num_classes
        self.classifier = nn.Conv2d(self.decoder.out_channels, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)  # mmsegmentation's
        nn.init.zeros_(cast(Tensor, self.classifier.bias))
        if isinstance(self.decoder, UPerNet) and self.hparams["aux_weight"]:
            self.auxiliary = AuxiliaryHead(
                self.decoder.aux_channels, num_classes, self.hparams["dropout"]
            )
        self.confusion = MulticlassConfusionMatrix(
            num_classes, ignore_index=VOID, validate_args=False
        )
        self.to(self.device)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.hparams["num_classes"])

    def set_classes(
        self,
        names: Sequence[str],
        values: Sequence[int] | None = None,
        colors: Sequence[Sequence[int]] | None = None,
        *,
        may_renew: bool = False,
    ) -> None:
        """Take the classes, in the order of their numbers.

        Args:
            names: Their names.
            values: What each is in a mask; by default its number.
            colors: The colour of each, RGB.
            may_renew: Whether a classifier for others, which came with the weights, is given up.

        Raises:
            ValueError: If they are not those that it was trained with.
        """
        names, renew = self.check_classes(names, may_renew=may_renew)
        if renew:
            self.classifier, self.colors = None, None
        self.check_num_classes(names)
        self.set_num_classes(len(names))
        self.classes = names
        self.values = [int(v) for v in (range(len(names)) if values is None else values)]
        if colors is not None:
            self.colors = [(int(red), int(green), int(blue)) for red, green, blue in colors]

    def _inherit(self, weights: str) -> None:
        """Take the decoder and the classifier of the weights too, if they have the same."""
        found = our_checkpoint(weights)
        if found is None or "classifier.weight" not in found["state_dict"]:
            return
        theirs, ours = found["hyper_parameters"], self.hparams
        unlike = [n for n in ("head", "decoder_channels", "layer") if theirs[n] != ours[n]]
        if unlike:
            said = ", ".join(f"{name} {theirs[name]}, not {ours[name]}" for name in unlike)
            rank_zero_info(f"the weights have another decoder ({said}): a new one")
            return
        if ours["num_classes"] in (None, theirs["num_classes"]):
            self.set_num_classes(theirs["num_classes"])
            self.set_classes(found["classes"], found["values"], found["colors"])
            self.head_is_trained = self.head_is_inherited = True
        parts = ["decoder.", *(["classifier.", "auxiliary."] if self.head_is_trained else [])]
        kept = {k: v for k, v in found["state_dict"].items() if k.startswith(tuple(parts))}
        missing = self.load_state_dict(kept, strict=False).missing_keys
        assert not [name for name in missing if name.startswith("decoder.")], missing

    # Set-up and optimisation -------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take classes, class weights and pixel statistics from the data."""
        data = getattr(self.trainer, "datamodule", None)
        if stage != "predict":
            looks = {name: getattr(data, name, None) for name in ("values", "colors")}
            self.take_classes(data, stage, **looks)
        if stage != "fit":
            return
        self.take_statistics(data)
        weights = self._weigh_classes(data)
        self.class_weights = None if weights is None else weights.to(self.device)

    def _weigh_classes(self, data: Any) -> Tensor | None:
        given = self.hparams["class_weights"]
        if given == "balanced":
            counts = getattr(data, "class_counts", None)
            if counts is None:
                raise ValueError("class_weights balanced needs data that counts its classes")
            n = torch.tensor(counts, dtype=torch.float64)
            return (n.sum() / (len(n) * n.clamp_min(1))).float()  # scikit-learn's "balanced"
        if given is not None and len(given) != self.num_classes:
            raise ValueError(
                f"class_weights {given} are not {self.num_classes}, one for each class"
            )
        return None if given is None else torch.tensor(given, dtype=torch.float32)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep how the classes look in masks and pictures, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["values"], checkpoint["colors"] = self.values, self.colors

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the classifier that the file has, and go on with its optimiser."""
        self.set_num_classes(checkpoint["hyper_parameters"]["num_classes"])
        looks = {name: checkpoint.get(name) for name in ("values", "colors")}
        self.load_classes(checkpoint, **looks)
        super().on_load_checkpoint(checkpoint)


def class_iou(counts: Tensor) -> Tensor:
    """Intersection over union of each class, (K,); nan where it is neither there nor predicted.

    Args:
        counts: Pixels by (class, prediction), (K, K).
    """
    hits = counts.diagonal()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def _dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice loss over the batch, of the classes that occur."""
    from segmentation_models_pytorch.losses import DiceLoss  # see dense.UPerNet

    dice: Tensor = DiceLoss("multiclass", ignore_index=VOID)(logits.float(), masks.long())
    return dice


def _check(hparams: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other or would do nothing."""
    if hparams["layer"] is not None and (hparams["head"] != "linear" or not hparams["frozen"]):
        raise ValueError(
            f"layer {hparams['layer']} is for head linear on a frozen encoder: leave it out"
        )
    check_training(hparams, "linear")
    if not 0 <= hparams["dropout"] < 1:
        raise ValueError(f"dropout {hparams['dropout']} is no share: use 0 for none, or 0.1")
    for name in ("aux_weight", "dice"):
        if hparams[name] < 0:
            raise ValueError(f"{name} {hparams[name]} is negative: use 0 for none")
    if hparams["decoder_channels"] < 1:
        raise ValueError(f"decoder_channels {hparams['decoder_channels']}: use 64 to 768")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _stride(given: int | list[int] | None, window: tuple[int, int]) -> tuple[int, int]:
    """Pixels from window to window."""
    if given is None:
        return max(window[0] * 2 // 3, 1), max(window[1] * 2 // 3, 1)
    stride = _pair(given)
    if any(not 0 < step <= side for step, side in zip(stride, window, strict=True)):
        raise ValueError(
            f"stride {given} would leave pixels out or never end: use 1 to {min(window)}"
        )
    return stride
