"""The segmenter: sliding windows and scores by hand, void, heads, learning rates, checkpoints."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmim.decoders.sliding_window import slide, starts
from simmim.segment import VOID, Segmenter, class_iou
from support.commands import assert_same_tensors
from support.small import TINY_VIT
from support.training import quiet_trainer

VIT = {**TINY_VIT, "decoder_channels": 16}
VIT["encoder_kwargs"] = {**VIT["encoder_kwargs"], "depth": 4}
SWIN: dict[str, Any] = {
    "encoder": "swin_tiny_patch4_window7_224",
    "img_size": 32,
    "encoder_kwargs": {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4},
    "decoder_channels": 16,
}
CNN: dict[str, Any] = {"encoder": "resnet10t", "img_size": 32, "decoder_channels": 16}


class Squares(Dataset[dict[str, Any]]):
    """Bright and dark squares on gray, three classes, as our data module gives them."""

    def __init__(self, n: int = 8, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.masks = torch.zeros(n, size, size, dtype=torch.int16)
        for mask in self.masks:
            for value in (1, 2):
                y, x = torch.randint(0, size - 12, (2,), generator=generator).tolist()
                mask[y : y + 12, x : x + 12] = value
        shade = torch.tensor([120, 230, 10], dtype=torch.uint8)
        self.images = shade[self.masks.long()][:, None].expand(-1, 3, -1, -1).contiguous()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.images[i], "mask": self.masks[i], "index": i}


class Data(L.LightningDataModule):
    """What the module reads of a data module."""

    classes = ("none", "bright", "dark")
    values, colors = (0, 7, 9), ((0, 0, 0), (255, 0, 0), (0, 0, 255))
    class_counts = (900, 90, 10)

    def __init__(self, data: Any = None, batch_size: int = 4) -> None:
        super().__init__()
        self.data, self.batch_size = data or Squares(), batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


# The sliding window ------------------------------------------------------------------------------


def test_windows_cover_a_line_and_end_where_it_ends() -> None:
    assert starts(10, 4, 3) == [0, 3, 6]
    assert starts(11, 4, 3) == [0, 3, 6, 7]  # mmsegmentation: max(11 - 4 + 3 - 1, 0) // 3 + 1 = 4
    assert starts(4, 4, 3) == starts(2, 4, 3) == [0]
    for length in range(1, 30):
        for stride in range(1, 6):
            tops = starts(length, 5, stride)
            assert len(tops) == max(length - 5 + stride - 1, 0) // stride + 1
            covered = {p for top in tops for p in range(top, min(top + 5, length))}
            assert covered == set(range(length))


def test_logits_are_averaged_where_windows_overlap() -> None:
    calls: list[Tensor] = []

    def numbered(crops: Tensor) -> Tensor:
        calls.append(crops)
        return torch.full((len(crops), 2, *crops.shape[-2:]), float(len(calls)))

    logits = slide(numbered, torch.rand(2, 3, 4, 6), (4, 4), (2, 2))
    assert logits.shape == (2, 2, 4, 6)
    assert logits[0, 0, 0].tolist() == [1, 1, 1.5, 1.5, 2, 2]


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (5, 20), (3, 3)])
def test_what_looks_at_single_pixels_gives_the_same_through_windows(size: tuple[int, int]) -> None:
    images, seen = torch.rand(2, 3, *size), []

    def double(crops: Tensor) -> Tensor:
        seen.append(crops)
        return torch.cat([crops, crops**2], 1)

    logits = slide(double, images, (8, 8), (5, 5))
    assert torch.allclose(logits, torch.cat([images, images**2], 1), atol=1e-6)
    if size == (3, 3):  # padded with the mean colour
        assert torch.allclose(seen[0][:, :, 5, 7], images.mean((2, 3)), atol=1e-6)


# Scores ------------------------------------------------------------------------------------------


def test_iou_by_hand() -> None:
    counts = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = class_iou(counts)
    assert iou[:2].tolist() == pytest.approx([6 / 9, 3 / 6])
    assert iou[2:].isnan().all()
    predicted_only = torch.tensor([[5, 1], [0, 0]])
    assert class_iou(predicted_only).tolist() == pytest.approx([5 / 6, 0])


class Oracle(Segmenter):
    """Predicts what the red channel of raw images says: 0, 1, 2."""

    def forward(self, images: Tensor) -> Tensor:
        raw = (images * self.std + self.mean)[:, 0] * 255
        return 20.0 * F.one_hot(raw.round().long(), 3).movedim(-1, 1).float()


def test_scores_are_of_all_pixels_that_have_a_class(tmp_path: Path) -> None:
    """Two images of different sizes; void counts nowhere; a class that never occurs neither."""
    masks = [torch.tensor([[0, 0, 1, VOID]]), torch.tensor([[1, 1], [0, VOID]])]
    guesses = [torch.tensor([[0, 1, 1, 1]]), torch.tensor([[1, 0], [0, 2]])]
    images = [guess.byte()[None].expand(3, -1, -1) for guess in guesses]
    batch = {"image": images, "mask": masks}
    model = Oracle(**VIT, num_classes=3)
    model.head_is_trained = True
    loader = DataLoader([batch], batch_size=None)
    scores = quiet_trainer(tmp_path).validate(model, loader, verbose=False)[0]
    # class 0: hits 2, missed 1, wrong 1; class 1: hits 2, missed 1, wrong 1
    assert scores["val/iou/0"] == pytest.approx(2 / 4)
    assert scores["val/iou/1"] == pytest.approx(2 / 4)
    assert "val/iou/2" not in scores
    assert scores["val/miou"] == pytest.approx(0.5)
    assert scores["val/pixel_accuracy"] == pytest.approx(4 / 6)
    assert scores["val/loss"] == pytest.approx(20 * 2 / 6, abs=1e-3)  # each mistake costs 20


def test_images_without_any_class_cost_nothing(tmp_path: Path) -> None:
    data = Squares(6)
    data.masks[:] = VOID
    data.masks[5, :4] = 1
    model = Segmenter(**VIT, dice=1.0, dropout=0.0)
    fit = quiet_trainer(tmp_path, log_every_n_steps=1, num_sanity_val_steps=2)
    fit.fit(model, Data(data, 2))
    metrics = fit.callback_metrics
    assert all(value.isfinite() for value in metrics.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = model.loss_of(logits, torch.full((2, 4, 4), VOID))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    data.masks[:] = VOID
    with pytest.raises(ValueError, match="all of them are void"):
        quiet_trainer(tmp_path).validate(model, Data(data, 2), verbose=False)


def test_the_loss_is_the_mean_over_known_pixels_in_float32() -> None:
    model = Segmenter(**VIT, num_classes=3)
    logits = torch.randn(2, 3, 5, 5).bfloat16()
    masks = torch.randint(-1, 3, (2, 5, 5))
    loss = model.loss_of(logits, masks)
    known = masks >= 0
    picked = logits.float().log_softmax(1).movedim(1, -1)[known]
    expected = -picked[torch.arange(len(picked)), masks[known]].mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = torch.tensor([1.0, 2.0, 0.0])
    weighed = model.loss_of(logits, masks, weights)
    shares = weights[masks[known]]
    expected = -(picked[torch.arange(len(picked)), masks[known]] * shares).mean()
    assert weighed.item() == pytest.approx(expected.item(), rel=1e-5)


# Heads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize("options", [VIT, SWIN, CNN], ids=["vit", "swin", "cnn"])
def test_every_trained_parameter_learns_and_any_size_is_taken(
    options: dict[str, Any], head: Any
) -> None:
    """From one image as well, where the encoder itself has no BatchNorm."""
    model = Segmenter(**options, head=head, num_classes=3, dropout=0.0)
    for n in (2,) if options is CNN else (2, 1):
        logits, middle = model.train().logits(torch.randn(n, 3, 32, 32))
        assert logits.shape == (n, 3, 32, 32)
        assert logits.isfinite().all()
        loss = (logits * torch.randn_like(logits)).sum()
        if middle is not None:
            loss = loss + (middle * torch.randn_like(middle)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert sum(p.requires_grad for p in model.encoder.parameters()) > 3
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 3, 40, 50)).shape == (2, 3, 40, 50)
        assert model(torch.randn(1, 3, 20, 70)).shape == (1, 3, 20, 70)


def test_a_linear_head_reads_the_block_that_is_asked_for() -> None:
    model = Segmenter(**VIT, head="linear", frozen=True, layer=2, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    (features,) = model.decoder.read(model.model, images)
    (expected,) = model.model.forward_intermediates(images, [1], intermediates_only=True)
    assert torch.equal(features, expected)
    last = Segmenter(**VIT, head="linear", num_classes=3).eval()
    (features,) = last.decoder.read(last.model, images)
    tokens = last.model.forward_features(images)[:, 1:]
    assert torch.allclose(features.flatten(2).transpose(1, 2), tokens, atol=1e-6)


# Learning, checkpoints ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "linear"])
def test_it_learns(head: Any) -> None:
    model = Segmenter(**VIT, head=head, base_lr=0.25, warmup_epochs=1, dropout=0.0)
    fit = quiet_trainer(max_epochs=40, log_every_n_steps=1, check_val_every_n_epoch=40)
    fit.fit(model, Data())
    assert fit.callback_metrics["val/miou"] > 0.45  # all of one class: 0.27
    assert {"train/loss", "val/loss", "lr", "val/iou/dark"} <= set(fit.callback_metrics)
    assert model.values == [0, 7, 9]


@pytest.mark.slow
def test_weights_of_a_segmenter_bring_what_fits(tmp_path: Path) -> None:
    model, fit = Segmenter(**VIT), quiet_trainer(max_steps=1, limit_val_batches=0)
    fit.fit(model, Data())
    fit.save_checkpoint(path := tmp_path / "seg.ckpt")
    onward = Segmenter(weights=str(path), decoder_channels=16)
    assert (onward.class_names, onward.values) == (["none", "bright", "dark"], [0, 7, 9])
    assert onward.colors == [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
    # For other classes the last layer is new, and the decoder stays.
    onward.set_classes(["a", "b", "c", "d"], may_renew=True)
    assert onward.num_classes == onward.confusion.num_classes == 4  # type: ignore[union-attr]
    assert_same_tensors(onward.decoder.state_dict(), model.decoder.state_dict())
    other = Segmenter(weights=str(path), decoder_channels=16, num_classes=5)
    assert_same_tensors(other.decoder.state_dict(), model.decoder.state_dict())
    # Another head, or one of another width, is new.
    larger = Segmenter(weights=str(path), img_size=64, head="linear")
    assert larger.window == (64, 64)
    wider = Segmenter(weights=str(path), decoder_channels=24)
    assert wider.classifier is larger.classifier is None


def test_a_plain_loader_of_images_and_masks_is_taken(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 32, 32)
    masks = torch.randint(0, 3, (4, 32, 32))
    masks[:, :4] = 255
    model = Segmenter(**VIT, num_classes=3)
    found, known = model.inputs((images, masks))
    assert torch.equal(found, images)  # type: ignore[arg-type]
    assert (known[:, :4] == VOID).all()  # type: ignore[index]
    loader = DataLoader(list(zip(images, masks, strict=True)), batch_size=2)
    quiet_trainer(tmp_path).fit(model, loader, loader)


def test_scores_stay_when_an_image_is_scored_at_another_size() -> None:
    model = Segmenter(**VIT, num_classes=3).eval()
    batch = {
        "image": torch.zeros(2, 3, 16, 24, dtype=torch.uint8),
        "size": torch.tensor([[32, 48], [16, 24]]),
    }
    with torch.no_grad():
        classes = model.predict_step(batch, 0)["classes"]
    assert [tuple(c.shape) for c in classes] == [(32, 48), (16, 24)]


def test_class_weights_are_scikit_learns_balanced(tmp_path: Path) -> None:
    model = Segmenter(**VIT, class_weights="balanced")
    fit = quiet_trainer(tmp_path, limit_train_batches=1)
    fit.fit(model, Data())
    assert model.class_weights is not None
    expected = [1000 / (3 * n) for n in (900, 90, 10)]
    assert model.class_weights.tolist() == pytest.approx(expected)
    wrong = Segmenter(**VIT, class_weights=[1.0])
    with pytest.raises(ValueError, match=r"class_weights \[1.0\] are not 3"):
        quiet_trainer(tmp_path).fit(wrong, Data())


def test_a_number_that_does_not_go_with_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes 5 does not go with the 3 classes"):
        Segmenter(**VIT, num_classes=5).set_classes(["a", "b", "c"])
