"""One small model of each family of timm: the same mechanism serves them all."""

from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

from simmim.encoder import Encoder
from simmim.masking import upsample_mask


class Family(NamedTuple):
    name: str
    img_size: int
    cell: int
    options: dict[str, Any]


def family(name: str, img_size: int = 64, cell: int = 32, **options: Any) -> Family:
    return Family(name, img_size, cell, options)


TINY = {"embed_dim": 32, "num_heads": 2, "depth": 2}
SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
FAST = [  # the usual ways in which an encoder takes the image in
    family("vit_tiny_patch16_224", **TINY),  # a class token
    family("swin_tiny_patch4_window7_224", **SWIN),
    family("test_resnet"),
]
SLOW = [  # what else sets families apart
    family("beit_base_patch16_224", **TINY, use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    family("vit_small_patch16_dinov3", **TINY),  # rotary positions
    family("swinv2_tiny_window8_256", **SWIN),
    family("hiera_tiny_224", embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),  # its stem overlaps
    family("test_convnext"),
    family("test_efficientnet"),
    family("test_maxvit"),
    family("xcit_nano_12_p8_224", depth=2, embed_dim=32, num_heads=2),  # class attention
    family("vgg11", mlp_ratio=0.01),  # no stem of its own
]
EXHAUSTIVE = [
    family("cait_xxs24_224", **TINY),
    family("mobilenetv3_small_050"),
    family("poolformer_s12"),
    family("halonet26t", 256),
    family("test_byobnet"),
    family("coat_lite_tiny"),
    family("convit_tiny", depth=3, embed_dim=32, num_heads=2, local_up_to_layer=2),
    family("convmixer_768_32", 56, 28),
    family("convnextv2_atto", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    family("cpubone_nano"),
    family("csatv2", 128, 64),
    family("cs3darknet_focus_s"),
    family("cspnext_tiny"),
    family(
        "davit_tiny",
        embed_dims=(16, 16, 32, 32),
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        window_size=2,
    ),
    family("deepseek_vit_412m", 84, 42, **TINY),
    family("deit_tiny_distilled_patch16_224", **TINY),
    family("deit3_small_patch16_224", **TINY),
    family("densenet121", block_config=(2, 2, 2, 2)),
    family("dla34"),
    family("dpn68"),
    family("edgenext_xx_small"),
    family("efficientformer_l1", 224),
    family("efficientformerv2_s0"),
    family("efficientvit_b0"),
    family("efficientvit_m0", 128),
    family("eva02_tiny_patch14_224", 56, 28, **TINY),
    family("fasternet_t0"),
    family("fastvit_t8"),
    family("focalnet_tiny_srf"),
    family("gcvit_xxtiny"),
    family("gemma4_vit_167m", 96, 48, **TINY, head_dim=16, intermediate_size=64),
    family("ghostnet_050"),
    family("hardcorenas_a"),
    family("hgnetv2_b0", 128),
    family("sam2_hiera_tiny", embed_dim=16),
    family("hrnet_w18_small"),
    family("iformer_t"),
    family("inception_next_atto"),
    family("lcnetv2_small"),
    family("levit_128s", 128),
    family("lowformer_b0"),
    family("test_mambaout"),
    family("test_coatnet"),
    family("caformer_s18"),
    family("gmlp_ti16_224"),
    family("mixer_s16_224"),
    family("mobilenetv4_conv_small_050"),
    family("mobilenetv5_base"),
    family("mobilevit_xxs"),
    family("mobilevitv2_050"),
    family("mvitv2_tiny"),
    family("naflexvit_base_patch16_siglip", **TINY),
    family("nest_tiny"),
    family("nextvit_small"),
    family("test_nfnet"),
    family("pvt_v2_b0"),
    family("qwen3_vit_88m", 128, 64, **TINY),
    family("rdnet_tiny"),
    family("regnety_002"),
    family("repghostnet_050"),
    family("repvit_m1"),
    family("res2net50_14w_8s"),
    family("resnest14d"),
    family("resnetv2_18"),
    family("rexnet_100"),
    family("selecsls42", 128, 64),
    family("legacy_seresnet18"),
    family(
        "sequencer2d_s",
        56,
        28,
        layers=(1, 1, 1, 1),
        embed_dims=(16, 32, 32, 32),
        hidden_sizes=(8, 16, 16, 16),
    ),
    family("shvit_s1", 128),
    family("skresnet18"),
    family("starnet_s1"),
    family("swiftformer_xs"),
    family("swinv2_cr_tiny_224", **SWIN),
    family("tiny_vit_5m_224"),
    family("tnt_s_patch16_224", embed_dim=32, depth=2, num_heads_outer=2),
    family("tresnet_m"),
    family(
        "twins_svt_small", embed_dims=(16, 32, 32, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
    ),
    family("visformer_tiny"),
    family("test_vit"),
    family("test_vit4"),
    family("vit_tiny_r_s16_p8_224", **TINY),
    family("test_vit_relpos"),
    family("samvit_base_patch16", **TINY, window_size=2, global_attn_indexes=(1,)),
    family("vit_small_patch14_reg4_dinov2", 56, 28, **TINY),
    family("vit_base_patch16_siglip_224", **TINY),
    family("vitamin_small_224", depth=2),
    family("volo_d1_224"),
    family("ese_vovnet19b_slim_dw"),
    family("xception41"),
    family("legacy_xception"),
]


@pytest.fixture(
    scope="module",
    params=[
        *FAST,
        *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW),
        *(pytest.param(f, marks=pytest.mark.exhaustive) for f in EXHAUSTIVE),
    ],
    ids=lambda family: family.name,
)
def built(request: pytest.FixtureRequest) -> Encoder:
    name, img_size, cell, options = request.param
    if not timm.is_model(name):
        pytest.skip(f"this version of timm has no {name}")
    torch.manual_seed(0)
    return Encoder(name, img_size, mask_patch_size=cell, **options)


@pytest.fixture
def encoder(built: Encoder) -> Encoder:
    return deepcopy(built).eval()


def draw(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Two images and their masks: part of each hidden, and neither like the other."""
    height, width = encoder.mask_grid
    mask = torch.rand(2, height, width) < 0.5
    mask[:, 0, 0], mask[0, -1, -1], mask[1, -1, -1], mask[1, 0, -1] = False, True, False, True
    return torch.randn(2, 3, *encoder.img_size), mask


def test_without_a_mask_the_features_are_timms(encoder: Encoder) -> None:
    images, mask = draw(encoder)
    timm_model = deepcopy(encoder).model
    for module in timm_model.modules():
        module._forward_hooks.clear()  # the one by which the mask token enters
    expected = timm_model.forward_features(images)
    h, w = encoder.grid_size
    if expected.ndim == 3:
        expected = expected[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))
    elif expected.shape[1:3] == (h, w) and expected.shape[3] == encoder.num_features:
        expected = expected.permute(0, 3, 1, 2)
    assert expected.isfinite().all()
    assert torch.equal(encoder(images), expected)
    assert not torch.equal(encoder(images, mask), expected)  # how much depends on the init


def test_no_hidden_pixel_has_any_part_in_the_features(encoder: Encoder) -> None:
    images, mask = draw(encoder)
    hidden = upsample_mask(mask, encoder.img_size)
    others = torch.where(hidden, 100 * torch.randn_like(images), images)
    assert torch.equal(encoder(images, mask), encoder(others, mask))
    images.requires_grad_()
    encoder(images, mask).square().sum().backward()
    influence = images.grad.abs().sum(1, keepdim=True)
    assert influence[hidden].max() == 0
    assert influence[~hidden].max() > 0


def test_what_is_trained_gets_a_gradient(encoder: Encoder) -> None:
    images, mask = draw(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():  # a scale that begins at 0 would stop the gradient
            parameter.add_(0.05 * torch.randn_like(parameter))
    head = nn.Conv2d(encoder.num_features, 1, 1)
    for training in (False, True):
        encoder.train(training).zero_grad()
        head(encoder(images, mask)).square().sum().backward()
        for name, parameter in encoder.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            # BatchNorm, training, takes out a constant.
            if parameter.requires_grad and not training:
                assert parameter.grad.any(), name
    assert encoder.mask_token.requires_grad


def test_what_is_frozen_has_no_part_in_the_features(encoder: Encoder) -> None:
    images, mask = draw(encoder)
    with torch.no_grad():
        before = encoder(images, mask)
        for parameter in encoder.model.parameters():
            if not parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        assert torch.equal(encoder(images, mask), before)


def test_a_step_lowers_the_loss(encoder: Encoder) -> None:
    images, mask = draw(encoder)
    model = nn.ModuleList([encoder, nn.Conv2d(encoder.num_features, 3 * encoder.stride**2, 1)])
    hidden = upsample_mask(mask, encoder.img_size)

    def loss() -> Tensor:
        prediction = nn.functional.pixel_shuffle(model[1](encoder(images, mask)), encoder.stride)
        return ((prediction - images).abs() * hidden).mean()

    before = loss()
    before.backward()
    slope = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    for parameter in model.parameters():  # as long a step as should take 0.1 % off the loss
        if parameter.grad is not None:
            parameter.data -= 0.001 * before.detach() / slope * parameter.grad
    encoder.train().eval()  # LeViT and its like keep a table of attention biases in eval mode
    assert loss() < before
