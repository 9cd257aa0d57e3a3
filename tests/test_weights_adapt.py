"""Encoders for another size, other channels or classes: adapted by rule, or refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from simmim.classify import Classifier
from simmim.pretrain import SimMIM
from simmim.weights import load_encoder
from simmim.weights.backbone import open_backbone
from simmim.weights.fit import Architecture
from simmim.weights.sources import build_encoder

VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN: dict[str, Any] = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
CONVNEXT: dict[str, Any] = {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
STEMS: dict[str, tuple[str, dict[str, Any], int]] = {  # where the image goes in
    "patch_embed.proj": ("vit_tiny_patch16_224", VIT, 32),
    "stem.0": ("convnext_atto", CONVNEXT, 32),
    "conv1.0": ("resnet10t", {}, 32),
    "conv_stem": ("mobilenetv3_small_050", {}, 32),
}


def checkpoint(
    folder: Path, encoder: str, chans: int = 3, size: int = 32, **kwargs: Any
) -> tuple[Path, Any]:
    """A checkpoint that names an encoder as ours do, and the model in it."""
    model: Any = build_encoder(Architecture(encoder, size, chans), {"num_classes": 0, **kwargs})
    state = {f"encoder.model.{name}": tensor for name, tensor in model.state_dict().items()}
    hparams = {
        "encoder": encoder,
        "img_size": size,
        "in_chans": chans,
        "encoder_kwargs": kwargs,
        "num_classes": kwargs.get("num_classes"),
    }
    path = folder / "x.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": hparams}, path)
    return path, model.eval()


# Size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "kwargs", "size", "said"),
    [
        ("vit_tiny_patch16_224", {**VIT, "patch_size": 8}, 33, "33 .* 8 pixels .*: use 32 or 40"),
        ("vit_tiny_patch16_224", VIT, [32, 47], "47 .* 4 pixels .*: use 44 or 48"),
        ("swin_tiny_patch4_window7_224", SWIN, 35, "35 .* 4 pixels .*: use 32 or 36"),
    ],
)
def test_a_size_of_which_pixels_would_be_left_out_is_refused(
    encoder: str, kwargs: dict[str, Any], size: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=f"img_size {said}"):
        open_backbone(None, encoder, size, encoder_kwargs=kwargs)


def test_timms_own_padding_takes_any_size() -> None:
    options = {**VIT, "dynamic_img_size": True, "dynamic_img_pad": True}
    model = open_backbone(None, "vit_tiny_patch16_224", 33, encoder_kwargs=options).model
    assert model.forward_features(torch.zeros(1, 3, 33, 33)).shape[1] == 9 * 9 + 1


# Channels ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_other_channels_take_the_weights_that_see_the_same(stem: str, tmp_path: Path) -> None:
    encoder, kwargs, size = STEMS[stem]
    gray = torch.randn(2, 1, size, size)
    equal = gray.expand(-1, 3, -1, -1)
    path, one = checkpoint(tmp_path, encoder, 1, size, **kwargs)
    three: Any = load_encoder(path, in_chans=3).eval()
    assert three.get_submodule(stem).weight.shape[1] == 3
    torch.testing.assert_close(three(equal), one(gray))
    path, three = checkpoint(tmp_path, encoder, 3, size, **kwargs)
    one = load_encoder(path, in_chans=1).eval()
    torch.testing.assert_close(one(gray), three(equal))
    four: Any = load_encoder(path, in_chans=4)  # the fourth takes the first one's weights
    colour = three.get_submodule(stem).weight
    expected = torch.cat([colour, colour[:, :1]], 1) * 3 / 4
    assert torch.equal(four.get_submodule(stem).weight, expected)
    assert not four.report.missing


def test_channels_without_a_rule_are_refused(tmp_path: Path) -> None:
    path, four = checkpoint(tmp_path, "convnext_atto", 4, **CONVNEXT)
    words = r"has weights for 4 channels.*of 6: use in_chans 4, or 1 for their sum"
    with pytest.raises(ValueError, match=words) as error:
        load_encoder(path, in_chans=6)
    assert "\n" not in str(error.value)
    one: Any = load_encoder(path, in_chans=1)
    assert torch.equal(one.stem[0].weight, four.stem[0].weight.sum(1, keepdim=True))


def test_a_task_on_other_channels_takes_other_statistics(tmp_path: Path) -> None:
    model = SimMIM("vit_tiny_patch16_224", 32, encoder_kwargs=VIT, mask_patch_size=8)
    model.set_statistics([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    assert open_backbone(str(path)).statistics == (
        pytest.approx([0.1, 0.2, 0.3]),
        pytest.approx([0.4, 0.5, 0.6]),
    )
    assert open_backbone(str(path), in_chans=4).statistics is None  # the data's


# Sizes -------------------------------------------------------------------------------------------


def test_a_larger_image_needs_no_other_weights_of_swin_and_convnext(tmp_path: Path) -> None:
    path, first = checkpoint(tmp_path, "swin_tiny_patch4_window7_224", **SWIN)
    second: Any = load_encoder(path, img_size=64)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert second(torch.randn(1, 3, 64, 64)).shape == (1, 24)
    path, first = checkpoint(tmp_path, "convnext_atto", **CONVNEXT)
    images = torch.randn(1, 3, 64, 96)
    second = load_encoder(path, img_size=[64, 96]).eval()
    assert torch.equal(second(images), first(images))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "kwargs", "name"),
    [
        ("mixer_s32_224", {}, "mlp_tokens"),
        ("hiera_tiny_224", {"embed_dim": 24, "stages": [1, 1, 1, 1]}, "pos_embed"),
    ],
)
def test_sizes_without_a_rule_are_refused(
    encoder: str, kwargs: dict[str, Any], name: str, tmp_path: Path
) -> None:
    path, first = checkpoint(tmp_path, encoder, size=64, **kwargs)
    again: Any = load_encoder(path).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images), first(images))
    with pytest.raises(
        ValueError, match=rf"{name}.* of shape .*build it as {encoder} of img_size 64"
    ):
        load_encoder(path, img_size=96)


# Classes -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "kwargs"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("convnext_atto", CONVNEXT),
    ],
)
def test_a_classifier_gives_its_encoder_and_learns_other_classes(
    encoder: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    path, first = checkpoint(tmp_path, encoder, **kwargs, num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    whole: Any = load_encoder(path).eval()
    assert torch.equal(whole(images), first(images))
    bare: Any = load_encoder(path, num_classes=0).eval()
    assert torch.equal(bare.forward_features(images), first.forward_features(images))
    assert set(bare.report.dropped.values()) == {"the classifier of other classes"}
    other = open_backbone(str(path), classifier=3)
    assert other.model(images).shape == (2, 3)
    assert set(other.report.missing.values()) == {"the head begins anew"}  # type: ignore[union-attr]
    assert torch.equal(other.model.eval().forward_features(images), first.forward_features(images))


def test_timms_own_weights_know_no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model

    def create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return original(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    model = Classifier("timm:vit_tiny_patch16_224", img_size=32, encoder_kwargs=VIT, num_classes=3)
    assert model.classes == []
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
