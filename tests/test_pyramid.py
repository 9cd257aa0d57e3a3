"""A feature pyramid over any timm encoder: sizes, what is trained, and what is read."""

import pytest
import timm
import torch

from simmim.decoders.pyramid import Pyramid

SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}
ENCODERS = {  # name: its options, height and width, strides of the maps
    "vit_tiny_patch16_224": ({**SMALL, "img_size": 64}, (64, 64), [4, 8, 16, 32]),
    "vit_small_patch14_dinov2": ({**SMALL, "img_size": 56}, (56, 56), [3.5, 7, 14, 28]),
    "swin_tiny_patch4_window7_224": (
        {"img_size": (64, 96), "window_size": 2, "depths": [1, 1, 1, 1], "embed_dim": 24},
        (64, 96),
        [4, 8, 16, 32],
    ),
    "test_convnext": ({}, (64, 96), [4, 8, 16, 32]),
    "test_resnet": ({}, (64, 64), [4, 8, 16, 32]),
    "xcit_nano_12_p16_224": ({"img_size": 64, "depth": 4}, (64, 64), [4, 8, 16, 32]),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_maps_have_the_sizes_that_are_announced_and_all_that_is_trained_a_gradient(
    name: str,
) -> None:
    options, size, strides = ENCODERS[name]
    model = timm.create_model(name, num_classes=0, **options)
    for spread in (False, True):
        pyramid = Pyramid(model, name, 3, size, spread=spread)
        maps = pyramid(pyramid.read(model, torch.randn(2, 3, *size)))
        assert pyramid.strides == strides
        assert [m.shape[1] for m in maps] == pyramid.channels
        assert [tuple(m.shape[2:]) for m in maps] == [
            (int(size[0] / stride), int(size[1] / stride)) for stride in strides
        ]
    weights = [torch.randn_like(m) for m in maps]
    sum((m * w).sum() for m, w in zip(maps, weights, strict=True)).backward()  # type: ignore[union-attr]
    for owner in (model, pyramid):
        for parameter_name, parameter in owner.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    assert any(p.requires_grad for p in model.parameters())


def test_a_plain_transformer_is_read_in_its_last_block_or_in_each_quarter() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=64, **{**SMALL, "depth": 12}
    )
    last = Pyramid(model, "vit", 3, (64, 64))
    spread = Pyramid(model, "vit", 3, (64, 64), spread=True)
    assert last.layers == [11, 11, 11, 11]
    assert spread.layers == [2, 5, 8, 11]
    images = torch.randn(1, 3, 64, 64)
    blocks = model.forward_intermediates(images, intermediates_only=True)
    for found, layer in zip(spread.read(model, images), spread.layers, strict=True):
        assert torch.equal(found, blocks[layer])


def test_a_small_map_is_not_pooled_away() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **SMALL)
    pyramid = Pyramid(model, "vit", 3, (16, 16))
    maps = pyramid(pyramid.read(model, torch.randn(1, 3, 16, 16)))
    assert [m.shape[-1] for m in maps] == [4, 2, 1, 1]


def test_building_leaves_mode_weights_and_frozen_parameters_as_they_were() -> None:
    model = timm.create_model("test_resnet", num_classes=0).train()
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Pyramid(model, "test_resnet", 3, (64, 64))
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_middle_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="gives no middle layers"):
        Pyramid(torch.nn.Identity(), "identity", 3, (64, 64))
