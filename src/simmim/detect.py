"""What an encoder is worth as a detector: Faster R-CNN or Mask R-CNN on its feature pyramid."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MeanMetric
from torchvision.models.detection.roi_heads import paste_masks_in_image

from simmim.decoders.pyramid import Pyramid
from simmim.decoders.rcnn import Neck, build_heads, image_list
from simmim.evaluation.average_precision import AveragePrecision
from simmim.training.base import seed_of
from simmim.training.fine_tuning import Downstream, check_training
from simmim.weights.backbone import open_backbone, our_checkpoint

Sizes = list[tuple[int, int]]  # height and width that each image fills of the canvas
Found = dict[str, Tensor]  # of an image: boxes (n, 4) by their corners, labels, scores, masks
EVALUATION = 2  # of the seeds: what the losses of an evaluation draw
SHAPE = ("fpn_channels", "head", "anchor_sizes", "anchor_ratios")  # what the heads' weights need
NAMING = ("box_predictor.", "mask_predictor.")  # the parts of the heads that know the classes


class Detector(Downstream):
    """A detector on an encoder: torchvision's Faster R-CNN, or Mask R-CNN where there are masks.

    The encoder's maps go through a feature pyramid; of a plain ViT it is ViTDet's simple one, made
    from the last block (arXiv:2203.16527). Images of any size are fitted onto one canvas.

    Args:
        weights: Weights of the encoder: a run's folder or checkpoint of ours, an official SimMIM
            or Swin release (.pth), `timm:NAME`, or a Hugging Face or timm folder. Of a detector of
            ours pyramid and heads are taken as well, in their own shape. None: from scratch.
        encoder: Name of a timm model; by default that of the weights, or vit_base_patch16_224.
        img_size: Height and width of the canvas in pixels, one number or [height, width]; by
            default those of the weights, or 224. Boxes of less than about 16 px are hard to find:
            detectors want larger images than classifiers (1024 in ViTDet).
        in_chans: Channels of the images; by default those of the weights, or 3.
        num_classes: Number of classes, without background; by default the data's.
        masks: Find outlines, too (Mask R-CNN). None: where the data has them.
        frozen: Leave the encoder as it is, and train pyramid and heads alone.
        fpn_channels: Channels of each map of the pyramid. 256 (arXiv:1612.03144); fewer suit few
            images.
        head: mlp (two layers, as in Faster R-CNN) or conv (four convolutions with LayerNorm and one
            layer, and LayerNorm in the pyramid, as in ViTDet).
        anchor_sizes: Side of the boxes that are tried first, in pixels of the canvas: one for each
            of the pyramid's maps (five for most encoders). None: 8 strides of each map (32 to 512
            px, arXiv:1612.03144), less where the largest would be larger than the canvas.
        anchor_ratios: Height over width of these boxes.
        proposals: Boxes of an image that are looked at closely. 1000 (detectron2).
        rois_per_image: Of these, how many are trained on. 512 (Faster R-CNN with FPN).
        score_threshold: Score below which nothing is reported. 0.05 (torchvision).
        encoder_kwargs: Options of the timm model that differ from those in the weights.
        drop_path_rate: Stochastic depth, growing linearly over the blocks. 0.1 (ViTDet's ViT-B).
        layer_decay: Factor by which the learning rate falls from each block to the one below; None
            = none. 0.7 (ViTDet's ViT-B).
        optimizer: Optimiser class and its options; its lr and weight decay are set from base_lr
            and weight_decay. AdamW (ViTDet).
        base_lr: Learning rate for a global batch of 512; it is scaled linearly with the batch.
            8e-4, which is ViTDet's 1e-4 for a batch of 64.
        schedule: cosine, or multistep.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate that the warm-up begins with, for a global batch of 512.
        min_lr: Learning rate at the end of the cosine, for a global batch of 512.
        milestones: Epochs at which multistep multiplies the learning rate by 0.1.
        weight_decay: AdamW's weight decay; none on biases, norms, tokens and position tables. 0.1
            (ViTDet).
        grad_checkpointing: Recompute the encoder's activations in the backward pass: less memory,
            more time.
        seed: Seed of dropout and of which boxes are trained on. On the command line it is
            `--seed_everything`.
        trust: Import an encoder that the weights, or an optimiser that a checkpoint, name by an
            import path, which runs their code.
    """

    UNTRAINED = "this detector is not trained yet, its boxes"
    NAME, NAMED_BY = "this detector", "annotations"
    REMEDY = "give data with the same classes"

    def __init__(
        self,
        weights: str | None = None,
        encoder: str | None = None,
        img_size: int | list[int] | None = None,
        in_chans: int | None = None,
        num_classes: int | None = None,
        masks: bool | None = None,
        frozen: bool = False,
        fpn_channels: int = 256,
        head: Literal["mlp", "conv"] = "mlp",
        anchor_sizes: list[float] | None = None,
        anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
        proposals: int = 1000,
        rois_per_image: int = 512,
        score_threshold: float = 0.05,
        encoder_kwargs: dict[str, Any] | None = None,
        drop_path_rate: float = 0.0,
        layer_decay: float | None = None,
        optimizer: OptimizerCallable = AdamW,
        base_lr: float = 8e-4,
        schedule: Literal["cosine", "multistep"] = "cosine",
        warmup_epochs: float = 1,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        milestones: list[int] | None = None,
        weight_decay: float = 0.1,
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

        detector = None if weights is None else self._find_detector(weights)
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
        pyramid = Pyramid(backbone.model, backbone.encoder, backbone.in_chans, self.canvas)
        if grad_checkpointing:
            backbone.model.set_grad_checkpointing(True)
        self.neck = Neck(pyramid, self.hparams["fpn_channels"], norm=self.hparams["head"] == "conv")
        self.rpn: Any = None
        self.roi_heads: Any = None
        self.category_ids: list[int] = []
        self.scores: AveragePrecision | None = None
        self.mean_loss = MeanMetric()
        if detector is not None:
            self._inherit(detector)
        if num_classes:
            if num_classes != self.hparams["num_classes"]:  # of the detector that came along
                self.classes, self.category_ids = [], []
                self.head_is_trained = self.head_is_inherited = False
            self.set_num_classes(num_classes, masks)
            self.hparams["masks"] = masks  # None: the data are still to be asked

    # The model ---------------------------------------------------------------------------------

    def forward(self, images: Tensor, sizes: Sizes | None = None) -> list[Found]:
        """Find objects in normalised images, (B, C, H, W).

        Args:
            images: Of the canvas's size.
            sizes: Height and width that each fills of the canvas, from the top left; None: all.

        Returns:
            Of each image boxes (n, 4) by their corners in pixels of the canvas, labels from 0 and
            scores, the best first; with masks the probability at 28 x 28 points of each box,
            (n, 1, 28, 28).
        """
        return self.detect(self.features(images), sizes or [self.canvas] * len(images), images)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of the pyramid, fine to coarse, each (B, D, h, w)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.neck.pyramid.read(self.model, images)
        return cast(dict[str, Tensor], self.neck(maps))

    def losses(
        self,
        features: dict[str, Tensor],
        sizes: Sizes,
        images: Tensor,
        targets: list[dict[str, Tensor]],
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """The parts of the loss, each a mean over the boxes that are drawn for it, in float32.

        With seeds, one an image, what is drawn of an image does not depend on the others.
        """
        wanted = [
            {**target, "boxes": target["boxes"].float(), "labels": target["labels"] + 1}
            for target in targets
        ]
        with self._heads(training=True, seeds=seeds):
            shown = image_list(images, sizes)
            proposals, of_proposals = self.rpn(shown, features, wanted)
            _, of_boxes = self.roi_heads(features, proposals, sizes, wanted)
        return {**of_boxes, **of_proposals}

    def detect(self, features: dict[str, Tensor], sizes: Sizes, images: Tensor) -> list[Found]:
        """What is found in maps of the pyramid, as `forward` returns it."""
        with self._heads(training=False):
            proposals, _ = self.rpn(image_list(images, sizes), features)
            found, _ = self.roi_heads(features, proposals, sizes)
        return [{**image, "labels": image["labels"] - 1} for image in found]

    def find(self, images: Tensor, size: Tensor, original: Tensor) -> list[Found]:
        """What is found in images, in the pixels of their files.

        Args:
            images: Normalised, on the canvas, (B, C, H, W).
            size: Height and width that each fills of it, (B, 2).
            original: Height and width of its file, (B, 2).

        Returns:
            As `forward`, but masks are those of the whole file, bool, (n, h, w).
        """
        found = self(images, _sizes(size))
        return [_to_original(*one) for one in zip(found, size, original, strict=True)]

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width that all images are brought to."""
        size = self.hparams["img_size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def has_masks(self) -> bool:
        """Whether it finds masks."""
        return self.roi_heads is not None and bool(self.roi_heads.has_mask())

    def inputs(self, batch: Mapping[str, Any]) -> Tensor:
        """Normalised images, (B, C, H, W); what is empty of the canvas has the mean colour."""
        images, size = self.normalize(batch["image"]), batch["size"]
        rows = torch.arange(images.shape[2], device=images.device) < size[:, :1]
        columns = torch.arange(images.shape[3], device=images.device) < size[:, 1:]
        return images * (rows[:, None, :, None] & columns[:, None, None, :])

    @contextmanager
    def _heads(self, *, training: bool, seeds: Sequence[int] | None = None) -> Iterator[None]:
        """Let torchvision's heads give losses, or else boxes, whatever the mode."""
        if self.rpn is None:
            raise ValueError("num_classes is not known: give it, or data with annotations")
        modes = self.rpn.training, self.roi_heads.training
        samplers = self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler
        self.rpn.training = self.roi_heads.training = training
        for sampler in samplers:
            sampler.seeds = seeds
        try:
            yield
        finally:
            self.rpn.training, self.roi_heads.training = modes
            for sampler in samplers:
                sampler.seeds = None

    # Lightning's steps -------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: look, propose, name, compare."""
        images = self.inputs(batch)
        parts = self.losses(self.features(images), _sizes(batch["size"]), images, batch["target"])
        loss = torch.stack(list(parts.values())).sum()
        spread = self.trainer.world_size > 1
        self.log("train/loss", loss, sync_dist=spread, batch_size=len(images))
        named = {f"train/{name}": value for name, value in parts.items()}
        self.log_dict(named, sync_dist=spread, batch_size=len(images))
        self.log_lr()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and scores on the validation images."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and scores on the test images."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> list[Found]:
        """What is found in each image, in the pixels of its file."""
        return self.find(self.inputs(batch), batch["size"], batch["original"])

    def on_validation_epoch_end(self) -> None:
        """Score all images at once."""
        self._score("val")

    def on_test_epoch_end(self) -> None:
        """Score all images at once."""
        self._score("test")

    def _evaluate(self, part: str, batch: Any) -> None:
        assert self.scores is not None
        images, sizes = self.inputs(batch), _sizes(batch["size"])
        features = self.features(images)
        # Losses draw boxes: of an image the same ones always, whatever batch it is in.
        seeds = [seed_of(EVALUATION, index) for index in batch["index"].tolist()]
        with isolate_rng(include_cuda=images.is_cuda):
            parts = self.losses(features, sizes, images, batch["target"], seeds)
        found = self.detect(features, sizes, images)
        places = zip(found, batch["size"], batch["original"], strict=True)
        self.scores.update([_to_original(*one) for one in places], batch["truth"])
        loss = torch.stack(list(parts.values())).sum()
        # Not by Lightning's mean: over processes it divides by a whole number of images.
        self.mean_loss.update(loss, len(images))
        self.log(f"{part}/loss", self.mean_loss, prog_bar=True, batch_size=len(images))

    def _score(self, part: str) -> None:
        assert self.scores is not None
        spread = self.trainer.world_size > 1  # all processes know the same numbers
        for name, value in self.scores.compute().items():
            self.log(f"{part}/{name}", value, prog_bar=name == "map", sync_dist=spread)

    # Classes -----------------------------------------------------------------------------------

    def set_num_classes(
        self, num_classes: int, masks: bool | None = None, *, renew: bool = False
    ) -> None:
        """Build the heads; of those that there are, all weights that fit stay.

        Args:
            num_classes: Without the background.
            masks: Whether to find masks; None: as before.
            renew: Whether the classes are others than before: what names them begins anew.
        """
        if num_classes < 1:
            raise ValueError("num_classes 0 leaves nothing to find: annotate some boxes")
        masks = self.has_masks if masks is None else masks
        if (
            self.rpn is not None
            and num_classes == self.hparams["num_classes"]
            and masks == self.has_masks
            and not renew
        ):
            return
        names = ("head", "anchor_sizes", "anchor_ratios")
        numbers = ("proposals", "rois_per_image", "score_threshold")
        heads = build_heads(
            self.neck,
            num_classes,
            self.canvas,
            masks=masks,
            **{name: self.hparams[name] for name in (*names, *numbers)},
        )
        if self.rpn is not None:
            _keep_weights(self.rpn, heads.rpn)
            _keep_weights(self.roi_heads, heads.roi_heads, NAMING if renew else ())
        self.rpn, self.roi_heads = heads
        self.hparams.update(num_classes=num_classes, masks=masks)
        self.to(self.device)

    def set_classes(
        self,
        names: Sequence[str],
        *,
        masks: bool,
        category_ids: Sequence[int] | None = None,
        may_renew: bool = False,
    ) -> None:
        """Take the names of the classes, in the order of their numbers.

        Args:
            names: The names.
            masks: Whether to find masks.
            category_ids: Their ids in annotations.
            may_renew: Whether heads for other classes, which came with the weights, are given up.

        Raises:
            ValueError: If they are not those that it was trained with.
        """
        names, renew = self.check_classes(names, may_renew=may_renew)
        self.check_num_classes(names)
        self.set_num_classes(len(names), masks, renew=renew)
        self.classes = names
        if category_ids is not None:
            self.category_ids = list(category_ids)
        self.hparams["masks"] = masks

    def _find_detector(self, weights: str) -> dict[str, Any] | None:
        """Open the weights, if they are a detector of ours, and take the shape of its heads."""
        content = our_checkpoint(weights)
        if content is None or not any(name.startswith("rpn.") for name in content["state_dict"]):
            return None
        theirs = {name: content["hyper_parameters"][name] for name in SHAPE}
        other = [f"{name} {v}" for name, v in theirs.items() if v != self.hparams[name]]
        if other:
            rank_zero_info(f"the heads of {weights} are kept, with their {', '.join(other)}")
        self.hparams.update(theirs)
        return content

    def _inherit(self, detector: Mapping[str, Any]) -> None:
        """Take pyramid and heads of a detector of ours."""
        wanted, theirs = self.hparams["masks"], detector["hyper_parameters"]
        self.set_num_classes(theirs["num_classes"], theirs["masks"])
        for name in ("neck", "rpn", "roi_heads"):
            start = f"{name}."
            tensors = {k: v for k, v in detector["state_dict"].items() if k.startswith(start)}
            part = cast(nn.Module, getattr(self, name))
            part.load_state_dict({k.removeprefix(start): v for k, v in tensors.items()})
        self.classes = list(detector.get("classes") or [])
        self.category_ids = list(detector.get("category_ids") or [])
        self.head_is_trained = self.head_is_inherited = True
        self.origin += "; its pyramid and heads are taken, too"
        self.hparams["masks"] = wanted

    # Set-up and optimisation -------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take classes, masks and pixel statistics from the data."""
        data = getattr(self.trainer, "datamodule", None)
        if stage != "predict":
            masks = self._choose_masks(bool(getattr(data, "has_masks", False)), stage)
            ids = getattr(data, "category_ids", [])
            self.take_classes(data, stage, masks=masks, category_ids=ids)
            self.scores = AveragePrecision(self.class_names, masks=self.has_masks and masks)
        if stage == "fit":
            self.take_statistics(data)

    def _choose_masks(self, offered: bool, stage: str) -> bool:
        """Whether to find masks: what is trained follows the data, unless the user says it."""
        if stage != "fit":
            return self.has_masks and offered
        wanted = self.hparams["masks"]
        return offered if wanted is None else bool(wanted)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the ids of the classes in annotations, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["category_ids"] = self.category_ids

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the heads that the file has, and go on with its optimiser."""
        hp = checkpoint["hyper_parameters"]
        self.set_num_classes(hp["num_classes"], bool(hp["masks"]))
        looks = {"masks": self.has_masks, "category_ids": checkpoint.get("category_ids")}
        self.load_classes(checkpoint, **looks)
        if self.scores is not None:  # set up before the classes were known
            self.scores = AveragePrecision(self.class_names, masks=self.scores.masks)
        super().on_load_checkpoint(checkpoint)


def _check(hparams: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other or would do nothing."""
    check_training(hparams)
    for name in ("fpn_channels", "proposals", "rois_per_image"):
        if hparams[name] < 1:
            raise ValueError(f"{name} {hparams[name]} is too few: use at least 1")
    for name in ("anchor_sizes", "anchor_ratios"):
        if hparams[name] is not None and not all(value > 0 for value in hparams[name]):
            raise ValueError(f"{name} {list(hparams[name])} must all be above 0")
    if not 0 <= hparams["score_threshold"] < 1:
        raise ValueError(f"score_threshold {hparams['score_threshold']} is not in 0..1: use 0.05")


def _sizes(size: Tensor) -> Sizes:
    return [(int(height), int(width)) for height, width in size.tolist()]


def _to_original(found: Found, size: Tensor, original: Tensor) -> Found:
    """Bring what was found on the canvas to the pixels of the image's file."""
    scale = (original / size).flip(0).repeat(2).float()  # height and width -> those of x, y, x, y
    boxes = found["boxes"].float() * scale
    moved = {**found, "boxes": boxes}
    if "masks" in found:
        height, width = original.tolist()
        pasted = paste_masks_in_image(found["masks"], boxes, (height, width))
        moved["masks"] = pasted[:, 0] > 0.5
    return moved


def _keep_weights(old: nn.Module, new: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Copy what has the same name and shape in both, but parts of these names."""
    wanted = new.state_dict()
    kept = {
        name: tensor
        for name, tensor in old.state_dict().items()
        if name in wanted and tensor.shape == wanted[name].shape and not name.startswith(but)
    }
    new.load_state_dict({**wanted, **kept})
