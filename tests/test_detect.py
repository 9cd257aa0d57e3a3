"""The detector: shapes, losses, learning rates by hand, metrics, masks, and checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from simmim.data.boxes import Fit
from simmim.data.detection import DetectionData
from simmim.decoders.pyramid import Pyramid
from simmim.decoders.rcnn import Anchors, Neck, build_heads, default_anchor_sizes
from simmim.detect import Detector, _to_original
from simmim.evaluation.average_precision import AveragePrecision
from support import exhaustive
from support.folders import make_boxes
from support.small import TINY_VIT
from support.training import quiet_trainer

SMALL: dict[str, Any] = {"fpn_channels": 16, "proposals": 50, "rois_per_image": 16}
VIT: dict[str, Any] = {**SMALL, **TINY_VIT, "img_size": [48, 64]}
SWIN: dict[str, Any] = {**SMALL, "encoder": "swin_tiny_patch4_window7_224", "img_size": 64}
SWIN["encoder_kwargs"] = {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
SWIN["encoder_kwargs"]["window_size"] = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_boxes(tmp_path_factory.mktemp("blocks"), train=8, val=4)


@pytest.fixture(scope="module")
def masked_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_boxes(tmp_path_factory.mktemp("masked"), outlines=True, train=4, val=4)


def data(root: Path, **kwargs: Any) -> DetectionData:
    options = {"img_size": [48, 64], "batch_size": 4, "num_workers": 0, **kwargs}
    return DetectionData(root=str(root), **options)


def batch(n: int = 2, boxes: int = 2, masks: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    targets = []
    for i in range(n):
        count = boxes if i else 0  # the first image has none
        corners = torch.rand(count, 2, generator=generator) * 20
        target = {
            "boxes": torch.cat([corners, corners + 12], 1),
            "labels": torch.arange(count) % 2,
        }
        if masks:
            target["masks"] = torch.ones(count, 48, 64, dtype=torch.uint8)
        targets.append(target)
    images = torch.randint(0, 256, (n, 3, 48, 64), generator=generator).byte()
    return {"image": images, "size": torch.tensor([[48, 64]] * n), "target": targets}


def losses(model: Detector, given: dict[str, Any]) -> dict[str, Tensor]:
    images = model.inputs(given)
    sizes = [tuple(size) for size in given["size"].tolist()]
    return model.losses(model.features(images), sizes, images, given["target"])  # type: ignore[arg-type]


# The model -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [VIT, SWIN])
@pytest.mark.parametrize(
    ("head", "masks"), [("mlp", True), ("conv", False), exhaustive("mlp", False)]
)
def test_every_trained_parameter_gets_a_gradient(
    options: dict[str, Any], head: str, masks: bool
) -> None:
    size = [48, 64] if options is VIT else [64, 64]
    model = Detector(**{**options, "num_classes": 2, "masks": masks, "head": head})
    given = batch(masks=masks)
    if options is SWIN:
        given["image"] = torch.nn.functional.pad(given["image"], (0, 0, 0, 16))
    parts = losses(model, given)
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert set(parts) == names | ({"loss_mask"} if masks else set())
    torch.stack(list(parts.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    found = model(torch.randn(2, 3, *size))
    assert len(found) == 2
    assert ("masks" in found[0]) == masks
    for one in found:
        assert one["boxes"].shape[1] == 4
        assert set(one["labels"].tolist()) <= {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("boxes", [0, 2])
def test_losses_are_finite_without_any_box_and_in_bf16(masks: bool, boxes: int) -> None:
    few = {"masks": masks, "score_threshold": 0.9}  # masks of all that is found take minutes
    model, given = Detector(**VIT, num_classes=2, **few), batch(boxes=boxes, masks=masks)
    with torch.autocast("cpu", torch.bfloat16, enabled=boxes > 0):
        parts, found = losses(model, given), model(model.inputs(given))
    assert all(part.dtype == torch.float32 for part in [*parts.values(), found[0]["boxes"]])
    assert all(part.isfinite() for part in parts.values())
    assert bool(parts["loss_box_reg"]) == bool(boxes)
    if boxes:  # backward in bf16 takes a processor minutes
        return
    torch.stack(list(parts.values())).sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


def test_it_is_torchvisions_faster_rcnn() -> None:
    model = Detector(**{**SWIN, "anchor_sizes": [8, 16, 32, 64, 128]}, num_classes=2).eval()

    class Backbone(torch.nn.Module):
        out_channels = 16

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return model.features(images)

    theirs = FasterRCNN(
        Backbone(),
        3,
        min_size=64,
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
        rpn_anchor_generator=Anchors([8, 16, 32, 64, 128], (0.5, 1, 2), [4, 8, 16, 32, 64]),
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=50,
    ).eval()
    theirs.rpn.load_state_dict(model.rpn.state_dict())
    theirs.roi_heads.load_state_dict(model.roi_heads.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for mine, other in zip(model(images), theirs(list(images)), strict=True):
            assert len(mine["boxes"])
            torch.testing.assert_close(mine["boxes"], other["boxes"])
            torch.testing.assert_close(mine["scores"], other["scores"])
            assert torch.equal(mine["labels"] + 1, other["labels"])


def test_the_mode_stays_and_losses_need_no_training_mode() -> None:
    model = Detector(**VIT, num_classes=2).eval()
    given = batch()
    torch.manual_seed(1)
    evaluated = losses(model, given)
    assert not model.rpn.training
    model.train()
    torch.manual_seed(1)
    trained = losses(model, given)
    for name, part in evaluated.items():
        torch.testing.assert_close(part, trained[name])
    assert model(model.inputs(given))[0]["boxes"].ndim == 2  # boxes in training mode, too
    assert model.rpn.training


def test_what_is_empty_of_the_canvas_has_the_mean_colour_and_no_boxes() -> None:
    model = Detector(**VIT, num_classes=2, score_threshold=0.0).eval()
    given = batch()
    given["size"] = torch.tensor([[48, 64], [20, 30]])
    images = model.inputs(given)
    assert (images[1, :, 20:] == 0).all()
    assert (images[1, :, :, 30:] == 0).all()
    assert torch.equal(images[0], model.normalize(given["image"])[0])
    found = model(images, [(48, 64), (20, 30)])
    assert found[1]["boxes"][:, 2].max() <= 30
    assert found[1]["boxes"][:, 3].max() <= 20


def test_boxes_are_brought_back_to_the_pixels_of_the_file() -> None:
    placement = Fit((48, 64)).place(300, 200, iter(()))  # to 48 x 32
    boxes = torch.tensor([[20.0, 30.0, 120.0, 250.0]])
    found = {"boxes": placement.boxes(boxes), "masks": torch.ones(1, 1, 28, 28)}
    moved = _to_original(found, torch.tensor(placement.size), torch.tensor((300, 200)))
    torch.testing.assert_close(moved["boxes"], boxes)
    assert moved["masks"].shape == (1, 300, 200)
    rows, columns = moved["masks"][0].any(1).nonzero(), moved["masks"][0].any(0).nonzero()
    assert abs(int(rows[0]) - 30) <= 6
    assert abs(int(columns[-1]) - 120) <= 6


def test_anchors_follow_strides_that_are_no_whole_numbers() -> None:
    anchors = Anchors([10], (1.0,), [3.5])
    maps = [torch.zeros(1, 8, 16, 16, dtype=torch.bfloat16)]
    found = anchors(ImageList(torch.zeros(1, 3, 56, 56), [(56, 56)]), maps)[0]
    assert found.dtype == torch.float32
    assert found[:2].tolist() == [[-5, -5, 5, 5], [-1.5, -5, 8.5, 5]]
    assert found[-1].tolist() == [47.5, 47.5, 57.5, 57.5]


def test_default_anchors_are_the_published_ones_where_the_canvas_is_large() -> None:
    strides = [4.0, 8.0, 16.0, 32.0, 64.0]
    assert default_anchor_sizes(strides, (1024, 1024)) == [32, 64, 128, 256, 512]
    assert default_anchor_sizes(strides, (160, 208)) == [13, 26, 52, 104, 208]


def test_regions_are_read_where_they_are_whatever_the_first_batch_holds() -> None:
    model = Detector(**VIT, num_classes=2)
    align = model.roi_heads.box_roi_pool
    column = torch.arange(32.0).expand(1, 16, 24, 32)  # of the finest map, stride 2
    maps = {str(i): torch.nn.functional.avg_pool2d(column, 2**i) for i in range(4)}
    pooled = align(maps, [torch.tensor([[10.0, 10.0, 24.0, 24.0]])], [(20, 30)])
    means = pooled[0, 0].mean(0)
    # Seven bins of 2 px, so one feature wide: the first is around x = 11 px = feature 5.5.
    torch.testing.assert_close(means, torch.arange(7) + 5.5)


# Learning rates ------------------------------------------------------------------------------


# Training ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_to_find_squares(root: Path) -> None:
    torch.manual_seed(0)
    model = Detector(**VIT, base_lr=0.25, warmup_epochs=2, weight_decay=0.01)
    run = quiet_trainer(max_epochs=40, gradient_clip_val=5.0, check_val_every_n_epoch=40)
    run.fit(model, datamodule=data(root, scale_jitter=(1.0, 1.0)))
    scores = {name: float(value) for name, value in run.callback_metrics.items()}
    assert scores["val/map_50"] > 0.5
    assert scores["val/map_class/cat"] == pytest.approx(
        2 * scores["val/map"] - scores["val/map_class/dog"], abs=1e-5
    )
    assert scores["val/loss"] < 1.0


def test_the_validation_loss_depends_on_the_images_alone(root: Path, tmp_path: Path) -> None:
    """Not on the batches that they come in, and so not on the number of processes."""
    model = Detector(**VIT, num_classes=2)
    model.head_is_trained = True
    losses = []
    for batch_size in (1, 3, 4):
        run = quiet_trainer(tmp_path)
        run.validate(model, datamodule=data(root, batch_size=batch_size), verbose=False)
        losses.append(float(run.callback_metrics["val/loss"]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


# Scores --------------------------------------------------------------------------------------


def test_average_precision_of_boxes_by_hand() -> None:
    scores = AveragePrecision(["cat", "dog", "emu"], masks=False)
    box = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
    shifted = box + torch.tensor([0, 0, 0, 9.0])  # IoU 0.816: right at 7 of 10 thresholds
    label, none = torch.tensor([0]), torch.zeros(0, dtype=torch.int64)
    truth = {"iscrowd": torch.tensor([0]), "area": torch.tensor([1600.0])}
    empty = {"boxes": torch.zeros(0, 4), "labels": none}
    scores.update(
        [
            {"boxes": shifted, "labels": label, "scores": torch.tensor([0.9])},
            {"boxes": box, "labels": label + 1, "scores": torch.tensor([0.8])},
            {**empty, "scores": torch.zeros(0)},
        ],
        [
            {"boxes": box, "labels": label, **truth},
            {"boxes": box, "labels": label + 1, **truth},
            {**empty, "iscrowd": none, "area": torch.zeros(0)},
        ],
    )
    found = scores.compute()
    assert found["map_class/cat"] == pytest.approx(0.7, abs=1e-3)
    assert found["map_class/dog"] == pytest.approx(1.0)
    assert found["map"] == pytest.approx(0.85, abs=1e-3)
    assert (found["map_50"], found["map_75"]) == (1, 1)
    assert found["map_medium"] == found["map"]
    assert "map_small" not in found
    assert "map_class/emu" not in found
    assert np.isnan(scores.compute()["map"])  # begun anew


# Checkpoints ---------------------------------------------------------------------------------


def test_other_classes_renew_what_names_them_alone(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_classes is not known"):
        Detector(**VIT)(torch.randn(1, 3, 48, 64))
    model, run = Detector(**VIT), quiet_trainer(max_steps=1, limit_val_batches=0)
    run.fit(model, datamodule=data(root))
    run.save_checkpoint(path := tmp_path / "det.ckpt")
    assert (model.classes, model.category_ids) == (["cat", "dog"], [3, 7])
    onward = Detector(weights=str(path), proposals=50)
    onward.set_classes(["cat", "wolf"], masks=False, may_renew=True)
    one, other = (
        [*m.rpn.parameters(), *m.roi_heads.box_head.parameters()] for m in (model, onward)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    naming = [m.roi_heads.box_predictor.cls_score.weight for m in (model, onward)]
    assert not torch.equal(*naming)


@pytest.mark.slow
def test_masks_are_trained_where_the_data_have_them(masked_root: Path) -> None:
    for options in ({}, {"masks": False}):
        model, run = Detector(**VIT, score_threshold=0.9, **options), quiet_trainer(max_steps=1)
        run.fit(model, datamodule=data(masked_root, **options))
        assert model.has_masks == (options == {})
        assert ({"train/loss_mask", "val/mask_map"} <= set(run.callback_metrics)) == model.has_masks


def test_the_neck_has_a_map_more_than_the_pyramid() -> None:
    import timm

    model = timm.create_model("resnet10t", num_classes=0)
    neck = Neck(Pyramid(model, "resnet10t", 3, (64, 64)), 16, norm=True)
    maps = neck(neck.pyramid.read(model, torch.randn(1, 3, 64, 64)))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    assert [64 / m.shape[-1] for m in maps.values()] == neck.strides
    heads = build_heads(neck, 2, (64, 64), masks=False)
    assert heads.roi_heads.box_predictor.cls_score.out_features == 3
