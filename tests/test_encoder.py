"""The encoder: where the mask token enters, what hidden pixels can reach, what is refused."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import jaxtyping
import pytest
import timm
import torch
from torch import Tensor, nn

from simmim.encoder import Encoder
from simmim.masking import fill_pixels, upsample_mask

TINY = {"embed_dim": 32, "num_heads": 2, "depth": 2}
SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
VIT = ("vit_tiny_patch16_224", TINY)
PAPER_VIT = (
    "beit_base_patch16_224",
    {
        **TINY,
        "init_values": 0.1,
        "global_pool": "",
        "use_fc_norm": False,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
    },
)
SWIN_V1 = ("swin_base_patch4_window7_224", SWIN)
SWIN_V2 = ("swinv2_base_window12_192", SWIN)
PUBLISHED = pytest.mark.parametrize(
    ("name", "options"), [VIT, PAPER_VIT, SWIN_V1, SWIN_V2], ids=["vit", "beit", "swin", "swinv2"]
)


def draw(encoder: Encoder, in_chans: int = 3) -> tuple[Tensor, Tensor]:
    """Two images and their masks, each with hidden and visible cells."""
    mask = torch.rand(2, *encoder.mask_grid) < 0.5
    mask[:, 0, 0], mask[:, -1, -1] = False, True
    return torch.randn(2, in_chans, *encoder.img_size), mask


def published_forward(encoder: Encoder, images: Tensor, mask: Tensor) -> Tensor:
    """SimMIM's forward pass in its own words, from timm's parts."""
    model: Any = encoder.model
    tokens = model.patch_embed.proj(images)
    rows, columns = tokens.shape[2] // mask.shape[1], tokens.shape[3] // mask.shape[2]
    weight = mask.repeat_interleave(rows, 1).repeat_interleave(columns, 2).flatten(1)[..., None]
    x = model.patch_embed.norm(tokens.flatten(2).transpose(1, 2))
    x = x * (1 - weight.float()) + encoder.mask_token * weight
    if hasattr(model, "layers"):
        x = x.unflatten(1, tokens.shape[2:])
        return model.norm(model.layers(x)).permute(0, 3, 1, 2)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    shared = {}
    if model.pos_embed is not None:
        x = x + model.pos_embed
    else:
        shared = {"shared_rel_pos_bias": model.rel_pos_bias()}
    for block in model.blocks:
        x = block(x, **shared)
    return model.norm(x)[:, 1:].transpose(1, 2).unflatten(2, tokens.shape[2:])


@PUBLISHED
def test_masked_features_are_those_of_the_published_forward_pass(
    name: str, options: dict[str, Any]
) -> None:
    encoder = Encoder(name, 64, **options)
    images, mask = draw(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():  # far from the initial weights, nothing hides
            parameter.add_(0.1 * torch.randn_like(parameter))
        torch.testing.assert_close(
            encoder(images, mask), published_forward(encoder, images, mask), rtol=0, atol=2e-5
        )


@PUBLISHED
def test_the_encoder_is_timms_model(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(7)
    expected = timm.create_model(name, img_size=64, num_classes=0, drop_path_rate=0.0, **options)
    torch.manual_seed(7)
    encoder = Encoder(name, 64, **options)
    state = encoder.state_dict()
    token = state.pop("mask_token")
    assert token.shape == (1, 1, encoder.model.patch_embed.proj.out_channels)
    assert 0.01 < token.std() < 0.03
    assert list(state) == [f"model.{key}" for key in expected.state_dict()]
    assert all(torch.equal(v, state[f"model.{key}"]) for key, v in expected.state_dict().items())
    images, _ = draw(encoder)
    features = expected.eval().forward_features(images)
    assert torch.equal(encoder.eval()(images).flatten(2), as_ncl(features))


def as_ncl(features: Tensor) -> Tensor:
    if features.ndim == 3:
        return features[:, 1:].transpose(1, 2)
    return features.permute(0, 3, 1, 2).flatten(2)


def test_sizes() -> None:
    vit = Encoder("vit_tiny_patch16_224", (64, 96), mask_patch_size=32, **TINY)
    assert (vit.patch_size, vit.stride, vit.num_features) == (16, 16, 32)
    assert (vit.img_size, vit.grid_size, vit.mask_grid) == ((64, 96), (4, 6), (2, 3))
    swin = Encoder("swin_base_patch4_window7_224", [64, 96], mask_patch_size=None, **SWIN)
    assert (swin.patch_size, swin.stride, swin.num_features) == (4, 32, 128)
    assert (swin.grid_size, swin.mask_patch_size, swin.mask_grid) == ((2, 3), 4, (16, 24))


@PUBLISHED
def test_rectangles_of_any_channels(name: str, options: dict[str, Any]) -> None:
    encoder = Encoder(name, (64, 128), 5, **options).eval()
    images, mask = draw(encoder, 5)
    others = images.masked_fill(upsample_mask(mask, (64, 128)), float("nan"))
    features = encoder(images, mask)
    assert features.isfinite().all()
    assert torch.equal(features, encoder(others, mask))
    assert features.shape == (2, encoder.num_features, *encoder.grid_size)


@pytest.fixture(scope="module")
def vit() -> Encoder:
    """A small encoder that tests read and do not change."""
    torch.manual_seed(0)
    return Encoder("vit_tiny_patch16_224", 64, **TINY).eval()


@pytest.mark.parametrize("cell", [16, 32])
def test_each_hidden_cell_is_hidden_where_it_lies(cell: int) -> None:
    encoder = Encoder("vit_tiny_patch16_224", (64, 128), mask_patch_size=cell, **TINY).eval()
    images = torch.randn(1, 3, 64, 128)
    seen: list[Tensor] = []
    encoder.model.pos_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    for i in range(encoder.mask_grid[0]):
        for j in range(encoder.mask_grid[1]):
            mask = torch.zeros(1, *encoder.mask_grid, dtype=torch.bool)
            mask[0, i, j] = True
            encoder(images, mask)
            tokens = (seen.pop() - encoder.model.pos_embed)[:, 1:].unflatten(1, (4, 8))
            n = cell // 16
            found = (tokens - encoder.mask_token).abs().amax(-1)[0] < 1e-6
            assert found[i * n : (i + 1) * n, j * n : (j + 1) * n].all()
            assert found.sum() == n * n


@pytest.mark.slow
def test_96_channels_of_96_by_96_tokens_are_read_as_the_model_means_them() -> None:
    swin = Encoder("swin_tiny_patch4_window7_224", 384, **{**SWIN, "embed_dim": 96}).eval()
    images, mask = draw(swin)
    images = torch.where(upsample_mask(mask, (384, 384)), torch.nan, images)
    assert swin(images, mask).isfinite().all()


def test_empty_and_full_masks_and_infinite_pixels_that_are_hidden(vit: Encoder) -> None:
    images, mask = draw(vit)
    assert torch.equal(vit(images, torch.zeros_like(mask)), vit(images))
    features = vit(images, torch.ones_like(mask))
    assert features.isfinite().all()
    assert torch.equal(features[0], features[1])
    infinite = images.masked_fill(upsample_mask(mask, (64, 64)), float("inf"))
    expected = vit(images, mask)
    assert expected.isfinite().all()
    assert torch.equal(vit(infinite, mask), expected)


@pytest.mark.parametrize("fill", ["zero", "mean", "noise"])
def test_pixels_can_be_filled_instead(fill: str) -> None:
    encoder = Encoder("vit_tiny_patch16_224", 64, mask_fill=fill, **TINY).eval()
    assert encoder.mask_token is None
    assert "mask_token" not in encoder.state_dict()
    images, mask = draw(encoder)
    keys = torch.tensor([3, 4])
    filled = fill_pixels(images, mask, fill, keys)
    assert torch.equal(encoder(images, mask, keys), encoder(filled))
    assert torch.equal(encoder(images, mask), encoder(images, mask, keys)) == (fill != "noise")


def test_batch_norm_in_the_stem_does_not_carry_hidden_pixels_while_it_trains() -> None:
    encoder = Encoder("fasternet_t0", 64).train()  # a patch embedding with BatchNorm behind it
    images, mask = draw(encoder)
    others = torch.where(upsample_mask(mask, (64, 64)), torch.randn_like(images), images)
    assert torch.equal(encoder(images, mask), encoder(others, mask))


class Bare(nn.Module):
    """A model without a grid of tokens before its features: it works in forward_features itself."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3, gives: str = "features") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, in_chans, 16, 16))
        self.unused = nn.Parameter(torch.ones(1))
        self.num_features, self.gives = 8, gives

    def forward_features(self, images: Tensor) -> Any:
        features = nn.functional.conv2d(images, self.weight, stride=16)
        return {
            "features": features,
            "nan": features * torch.nan,
            "two maps": [features, features],
            "a vector": features.mean((2, 3)),
            "no grid that tiles": features[:, :, :3, :3],
        }[self.gives]


@pytest.fixture
def bare() -> Iterator[str]:
    entrypoints = timm.models._registry._model_entrypoints
    entrypoints["bare"] = lambda pretrained=False, cache_dir=None, **kwargs: Bare(
        **{k: v for k, v in kwargs.items() if not k.startswith("pretrained")}
    )
    yield "bare"
    del entrypoints["bare"]


def test_without_a_grid_of_tokens_only_pixels_are_filled(bare: str) -> None:
    encoder = Encoder(bare, 64)
    assert encoder.mask_token is None
    assert (encoder.patch_size, encoder.stride) == (16, 16)
    images, mask = draw(encoder)
    assert torch.equal(encoder(images, mask), encoder(fill_pixels(images, mask, 0.0)))
    assert not encoder.model.unused.requires_grad
    assert encoder.model.weight.requires_grad


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        ("nan", "its weights are not set"),
        ("two maps", "gives 2 feature maps at once"),
        ("a vector", r"features of shape \[8\], which is no grid"),
        ("no grid that tiles", r"\[8, 3, 3\], which is no grid that tiles"),
    ],
)
def test_a_model_without_a_feature_map_of_the_image_is_refused(
    bare: str, gives: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Encoder(bare, 64, gives=gives)


def test_mask_stage_adds_the_token_to_a_middle_stage() -> None:
    encoder = Encoder("test_resnet", 64, mask_stage=3).eval()
    assert encoder.mask_token is not None
    images, mask = draw(encoder)
    filled = fill_pixels(images, mask, "mean")
    model: Any = encoder.model
    x = model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(filled))))))
    hidden = upsample_mask(mask, (4, 4))  # stage 3 has a stride of 16 pixels
    x = model.layer3(x) + encoder.mask_token.view(1, -1, 1, 1) * hidden
    torch.testing.assert_close(encoder(images, mask), model.layer4(x), rtol=0, atol=1e-6)
    encoder(images, mask).sum().backward()
    assert encoder.mask_token.grad.abs().max() > 0
    assert torch.equal(encoder(images), model.forward_features(images))


@pytest.mark.parametrize(
    ("name", "options", "stage"),
    [
        (*SWIN_V1, 1),
        ("test_convnext", {}, 3),
        ("test_efficientnet", {}, 1),
        ("test_mambaout", {}, 3),
    ],
    ids=str,
)
def test_mask_stage_of_hierarchical_encoders(
    name: str, options: dict[str, Any], stage: int
) -> None:
    encoder = Encoder(name, 64, mask_stage=stage, **options).eval()
    images, mask = draw(encoder)
    hidden = upsample_mask(mask, (64, 64))
    others = torch.where(hidden, 10 * torch.randn_like(images), images)
    assert torch.equal(encoder(images, mask), encoder(others, mask))
    plain = encoder(fill_pixels(images, mask, "mean"))
    assert not torch.equal(encoder(images, mask), plain)
    with torch.no_grad():
        encoder.mask_token.zero_()
    torch.testing.assert_close(encoder(images, mask), plain)


def test_dropout_acts_inside_the_blocks() -> None:
    encoder = Encoder("vit_tiny_patch16_224", 64, drop_rate=0.1, drop_path_rate=0.2, **TINY)
    rates = {n: m.p for n, m in encoder.model.named_modules() if isinstance(m, nn.Dropout)}
    assert rates["blocks.1.attn.proj_drop"] == rates["blocks.1.mlp.drop1"] == 0.1
    assert rates["pos_drop"] == 0.1
    assert encoder.model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    images, mask = draw(encoder)
    assert not torch.equal(encoder(images, mask), encoder(images, mask))
    assert torch.equal(encoder.eval()(images, mask), encoder(images, mask))
    encoder = Encoder(*SWIN_V1[:1], 64, **SWIN)  # timm's Swin drops paths by default
    assert not any(getattr(module, "drop_prob", 0) for module in encoder.modules())


@pytest.mark.parametrize(("name", "options"), [VIT, SWIN_V1], ids=["vit", "swin"])
def test_recomputed_activations_give_the_same_gradients(name: str, options: dict[str, Any]) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        encoder = Encoder(name, 64, grad_checkpointing=recompute, **options).eval()
        torch.manual_seed(2)
        encoder(*draw(encoder)).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.requires_grad])
    assert gradients[0][1].any()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_recomputed_stages_leave_no_room_for_a_token() -> None:
    Encoder("test_convnext", 64, mask_stage=2, grad_checkpointing=True)
    with pytest.raises(ValueError, match="would recompute the stage that the mask token follows"):
        Encoder("test_resnet", 64, mask_stage=3, grad_checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [VIT, SWIN_V1, ("test_resnet", {"mask_stage": 3})],
    ids=str,
)
def test_it_compiles_into_one_graph(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(name, 64, **options)
    images, mask = draw(encoder)
    expected = encoder.eval()(images, mask), encoder(images)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of tests alone
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, mask), expected[0])
    assert torch.equal(compiled(images), expected[1])


def test_a_deep_copy_has_a_mask_token_of_its_own(vit: Encoder) -> None:
    images, mask = draw(vit)
    copy, expected = deepcopy(vit), vit(images, mask)
    assert torch.equal(copy(images, mask), expected)
    with torch.no_grad():
        copy.mask_token.fill_(1.0)
    assert (copy(images, mask) - expected).abs().max() > 0.01
    assert torch.equal(vit(images, mask), expected)


def test_a_failed_call_leaves_no_mask_behind(vit: Encoder) -> None:
    images, mask = draw(vit)
    expected = vit(images)
    with pytest.raises(AssertionError):
        vit(images[..., :32], mask)
    assert torch.equal(vit.model.forward_features(images)[:, 1:], expected.flatten(2).mT)


def test_it_can_be_built_without_memory_for_weights() -> None:
    with torch.device("meta"):
        encoder = Encoder("swin_base_patch4_window7_224", 64, **SWIN)
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    images, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 2, 2, dtype=torch.bool)
    assert encoder(images.to("meta"), mask.to("meta")).shape == (2, 128, 2, 2)


def test_half_precision() -> None:
    encoder = Encoder("swin_base_patch4_window7_224", 64, **SWIN)
    images, mask = draw(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(images, mask).isfinite().all()
    torch.set_default_dtype(torch.bfloat16)
    try:
        half = Encoder("swin_base_patch4_window7_224", 64, **SWIN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert half(images.bfloat16(), mask).dtype == torch.bfloat16


def test_looking_on_leaves_the_random_state_alone_and_training_on() -> None:
    torch.manual_seed(3)
    model = timm.create_model("test_convnext", num_classes=0)
    nn.init.normal_(torch.empty(1, 1, model.stem[0].out_channels))
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():
        encoder = Encoder("test_convnext", 64)
    assert torch.equal(torch.rand(1), expected)
    assert encoder.training
    assert encoder.model.training
    assert all(p.grad is None for p in encoder.parameters())


def test_middle_layers_for_probes(vit: Encoder) -> None:
    images, _ = draw(vit)
    x = vit.model.norm_pre(vit.model._pos_embed(vit.model.patch_embed(images)))
    first = vit.model.blocks[0](x)[:, 1:].transpose(1, 2)
    assert torch.equal(vit.tokens(images), vit(images))
    assert torch.equal(vit.tokens(images, 1).flatten(2), first)
    swin = Encoder("swin_base_patch4_window7_224", 64, **SWIN)
    assert [swin.tokens(images, layer).shape[1] for layer in (1, 2, 3, 4)] == [16, 32, 64, 128]
    with pytest.raises(ValueError, match=r"layer 5 of .* does not exist: use 1 to 4"):
        swin.tokens(images, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_base_pach16_224"}, "did you mean vit_base_patch16_224"),
        ({"name": "qqqq"}, "is not a model of timm"),
        ({"mask_fill": "blur"}, "mask_fill 'blur' is not known: use token, zero, mean, noise"),
        ({"img_size": [64, 64, 3]}, r"img_size \[64, 64, 3\] is neither a number nor"),
        ({"img_size": 200}, "img_size 200 is not a multiple of mask_patch_size 32: use 192 or 224"),
        (
            {"img_size": 200, "mask_patch_size": 20},
            "img_size 200 is not a multiple of 16 pixels, the stride of .*: use 160 or 240",
        ),
        (
            {"name": "test_resnet", "img_size": [96, 80], "mask_patch_size": 16},
            "img_size 80 is not a multiple of 32 pixels, the stride of test_resnet: use 64 or 96",
        ),
        (
            {"name": "vit_small_patch14_dinov2", "img_size": 224, **TINY},
            "mask_patch_size 32 is not a multiple of the 14 pixels of a token .*: use 28 or 42",
        ),
        ({"mask_patch_size": 8}, "mask_patch_size 8 is not a multiple of the 16 .*: use 16"),
        ({"num_foo": 2}, "does not take 'num_foo'"),
        ({"name": "poolformer_s12", "depths": [1]}, "does not take 'depths'"),
        ({"features_only": True}, "has no forward_features"),
        ({"name": "test_resnet", "drop_rate": 0.1}, "drop_rate 0.1 would do nothing"),
        ({"mask_stage": 3}, "mask_stage 3 of .*: it is not hierarchical"),
        ({"name": "test_resnet", "mask_stage": 5}, "mask_stage 5 of .*: use 1, 2, 3, 4"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_with_the_reason(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"(?i){message}"):
        Encoder(**{"name": "vit_tiny_patch16_224", "img_size": 64, **arguments})


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "efficientvit_b0", "drop_path_rate": 0.1}, "drop_path_rate 0.1 would do nothing"),
        ({"name": "dla34", "grad_checkpointing": True}, "cannot recompute"),
        ({"name": "nest_tiny", "img_size": [64, 128]}, "only handles square inputs"),
        ({"name": "efficientformer_l1"}, r"it was made for \(3, 224, 224\)"),
        ({"name": "coat_tiny"}, "gives 3 feature maps at once"),
        ({"name": "crossvit_tiny_240", "img_size": 240, "mask_patch_size": 24}, "2 feature maps"),
        ({"name": "efficientvim_m1"}, "gives 4 feature maps at once"),
        ({"name": "pit_ti_224"}, r"features of shape \[1, 256\], which is no grid"),
        ({"name": "inception_v3", "img_size": 320}, r"\[2048, 8, 8\], which is no grid that tiles"),
        ({"name": "inception_v4", "img_size": 320}, r"\[1536, 8, 8\], which is no grid"),
        ({"name": "inception_resnet_v2", "img_size": 320}, r"\[1536, 8, 8\], which is no grid"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_models_of_timm_that_cannot_be_used_are_refused_with_the_reason(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(**{"img_size": 64, **arguments})


def test_norm_eps_reaches_every_layer_norm() -> None:
    encoder = Encoder("vit_tiny_patch16_224", 64, norm_eps=1e-12, **TINY)
    eps = {m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)}
    assert eps == {1e-12}
