"""The classifier: its learning rates by hand, frozen means frozen, mixing, metrics, checkpoints."""

import csv
import math
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

from simmim.augment import Mixer, erase
from simmim.callbacks.classification import class_rows
from simmim.callbacks.predictions import BoardPredictions
from simmim.classify import Classifier
from simmim.masking import sample_keys
from simmim.pretrain import SimMIM
from simmim.scores import Scores, balanced_weights, class_accuracy
from support.training import quiet_trainer

VIT: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "img_size": 32,
    "encoder_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}
BEIT: dict[str, Any] = {**VIT, "encoder": "beit_base_patch16_224"}
SWIN: dict[str, Any] = {
    "encoder": "swin_tiny_patch4_window7_224",
    "img_size": 32,
    "encoder_kwargs": {
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
    },
}
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


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a pretrained plain ViT."""
    return _pretrain(tmp_path_factory.mktemp("pretrained"), VIT)


def _pretrain(folder: Path, encoder: dict[str, Any]) -> Path:
    torch.manual_seed(4)
    model = SimMIM(**encoder, mask_patch_size=8)
    model.set_statistics([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    run = quiet_trainer(folder)
    run.fit(model, DataLoader(Stripes(8), 4))
    run.save_checkpoint(folder / "pretrained.ckpt")
    return folder / "pretrained.ckpt"


# Learning rates ------------------------------------------------------------------------------


def test_the_layer_decay_of_a_two_block_vit_by_hand(tmp_path: Path) -> None:
    model = Classifier(**VIT, layer_decay=0.5, base_lr=5.12, warmup_epochs=0, min_lr=0)
    run = quiet_trainer(tmp_path, max_steps=1)
    run.fit(model, datamodule=Data())
    # Embedding, two blocks, head: levels 0 to 3. lr 5.12 x 8 images / 512 = 0.08 at the top.
    lr = {0: 0.01, 1: 0.02, 2: 0.04, 3: 0.08}
    # 32 wide: patch 8 x 8 x 3 x 32; qkv, projection, MLP of 128: 12 x 32^2 weights a block.
    expected = {
        "layer_0_decay": (lr[0], 0.05, 6144),
        "layer_0_no_decay": (lr[0], 0.0, 32 + 32 + 17 * 32),  # bias, class token, positions
        "layer_1_decay": (lr[1], 0.05, 12288),
        "layer_1_no_decay": (lr[1], 0.0, 4 * 32 + 96 + 32 + 128 + 32),
        "layer_2_decay": (lr[2], 0.05, 12288),
        "layer_2_no_decay": (lr[2], 0.0, 4 * 32 + 96 + 32 + 128 + 32),
        "layer_3_decay": (lr[3], 0.05, 96),
        "layer_3_no_decay": (lr[3], 0.0, 64 + 3),  # fc_norm and bias
    }
    found = {
        group["name"]: (
            pytest.approx(group["initial_lr"]),
            group["weight_decay"],
            sum(p.numel() for p in group["params"]),
        )
        for group in run.optimizers[0].param_groups
    }
    assert found == expected


def test_the_layer_decay_of_a_two_stage_swin_by_hand(tmp_path: Path) -> None:
    model = Classifier(**SWIN, layer_decay=0.5, base_lr=512 / 8, warmup_epochs=0, min_lr=0)
    rates: dict[str, float] = {}

    class Keep(L.Callback):
        def on_train_batch_start(self, run: L.Trainer, module: Any, *args: Any) -> None:
            names = {p: name for name, p in module.model.named_parameters()}
            for group in run.optimizers[0].param_groups:
                rates.update({names[p]: group["lr"] for p in group["params"]})

    quiet_trainer(tmp_path, max_steps=1, callbacks=[Keep()]).fit(model, datamodule=Data())
    # Embedding, four blocks, head: levels 0 to 5, the top 1. The downsampling before the second
    # stage goes with the last block of the first, as in the official code.
    expected = {
        "patch_embed.proj.weight": 1 / 32,
        "layers.0.blocks.0.mlp.fc1.weight": 1 / 16,
        "layers.0.blocks.1.mlp.fc1.weight": 1 / 8,
        "layers.1.downsample.reduction.weight": 1 / 8,
        "layers.1.blocks.0.attn.relative_position_bias_table": 1 / 4,
        "layers.1.blocks.1.mlp.fc2.bias": 1 / 2,
        "norm.weight": 1,
        "head.fc.weight": 1,
        "head.fc.bias": 1,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


DEEP = {"depths": [1, 2, 1, 1], "window_size": 2, "embed_dim": 8, "num_heads": [1, 1, 1, 1]}
LEVELS: dict[str, tuple[dict[str, Any], int, dict[str, tuple[int, bool]]]] = {
    # options, level of the head, {parameter: (its level, whether it decays)}
    "beit": (
        {**BEIT, "encoder_kwargs": {**BEIT["encoder_kwargs"], **OWN}},
        3,
        {
            "cls_token": (0, False),
            "patch_embed.proj.weight": (0, True),
            "patch_embed.proj.bias": (0, False),
            "blocks.0.attn.relative_position_bias_table": (1, False),
            "blocks.0.attn.qkv.weight": (1, True),
            "blocks.0.gamma_1": (1, False),
            "blocks.1.attn.q_bias": (2, False),
            "blocks.1.mlp.fc2.weight": (2, True),
            "fc_norm.weight": (3, False),
            "head.weight": (3, True),
        },
    ),
    "swinv2": (
        {"encoder": "swinv2_tiny_window8_256", "img_size": 64, "encoder_kwargs": DEEP},
        6,
        {
            "patch_embed.norm.weight": (0, False),
            "layers.0.blocks.0.attn.qkv.weight": (1, True),
            "layers.1.downsample.reduction.weight": (1, True),  # with the last block before it
            "layers.1.blocks.0.attn.logit_scale": (2, False),
            "layers.1.blocks.1.attn.cpb_mlp.0.weight": (3, False),
            "layers.2.downsample.norm.weight": (3, False),
            "layers.3.downsample.reduction.weight": (4, True),
            "layers.3.blocks.0.mlp.fc1.weight": (5, True),
            "norm.weight": (6, False),
            "head.fc.weight": (6, True),
        },
    ),
    "convnext": (
        {
            "encoder": "convnext_atto",
            "img_size": 64,
            "encoder_kwargs": {"depths": [1, 2, 1, 1], "dims": [8, 8, 8, 8]},
        },
        6,
        {
            "stem.0.weight": (0, True),
            "stages.0.blocks.0.conv_dw.weight": (1, True),
            "stages.1.downsample.1.weight": (2, True),  # timm: with the first block behind it
            "stages.1.blocks.0.norm.bias": (2, False),
            "stages.1.blocks.1.mlp.fc2.weight": (3, True),
            "stages.3.blocks.0.mlp.fc1.weight": (5, True),
            "head.norm.weight": (6, False),
            "head.fc.weight": (6, True),
        },
    ),
}


@pytest.mark.parametrize("family", LEVELS)
def test_the_layer_decay_of_a_family_at_several_steps(tmp_path: Path, family: str) -> None:
    """Warm-up over 2 of 6 steps, then a cosine; each block at its share of it, at every step."""
    options, top, expected = LEVELS[family]
    model = Classifier(
        **options,
        layer_decay=0.5,
        base_lr=64,
        warmup_epochs=1,
        warmup_lr=0,
        min_lr=0,
        num_classes=3,
    )
    seen: list[dict[str, tuple[float, float]]] = []

    class Keep(L.Callback):
        def on_train_batch_start(self, run: L.Trainer, module: Any, *args: Any) -> None:
            names = {p: name for name, p in module.model.named_parameters()}
            groups = run.optimizers[0].param_groups
            seen.append(
                {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
            )

        def on_before_optimizer_step(self, run: L.Trainer, module: Any, *args: Any) -> None:
            module.zero_grad()  # such a rate would end in not-a-number

    data = Data(16, batch_size=8)
    if options["img_size"] == 64:
        data.images.images = F.interpolate(data.images.images.float(), 64).byte()
    run = quiet_trainer(tmp_path, max_epochs=3, callbacks=[Keep()], limit_val_batches=0)
    run.fit(model, datamodule=data)
    cosine = [0.5 * (1 + math.cos(math.pi * t / 6)) for t in range(6)]
    curve = [0, 0.5, *cosine[2:]]  # the top is 64 x 8 / 512 = 1
    assert len(seen) == 6
    for step, peak in zip(seen, curve, strict=True):
        for name, (level, decays) in expected.items():
            scale = 0.5 ** (top - level)
            assert step[name] == pytest.approx((peak * scale, 0.05 * decays)), name


def test_the_table_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        model = Classifier(**VIT, layer_decay=0.5, base_lr=5.12)
        quiet_trainer(tmp_path, max_steps=1).fit(model, datamodule=Data())
    assert "layer_2_decay          0.04          0.05       12,288" in caplog.text
    assert "from scratch" in caplog.text


# Probes --------------------------------------------------------------------------------------


def test_a_frozen_encoder_stays_bitwise_as_it_was(tmp_path: Path, pretrained: Path) -> None:
    model = Classifier(weights=str(pretrained), frozen=True, batch_norm=True, base_lr=1)
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    modes = []

    class Keep(L.Callback):
        def on_train_batch_end(self, run: L.Trainer, module: Any, *args: Any) -> None:
            modes.append((module.model.training, module.heads.training))

    run = quiet_trainer(tmp_path, max_epochs=2, callbacks=[Keep()])
    run.fit(model, datamodule=Data())
    assert set(modes) == {(False, True)}
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    optimised = sum(p.numel() for group in run.optimizers[0].param_groups for p in group["params"])
    assert optimised == 32 * 3 + 3


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


@pytest.mark.parametrize("family", [SWIN, {"encoder": "resnet18", "img_size": 32}])
@pytest.mark.parametrize("kwargs", [{}, {"layer": "all"}, {"pooling": "attention"}])
def test_a_probe_of_any_family(family: dict[str, Any], kwargs: dict[str, Any]) -> None:
    model = Classifier(**family, frozen=True, num_classes=3, **kwargs).eval()
    logits = model.logits(torch.randn(2, 3, 32, 32))
    assert all(value.shape == (2, 3) for value in logits.values())
    assert len(logits) == (len(model.layers) + 1 if kwargs.get("layer") else 1)


# Fine-tuning ---------------------------------------------------------------------------------


def test_the_fine_tuned_vit_of_the_paper(tmp_path: Path) -> None:
    """Per-block copies of the shared table, mean of the patch tokens, no pretraining norm."""
    kwargs = {**BEIT["encoder_kwargs"], **SHARED, "global_pool": ""}
    path = _pretrain(tmp_path, {**BEIT, "encoder_kwargs": kwargs})
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
    path = _pretrain(
        tmp_path, {**bare, "encoder_kwargs": {**bare["encoder_kwargs"], "global_pool": ""}}
    )
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


def test_it_learns_and_opens_safely(tmp_path: Path, pretrained: Path) -> None:
    model = Classifier(
        weights=str(pretrained), base_lr=0.128, warmup_epochs=1, drop_path_rate=0.1, layer_decay=0.8
    )
    run = quiet_trainer(tmp_path, max_epochs=8)
    run.fit(model, datamodule=Data())
    assert run.callback_metrics["val/top1"] > 0.9
    assert "val/top5" not in run.callback_metrics
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.4, 0.5, 0.6]))  # pretraining's
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    assert torch.load(path, weights_only=True)["classes"] == list(Data.classes)
    again = Classifier.load_from_checkpoint(path)
    assert again.classes == list(Data.classes)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    scores = quiet_trainer(tmp_path).validate(again, datamodule=Data(), verbose=False)[0]
    assert scores["val/top1"] == run.callback_metrics["val/top1"]
    rows = quiet_trainer(tmp_path).predict(again, datamodule=Data())
    assert torch.cat([row["probabilities"] for row in rows]).sum(1) == pytest.approx(np.ones(24))

    from simmim import load_encoder

    timm_model = load_encoder(path).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(timm_model(images), again.eval()(images))
    onward = Classifier(weights=str(path))  # its classifier comes along
    torch.testing.assert_close(onward.eval()(images), again(images))
    other = Data()
    other.classes = ("up", "down", "sideways")
    with pytest.raises(ValueError, match="across"):
        quiet_trainer(tmp_path).validate(onward, datamodule=other, verbose=False)
    inherited = onward.model.head.weight.detach().flatten()
    quiet_trainer(tmp_path, max_steps=1).fit(onward.train(), datamodule=other)
    assert onward.classes == ["up", "down", "sideways"]
    new = onward.model.head.weight.detach().flatten()
    assert torch.corrcoef(torch.stack([new, inherited]))[0, 1].abs() < 0.5


def test_the_average_of_the_weights_is_kept(tmp_path: Path, pretrained: Path) -> None:
    model = Classifier(weights=str(pretrained), ema_decay=0.5, base_lr=0.5, warmup_epochs=0)
    seen: list[Tensor] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, run: L.Trainer, module: Any, *args: Any) -> None:
            seen.append(module.model.head.bias.detach().clone())

    run = quiet_trainer(tmp_path, max_steps=3, callbacks=[Keep()], limit_val_batches=0)
    run.fit(model, datamodule=Data())
    # The first update copies; then half of the average and half of the weights.
    expected = 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]
    torch.testing.assert_close(model.model.head.bias.detach(), expected)


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


def test_going_on_at_an_epochs_end_is_bitwise_the_same(tmp_path: Path) -> None:
    def fit(folder: Path, stop: int, ckpt: str | None = None) -> dict[str, Tensor]:
        class Stop(L.Callback):
            def on_train_epoch_end(self, run: L.Trainer, module: L.LightningModule) -> None:
                run.should_stop = run.current_epoch + 1 >= stop
                if run.should_stop:  # at the end of fit the average takes the weights' place
                    run.save_checkpoint(folder / "end.ckpt")

        torch.manual_seed(0)
        model = Classifier(
            **VIT,
            drop_path_rate=0.2,
            mixup=0.8,
            cutmix=1.0,
            random_erasing=0.5,
            ema_decay=0.9,
            base_lr=0.1,
            warmup_epochs=1,
        )
        run = quiet_trainer(folder, max_epochs=4, callbacks=[Stop()])
        run.fit(model, datamodule=Data(), ckpt_path=ckpt)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "half", 2)
    rest = fit(tmp_path / "rest", 4, str(tmp_path / "half" / "end.ckpt"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, rest[name]), name


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
        {**VIT, "frozen": True, "pooling": "attention", "batch_norm": True},
    ],
    ids=[
        "mean",
        "token",
        "attention",
        "beit",
        "swin",
        "resnet",
        "cait",
        "sweep",
        "attentive probe",
    ],
)
def test_every_parameter_that_is_trained_has_a_gradient(
    tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    model = Classifier(**kwargs)
    without: list[str] = []

    class Look(L.Callback):
        def on_after_backward(self, run: L.Trainer, module: L.LightningModule) -> None:
            named = module.named_parameters()
            without.extend(name for name, p in named if p.requires_grad and p.grad is None)

    quiet_trainer(tmp_path, max_steps=1, callbacks=[Look()], limit_val_batches=0).fit(
        model, datamodule=Data()
    )
    assert without == []


def test_other_channels_and_sizes_are_adapted(pretrained: Path) -> None:
    source = SimMIM.load_from_checkpoint(pretrained).encoder.model
    gray = Classifier(weights=str(pretrained), in_chans=1, img_size=[32, 48], num_classes=3)
    assert gray(torch.randn(2, 1, 32, 48)).shape == (2, 3)
    torch.testing.assert_close(
        gray.model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True)
    )
    with pytest.raises(ValueError, match="embed_dim"):
        Classifier(weights=str(pretrained), encoder_kwargs={"embed_dim": 64})
    with pytest.raises(ValueError, match="attention heads"):
        Classifier(weights=str(pretrained), encoder_kwargs={"num_heads": 4})
    with pytest.raises(ValueError, match="does not exist"):
        Classifier(weights="nowhere/at/all.ckpt")


@pytest.mark.parametrize("kwargs", [{}, {"pooling": "attention"}, {"frozen": True, "layer": "all"}])
def test_any_classifier_is_a_source_of_weights(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    """Its encoder comes along; its classifier, probe or attention for other classes does not."""
    model = Classifier(**VIT, **kwargs, base_lr=1, warmup_epochs=0)
    run = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(model, datamodule=Data())
    run.save_checkpoint(path := tmp_path / "first.ckpt")
    for later in ({}, {"frozen": True, "layer": 1}, {"in_chans": 1, "img_size": 48}):
        onward = Classifier(weights=str(path), num_classes=5, **later)
        assert onward.num_classes == 5
        name = "blocks.0.attn.qkv.weight"
        assert torch.equal(onward.model.get_parameter(name), model.model.get_parameter(name))
        assert not onward.head_is_trained
        if "fc_norm.weight" in model.model.state_dict() and later.get("frozen"):
            assert torch.equal(onward.model.norm.bias, model.model.fc_norm.bias)


def test_an_untrained_classifier_gives_no_answers(tmp_path: Path, pretrained: Path) -> None:
    model = Classifier(weights=str(pretrained))
    with pytest.raises(ValueError, match="not trained yet"):
        quiet_trainer(tmp_path).validate(model, datamodule=Data(), verbose=False)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    model = Classifier(**VIT)
    run = quiet_trainer(tmp_path)
    run.fit(model, datamodule=Data())
    data = Data()
    data.classes = ("across", "up", "slanted")
    sentence = "the data has the classes across, up, slanted, this classifier knows across, down"
    with pytest.raises(ValueError, match=sentence):
        run.validate(model, datamodule=data, verbose=False)
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=sentence):
        quiet_trainer(tmp_path).validate(Classifier(**VIT), datamodule=data, ckpt_path=path)
    data.classes = ("up", "down")
    with pytest.raises(ValueError, match="the data has the classes up, down, this classifier"):
        quiet_trainer(tmp_path).validate(Classifier(**VIT), datamodule=data, ckpt_path=path)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"layer": 3, "frozen": True}, "use 1 to 2"),
        ({"layer": 1}, "frozen"),
        ({"batch_norm": True}, "frozen"),
        ({"layer_decay": 0.5, "frozen": True}, "layer_decay"),
        ({"layer_decay": 2.0}, "layer_decay 2.0"),
        ({"mixup": -1.0}, "mixup -1.0"),
        ({"num_classes": 1}, "num_classes 1"),
        ({**SWIN, "pooling": "token"}, "class token"),
    ],
)
def test_impossible_choices_are_refused_in_one_sentence(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Classifier(**{**VIT, **kwargs})
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixing_depends_on_the_step_alone(mixup: float, cutmix: float) -> None:
    images, targets = torch.randn(5, 3, 8, 8), torch.eye(5)
    mix = Mixer(mixup, cutmix)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = mix(images, targets, seed=7)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(99)  # noqa: NPY002
    again, other = mix(images, targets, seed=7), mix(images, targets, seed=8)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    mixed, soft = first
    share = soft[0, 0]
    if not cutmix:
        torch.testing.assert_close(mixed, images * share + images.flip(0) * (1 - share))
    torch.testing.assert_close(soft, targets * share + targets.flip(0) * (1 - share))
    kept = (mixed == images).float().mean((1, 2, 3))[[0, 1, 3, 4]]
    if not mixup:
        torch.testing.assert_close(kept, share.expand(4))  # area = share


def test_erasing_depends_on_the_sample_alone() -> None:
    images = torch.zeros(2000, 1, 16, 16)
    keys = sample_keys(torch.arange(2000), seed=0, epoch=0)
    erased = erase(images, keys, 0.25)
    assert torch.equal(erase(images[5:9], keys[5:9], 0.25), erased[5:9])
    touched = (erased != 0).flatten(1)
    chosen = touched.any(1)
    assert float(chosen.float().mean()) == pytest.approx(0.25, abs=0.03)
    area = touched[chosen].float().mean(1)
    assert 0.01 < area.min() < area.max() < 0.36
    assert float(area.mean()) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)  # uniform in area
    noise = erased[erased != 0]
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    for mask in (erased[chosen][:20, 0] != 0).unbind():  # a filled rectangle
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_timms(mixup: float, cutmix: float) -> None:
    """With the same draws, images and smoothed targets of timm's own call."""
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 2, 1, 0])
    model = Classifier(**VIT, num_classes=3, label_smoothing=0.1)
    reference = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=3)
    changed = 0
    for seed in range(8):
        ours = Mixer(mixup, cutmix)(images, model.targets(labels), seed)
        np.random.seed(seed)  # noqa: NPY002
        theirs = reference(images.clone(), labels)
        torch.testing.assert_close(ours, theirs)
        changed += not torch.equal(ours[0], images)
    assert changed >= 6  # a rectangle can be empty


def test_erasing_draws_as_timm_does() -> None:
    """The share of images, the area, the shape and the noise; not the draws themselves."""
    n, size = 3000, 32
    ours = erase(torch.zeros(n, 3, size, size), sample_keys(torch.arange(n), 0, 0), 0.5)
    random.seed(0)
    timms = RandomErasing(0.5, mode="pixel", device="cpu")(torch.zeros(n, 3, size, size))
    found = []
    for images in (ours, timms):
        mask = images[:, 0] != 0
        mask = mask[mask.any((1, 2))]
        height, width = mask.any(2).sum(1).float(), mask.any(1).sum(1).float()
        noise = images[images != 0]
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
