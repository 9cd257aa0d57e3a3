"""The classifier: its learning rates by hand, frozen means frozen, mixing, metrics, checkpoints."""

import csv
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from simmim import load_encoder
from simmim.callbacks.classification import class_rows
from simmim.callbacks.predictions import BoardPredictions
from simmim.classify import Classifier
from simmim.evaluation.metrics import Scores, balanced_weights, class_accuracy
from simmim.masking import sample_keys
from simmim.pretrain import SimMIM
from simmim.training.mixing import Mixer, erase
from support.small import TINY_VIT as VIT
from support.training import quiet_trainer

BEIT: dict[str, Any] = {**VIT, "encoder": "beit_base_patch16_224"}
SWIN: dict[str, Any] = {"encoder": "swin_tiny_patch4_window7_224", "img_size": 32}
SWIN["encoder_kwargs"] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1}
OWN = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}


class Stripes(Dataset[dict[str, Any]]):
    """Three classes of stripes that differ in their direction, as our data module gives them."""

    def __init__(self, n: int = 24, chans: int = 3, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(3)
        y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        waves = [torch.sin(x / 2), torch.sin(y / 2), torch.sin((x + y) / 2)]
        noise = torch.rand(n, chans, 32, 32, generator=generator)
        self.labels = torch.arange(n) % classes
        signal = torch.stack([waves[label % 3] for label in self.labels])[:, None]
        self.images = (127 + 80 * signal + 40 * (noise - 0.5)).clamp(0, 255).byte()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {
            "image": self.images[i],
            "index": torch.tensor(i),
            "label": self.labels[i],
            "path": f"{i}.png",
        }


class Data(L.LightningDataModule):
    """What the module reads of a data module."""

    classes = ("across", "down", "slanted")
    class_counts = (8, 8, 8)
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, n: int = 24, chans: int = 3, batch_size: int = 8) -> None:
        super().__init__()
        self.images, self.batch_size = Stripes(n, chans), batch_size

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.images, batch_size=self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(self.images, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def pretrain(folder: Path, encoder: dict[str, Any]) -> Path:
    torch.manual_seed(4)
    model = SimMIM(**encoder, mask_patch_size=8)
    model.set_statistics([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    run = quiet_trainer(folder)
    run.fit(model, DataLoader(Stripes(8), 4))
    run.save_checkpoint(folder / "pretrained.ckpt")
    return folder / "pretrained.ckpt"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a pretrained plain ViT."""
    return pretrain(tmp_path_factory.mktemp("pretrained"), VIT)


# Learning rates ------------------------------------------------------------------------------


def test_the_layer_decay_of_a_two_block_vit_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = Classifier(**VIT, layer_decay=0.5, base_lr=5.12, warmup_epochs=0, min_lr=0)
    run = quiet_trainer(max_steps=1)
    run.fit(model, datamodule=Data())
    # Embedding, two blocks, head: levels 0 to 3. lr 5.12 x 8 images / 512 = 0.08 at the top.
    # 32 wide: patch 8 x 8 x 3 x 32; qkv, projection, MLP of 128: 12 x 32^2 weights a block.
    expected = {
        "layer_0_decay": (0.01, 0.05, 6144),
        "layer_0_no_decay": (0.01, 0.0, 32 + 32 + 17 * 32),  # bias, class token, positions
        "layer_1_decay": (0.02, 0.05, 12288),
        "layer_1_no_decay": (0.02, 0.0, 4 * 32 + 96 + 32 + 128 + 32),
        "layer_2_decay": (0.04, 0.05, 12288),
        "layer_2_no_decay": (0.04, 0.0, 4 * 32 + 96 + 32 + 128 + 32),
        "layer_3_decay": (0.08, 0.05, 96),
        "layer_3_no_decay": (0.08, 0.0, 64 + 3),  # fc_norm and bias
    }
    groups = {group["name"]: group for group in run.optimizers[0].param_groups}
    assert groups.keys() == expected.keys()
    for name, (rate, decay, count) in expected.items():
        assert groups[name]["initial_lr"] == pytest.approx(rate)
        assert groups[name]["weight_decay"] == decay
        assert sum(p.numel() for p in groups[name]["params"]) == count
    assert "layer_2_decay          0.04          0.05       12,288" in caplog.text
    assert "from scratch" in caplog.text


# Probes --------------------------------------------------------------------------------------


def test_a_frozen_encoder_keeps_no_graph(pretrained: Path) -> None:
    model = Classifier(weights=str(pretrained), frozen=True, num_classes=3, layer="all")
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.logits(torch.randn(4, 3, 32, 32))
    assert logits["main"].requires_grad
    assert sum(tensor.numel() for tensor in kept) <= 2 * (4 * 32 + 32 * 3)  # two linear layers'


def test_a_probe_reads_what_it_says(pretrained: Path) -> None:
    encoder = SimMIM.load_from_checkpoint(pretrained).encoder.eval()
    images = torch.randn(2, 3, 32, 32)
    timm_model = encoder.model
    x = timm_model.norm_pre(timm_model._pos_embed(timm_model.patch_embed(images)))
    first = timm_model.blocks[0](x)
    last = timm_model.norm(timm_model.blocks[1](first))

    def read(**kwargs: Any) -> Tensor:
        model = Classifier(weights=str(pretrained), frozen=True, num_classes=3, **kwargs).eval()
        model.heads["main"].linear = torch.nn.Identity()
        return model(images)

    torch.testing.assert_close(read(), last[:, 1:].mean(1))
    torch.testing.assert_close(read(pooling="token"), last[:, 0])
    torch.testing.assert_close(read(layer=1), first[:, 1:].mean(1))
    torch.testing.assert_close(read(layer=1, pooling="token"), first[:, 0])
    assert read(pooling="attention").shape == (2, 32)
    normalised = Classifier(
        weights=str(pretrained), frozen=True, num_classes=3, batch_norm=True
    ).heads["main"]
    normalised.linear = torch.nn.Identity()
    torch.testing.assert_close(
        normalised.train()(last[:, 1:]),
        F.batch_norm(last[:, 1:].mean(1), None, None, training=True, eps=1e-6),
    )


@pytest.mark.slow
def test_a_sweep_trains_one_probe_a_layer(tmp_path: Path, pretrained: Path) -> None:
    def fit(**kwargs: Any) -> dict[str, float]:
        model = Classifier(
            weights=str(pretrained), frozen=True, base_lr=1, warmup_epochs=0, **kwargs
        )
        run = quiet_trainer(tmp_path, max_epochs=3)
        torch.manual_seed(0)
        run.fit(model, datamodule=Data())
        return {name: float(value) for name, value in run.callback_metrics.items()}

    sweep = fit(layer="all")
    assert {"val/top1_layer_01", "val/top1_layer_02", "val/loss_layer_01"} <= set(sweep)
    assert sweep["val/top1"] == sweep["val/top1_layer_02"]
    assert sweep["val/loss"] == sweep["val/loss_layer_02"]
    assert fit(layer=2)["val/loss"] == sweep["val/loss_layer_02"]
    assert fit(layer=1)["val/loss"] == sweep["val/loss_layer_01"]


# Fine-tuning ---------------------------------------------------------------------------------


def test_the_fine_tuned_vit_of_the_paper(tmp_path: Path) -> None:
    """Per-block copies of the shared table, mean of the patch tokens, no pretraining norm."""
    kwargs = {**BEIT["encoder_kwargs"], **SHARED, "global_pool": ""}
    path = pretrain(tmp_path, {**BEIT, "encoder_kwargs": kwargs})
    source = SimMIM.load_from_checkpoint(path).encoder.model
    model = Classifier(
        weights=str(path), encoder_kwargs=OWN, num_classes=3, head_init_scale=0.001
    ).eval()
    shared = source.rel_pos_bias.relative_position_bias_table
    for block in model.model.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, shared)
    assert isinstance(model.model.norm, torch.nn.Identity)
    assert model.model.head.weight.std() < 0.03 * 0.001
    images = torch.randn(2, 3, 32, 32)
    source.eval().norm = torch.nn.Identity()
    pooled = F.layer_norm(source.forward_features(images)[:, 1:].mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(
        model.model.forward_head(model.model.forward_features(images), pre_logits=True),
        pooled,
        rtol=1e-4,
        atol=1e-5,
    )
    assert "tensors used" in model.origin
    assert "norm behind it" in model.origin


@pytest.mark.parametrize("frozen", [False, True])
def test_an_encoder_without_a_class_token(tmp_path: Path, frozen: bool) -> None:
    """timm's default would pool the class token; the mean of the patch tokens needs none."""
    bare = {**VIT, "encoder_kwargs": {**VIT["encoder_kwargs"], "class_token": False}}
    kwargs = {**bare["encoder_kwargs"], "global_pool": ""}
    path = pretrain(tmp_path, {**bare, "encoder_kwargs": kwargs})
    images = torch.randn(2, 3, 32, 32)
    for begin in (bare, {"weights": str(path)}):
        model = Classifier(**begin, frozen=frozen, num_classes=3).eval()
        assert model(images).shape == (2, 3)
        assert model.model.num_prefix_tokens == 0
    if frozen:  # a fine-tuned ViT that pools the mean has its norm behind the pooling
        source = SimMIM.load_from_checkpoint(path).eval()
        torch.testing.assert_close(
            model.model.forward_features(images), source.encoder.model.forward_features(images)
        )


@pytest.mark.slow
def test_it_learns(tmp_path: Path, pretrained: Path) -> None:
    options = {"warmup_epochs": 1, "drop_path_rate": 0.1, "layer_decay": 0.8}
    model = Classifier(weights=str(pretrained), base_lr=0.128, **options)
    run = quiet_trainer(tmp_path, max_epochs=8)
    run.fit(model, datamodule=Data())
    assert run.callback_metrics["val/top1"] > 0.9
    assert "val/top5" not in run.callback_metrics
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    again = Classifier.load_from_checkpoint(path)
    scores = quiet_trainer(tmp_path).validate(again, datamodule=Data(), verbose=False)[0]
    assert scores["val/top1"] == run.callback_metrics["val/top1"]
    rows = quiet_trainer(tmp_path).predict(again, datamodule=Data())
    assert torch.cat([row["probabilities"] for row in rows]).sum(1) == pytest.approx(np.ones(24))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_encoder(path).eval()(images), again.eval()(images))


def test_pictures_show_the_average_of_the_weights(tmp_path: Path, pretrained: Path) -> None:
    model = Classifier(weights=str(pretrained), ema_decay=0.5, base_lr=0.5, warmup_epochs=0)
    data = Data()
    run = quiet_trainer(tmp_path, max_steps=3, callbacks=[BoardPredictions(num_images=4)])
    run.fit(model, datamodule=data)
    with (tmp_path / "val_predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = torch.stack([data.images[int(row["path"])]["image"] for row in rows])
    shares = model.eval().predict_step({"image": images}, 0)["probabilities"].amax(1)  # the average
    found = torch.tensor([float(row["probability"]) for row in rows])
    torch.testing.assert_close(found, shares.detach(), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "kwargs",
    [
        VIT,
        {**VIT, "pooling": "token"},
        {**VIT, "pooling": "attention"},
        {**BEIT, "encoder_kwargs": {**BEIT["encoder_kwargs"], **OWN}},
        SWIN,
        {"encoder": "resnet18", "img_size": 32},
        {"encoder": "cait_xxs24_224", "img_size": 32, "encoder_kwargs": {"depth": 2}},
        {**VIT, "frozen": True, "layer": "all"},
        {**SWIN, "frozen": True, "layer": "all"},
        {**VIT, "frozen": True, "pooling": "attention", "batch_norm": True},
        {"encoder": "resnet18", "img_size": 32, "frozen": True, "pooling": "attention"},
    ],
)
def test_every_parameter_that_is_trained_has_a_gradient(kwargs: dict[str, Any]) -> None:
    model = Classifier(**kwargs, num_classes=3)
    logits = model.logits(torch.randn(2, 3, 32, 32))
    assert all(value.shape == (2, 3) for value in logits.values())
    assert len(logits) == (len(model.layers) + 1 if kwargs.get("layer") else 1)
    torch.stack([value.sum() for value in logits.values()]).sum().backward()
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert [name for name, gradient in trained if gradient is None] == []


def test_other_channels_and_sizes_are_adapted(pretrained: Path) -> None:
    source = SimMIM.load_from_checkpoint(pretrained).encoder.model
    gray = Classifier(weights=str(pretrained), in_chans=1, img_size=[32, 48], num_classes=3)
    assert gray(torch.randn(2, 1, 32, 48)).shape == (2, 3)
    torch.testing.assert_close(
        gray.model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True)
    )
    for options, words in (({"embed_dim": 64}, "embed_dim"), ({"num_heads": 4}, "attention heads")):
        with pytest.raises(ValueError, match=words):
            Classifier(weights=str(pretrained), encoder_kwargs=options)
    with pytest.raises(ValueError, match="class token"):
        Classifier(**SWIN, pooling="token")


# Loss, mixing, erasing -----------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    model = Classifier(**VIT, num_classes=3, label_smoothing=0.1)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(
        model.loss_of(logits, model.targets(labels)),
        F.cross_entropy(logits, labels, label_smoothing=0.1),
    )
    several = Classifier(**VIT, num_classes=3, multi_label=True)
    present = torch.tensor([[0, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(
        several.loss_of(logits[:2], several.targets(present), torch.tensor([1.0, 2.0, 3.0])),
        F.binary_cross_entropy_with_logits(
            logits[:2], present.float(), pos_weight=torch.tensor([1.0, 2.0, 3.0])
        ),
    )


def test_balanced_weights_by_hand(tmp_path: Path) -> None:
    weights = balanced_weights([6, 3, 1], multi_label=False, images=10)
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    several = balanced_weights([6, 3, 1], multi_label=True, images=10)
    torch.testing.assert_close(several, torch.tensor([4 / 6, 7 / 3, 9.0]))
    data = Data()
    data.class_counts = (6, 3, 1)
    model = Classifier(**VIT, class_weights="balanced")
    quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=data)
    torch.testing.assert_close(model.class_weights, weights)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_timms_and_depends_on_the_step_alone(mixup: float, cutmix: float) -> None:
    """With the same draws, images and smoothed targets of timm's own call."""
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 2, 1, 0])
    targets = Classifier(**VIT, num_classes=3, label_smoothing=0.1).targets(labels)
    mix, reference = Mixer(mixup, cutmix), Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=3)
    changed = 0
    for seed in range(8):
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        ours = mix(images, targets, seed)
        assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        torch.testing.assert_close(ours, reference(images.clone(), labels))
        changed += not torch.equal(ours[0], images)
    assert changed >= 6  # a rectangle can be empty


@pytest.mark.slow
def test_erasing_depends_on_the_sample_alone_and_draws_as_timm_does() -> None:
    """The share of images, the area, the shape and the noise; not the draws themselves."""
    n, size = 3000, 32
    keys, images = sample_keys(torch.arange(n), seed=0, epoch=0), torch.zeros(n, 3, size, size)
    ours = erase(images, keys, 0.5)
    assert torch.equal(erase(images[5:9], keys[5:9], 0.5), ours[5:9])
    random.seed(0)
    timms = RandomErasing(0.5, mode="pixel", device="cpu")(images.clone())
    found = []
    for erased in (ours, timms):
        mask = erased[:, 0] != 0
        mask = mask[mask.any((1, 2))]
        height, width = mask.any(2).sum(1).float(), mask.any(1).sum(1).float()
        assert torch.equal(mask.sum((1, 2)), (height * width).long())  # filled rectangles
        noise = erased[erased != 0]
        figures = [len(mask) / n, noise.mean(), noise.std()]
        for values in (height * width / size**2, (height / width).log(), height, width):
            figures += [values.mean(), values.std()]
        found.append(torch.tensor([float(figure) for figure in figures]))
    torch.testing.assert_close(found[0], found[1], rtol=0.06, atol=0.05)


# Metrics -------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    scores = Scores(5, multi_label=False)
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    predictions = torch.tensor([0, 1, 1, 2, 4, 4])
    logits = 10 * F.one_hot(predictions, 5).float()
    for part in (slice(0, 4), slice(4, 6)):
        found = scores.update(logits[part], labels[part], torch.tensor(float(part.start)))
    assert float(found["loss"].compute()) == pytest.approx(4 * 2 / 6)
    assert float(found["top1"].compute()) == pytest.approx(4 / 6)
    assert float(found["top5"].compute()) == 1
    confidence = float(logits[0].softmax(0).max())
    assert float(found["calibration_error"].compute()) == pytest.approx(
        confidence - 4 / 6, abs=1e-6
    )
    confusion = scores.take_confusion()
    assert confusion is not None
    assert confusion[0].tolist() == [1, 1, 0, 0, 0]
    assert class_accuracy(confusion).tolist() == [0.5, 1, 1, 0, 1]
    assert scores.take_confusion() is None


def test_several_labels_an_image(tmp_path: Path) -> None:
    class Both(Data):
        def __init__(self) -> None:
            super().__init__()
            self.images.labels = torch.stack([self.images.labels == i for i in range(3)], 1)
            self.images.labels[:, 2] |= self.images.labels[:, 0]

    model = Classifier(**VIT, multi_label=True, mixup=0.5, class_weights="balanced", base_lr=0.1)
    run = quiet_trainer(tmp_path)
    run.fit(model, datamodule=Both())
    found = run.callback_metrics
    assert {"val/loss", "val/mean_ap", "val/auroc", "val/f1", "val/ap_class/down"} <= set(found)
    assert "val/top1" not in found
    rows = torch.cat([batch["probabilities"] for batch in run.predict(model, datamodule=Both())])
    present = Both().images.labels.numpy()
    expected = [roc_auc_score(present[:, i], rows[:, i].numpy()) for i in range(3)]
    assert float(found["val/auroc"]) == pytest.approx(np.mean(expected), abs=1e-5)
    assert float(found["val/auroc_class/slanted"]) == pytest.approx(expected[2], abs=1e-5)
    table = class_rows(None, model.label_scores or {}, model.class_names)
    assert table[0] == ["class", "images", "ap", "auroc", "f1"]
    assert [row[:2] for row in table[1:]] == [["across", "8"], ["down", "8"], ["slanted", "16"]]


def test_a_label_that_no_image_has_is_no_zero() -> None:
    """torchmetrics counts it as an area of 0, which would lower the mean of the others."""
    scores = Scores(3, multi_label=True)
    present = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 1]])
    logits = torch.tensor([[2.0, 0, 1], [-1, 0, 1], [1, 0, 1]])
    scores.update(logits[:2], present[:2], torch.tensor(1.0))
    scores.update(logits[2:], present[2:], torch.tensor(1.0))
    found = scores.take_labels()
    assert found is not None
    assert found["images"].tolist() == [2, 0, 3]
    for metric in ("ap", "auroc", "f1"):
        assert float(found[metric][0]) == 1
        assert found[metric][1:].isnan().all()
    assert scores.take_labels() is None
    assert class_rows(None, found, ["a", "b", "c"])[2] == ["b", "0", "", "", ""]


def test_a_class_without_validation_images_is_no_zero(tmp_path: Path) -> None:
    class Two(Data):
        def val_dataloader(self) -> DataLoader[dict[str, Any]]:
            few = Subset(self.images, [i for i in range(24) if i % 3])
            return DataLoader(few, batch_size=8)

    model, run = Classifier(**VIT), quiet_trainer(tmp_path)
    run.fit(model, datamodule=Two())
    found = run.callback_metrics
    assert "val/top1_class/across" not in found
    shares = [float(found[f"val/top1_class/{name}"]) for name in ("down", "slanted")]
    assert float(found["val/top1_balanced"]) == pytest.approx(np.mean(shares))
    assert class_rows(model.confusion_matrix, {}, model.class_names)[1] == ["across", "0", "0", ""]
