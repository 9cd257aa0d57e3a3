"""Skipping hidden tokens: visible ones see what they would see if hidden ones were masked out."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from timm.models.swin_transformer import window_partition
from torch import Tensor, nn

from simmim.encoder import Encoder
from simmim.masking import draw_masks, random_mask, sample_keys, upsample_mask
from simmim.pretrain import SimMIM
from simmim.weights import load_encoder
from support import exhaustive
from support.small import SHARED_BIAS, noise_loader
from support.training import quiet_trainer

TINY = {"embed_dim": 32, "num_heads": 2, "depth": 2}
SWIN = {"embed_dim": 16, "depths": (2, 2, 2, 1), "num_heads": (1, 1, 2, 2)}
PLAIN = {
    "vit": ("vit_tiny_patch16_224", 96, TINY),
    "registers": ("vit_tiny_patch16_224", 96, {**TINY, "reg_tokens": 3, "no_embed_class": True}),
    "beit": ("beit_base_patch16_224", 96, {**TINY, **SHARED_BIAS}),
    "eva": ("eva02_tiny_patch14_224", 96, {**TINY, "patch_size": 16}),
    "dinov3": ("vit_small_patch16_dinov3", 96, TINY),
}
# Windows of 6 and 3 tokens cut through cells of 8, 4, 2 and 1; the last grid has one window.
WINDOWED = {
    "swin": ("swin_base_patch4_window7_224", 96, {**SWIN, "window_size": 6}),
    "swin_oblong": ("swin_base_patch4_window7_224", [96, 192], {**SWIN, "window_size": 3}),
    "swinv2": ("swinv2_base_window12_192", 96, {**SWIN, "window_size": 6}),
}
ALL = {**PLAIN, **WINDOWED}
FEW = ("vit", "beit", "swin", "swinv2")  # the others only in `make test-all`
KINDS = [kind if kind in FEW else exhaustive(kind) for kind in ALL]


def encoder_of(kind: str, hidden_tokens: str = "skip", **kwargs: Any) -> Encoder:
    """An encoder far from its initial weights, where nothing hides, in evaluation."""
    name, img_size, options = ALL[kind]
    encoder = Encoder(name, img_size, hidden_tokens=hidden_tokens, **{**options, **kwargs})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return encoder.eval()


def draw(encoder: Encoder, ratio: float = 0.6, n: int = 3) -> tuple[Tensor, Tensor]:
    """Images, and masks that differ."""
    keys = sample_keys(torch.arange(n), 0, 0)
    images = torch.randn(n, 3, *encoder.img_size, generator=torch.Generator().manual_seed(1))
    return images, draw_masks(random_mask, keys, encoder.mask_grid, ratio)


@contextmanager
def masked_windows(model: Any, mask: Tensor) -> Iterator[None]:
    """Let no token of a Swin attend to a hidden one, in its ordinary pass over one image."""
    blocks = [block for stage in model.layers for block in stage.blocks]
    before = [block.attn_mask for block in blocks]
    for block, shift_only in zip(blocks, before, strict=True):
        hidden = upsample_mask(mask, block.input_resolution).permute(0, 2, 3, 1).float()
        hidden = hidden.roll([-shift for shift in block.shift_size], (1, 2))
        keys = window_partition(hidden, block.window_size).flatten(1)[:, None]
        block.attn_mask = -1e4 * keys.expand(-1, keys.shape[2], -1)
        if shift_only is not None:
            block.attn_mask = block.attn_mask + shift_only
    yield
    for block, shift_only in zip(blocks, before, strict=True):
        block.attn_mask = shift_only


def reference(encoder: Encoder, images: Tensor, mask: Tensor) -> Tensor:
    """All tokens through timm's ordinary pass, one image at a time, hidden ones masked out."""
    model: Any = encoder.model
    features = []
    for image, cells in zip(images[:, None], mask[:, None], strict=True):
        if hasattr(model, "layers"):
            with masked_windows(model, cells):
                features.append(encoder(image))
            continue
        prefix = torch.zeros(1, model.num_prefix_tokens, dtype=torch.bool)
        hidden = torch.cat([prefix, upsample_mask(cells, encoder.grid_size).flatten(1)], 1)
        if getattr(model, "rel_pos_bias", None) is not None:
            far = -1e4 * hidden[:, None, None].float()
            hook = model.rel_pos_bias.register_forward_hook(lambda _m, _a, b, far=far: b + far)
            features.append(encoder(image))
            hook.remove()
        else:
            tokens = model.forward_features(image, attn_mask=~hidden[:, None, None])
            tokens = tokens[:, model.num_prefix_tokens :]
            features.append(tokens.transpose(1, 2).unflatten(2, encoder.grid_size))
    return torch.cat(features)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_visible_features_are_those_of_attention_that_is_masked(kind: str) -> None:
    encoder = encoder_of(kind)
    images, mask = draw(encoder)
    hidden = upsample_mask(mask, encoder.grid_size)
    features, whole = encoder(images, mask), encoder(images)
    visible = ~hidden.expand_as(features)
    expected = reference(encoder, images, mask)
    torch.testing.assert_close(features[visible], expected[visible], rtol=1e-4, atol=1e-4)
    assert (features - whole)[visible].abs().mean() > 0.001  # hidden neighbours do count
    token = encoder.mask_token
    assert token is not None
    assert torch.equal(features.movedim(1, 3)[hidden[:, 0]], token[0].expand(hidden.sum(), -1))
    # With nothing hidden they are the ordinary ones.
    nothing = torch.zeros_like(mask)
    torch.testing.assert_close(encoder(images, nothing), whole, rtol=1e-4, atol=1e-4)
    # No hidden pixel has any part in them, and no other image.
    spoilt = images.masked_fill(upsample_mask(mask, encoder.img_size), torch.nan)
    assert torch.equal(encoder(spoilt, mask), features)
    alone = encoder(images[1:2], mask[1:2])
    torch.testing.assert_close(features[1:2], alone, rtol=1e-4, atol=1e-4)
    # A copy skips by itself.
    copy = deepcopy(encoder)
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(copy(images, mask), features)


@pytest.mark.parametrize("kind", ["vit", exhaustive("beit"), "swin", exhaustive("swinv2")])
def test_gradients_are_those_of_attention_that_is_masked(kind: str) -> None:
    encoder = encoder_of(kind)
    images, mask = draw(encoder, n=2)
    visible = ~upsample_mask(mask, encoder.grid_size)
    gradients = []
    for features in (encoder(images, mask), reference(encoder, images, mask)):
        encoder.zero_grad()
        (features * visible).sin().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_recomputed_activations_give_the_same_gradients(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = encoder_of(kind, grad_checkpointing=checkpointing).train()
        images, mask = draw(encoder)
        encoder(images, mask).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", *map(exhaustive, [*PLAIN, "swin"][1:])])
def test_it_compiles_into_one_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(kind)
    images, mask = draw(encoder)
    count = int(mask[0].sum())
    expected = encoder(images, mask), encoder(images)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of tests alone
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, mask, hidden_count=count), expected[0])
    assert torch.equal(compiled(images), expected[1])


BEIT, OWN_BIAS = "beit_base_patch16_224", {**TINY, "use_rel_pos_bias": True}
PATCH4, ODD = "swin_base_patch4_window7_224", {**SWIN, "window_size": 3}


def tiny(kind: str = "vit", **kwargs: Any) -> SimMIM:
    options = {**SWIN, "window_size": 2} if kind == "swin" else TINY
    name = {"vit": "vit_tiny_patch16_224", "swin": "swin_base_patch4_window7_224"}[kind]
    given = {"hidden_tokens": "skip", "head": "transformer", "head_kwargs": {"width": 32}}
    return SimMIM(name, 64, encoder_kwargs=options, **{**given, **kwargs})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "masking"), [exhaustive("vit", "token"), ("vit", "block"), ("swin", "square")]
)
def test_it_trains_and_its_weights_are_the_encoder_s(
    kind: str, masking: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = tiny(kind, masking=masking, mask_ratio=0.5)
    trainer = quiet_trainer()
    trainer.fit(model, noise_loader(8, 64), noise_loader(4, 64))
    assert trainer.callback_metrics["val/loss"].isfinite()
    trainer.save_checkpoint(tmp_path / "skip.ckpt")
    encoder = load_encoder(tmp_path / "skip.ckpt")
    images = torch.randn(2, 3, 64, 64)
    expected = model.eval().encoder.model.forward_features(images)
    torch.testing.assert_close(encoder.eval().forward_features(images), expected)
    ordinary = tiny(kind, hidden_tokens="encode", weights=str(tmp_path / "skip.ckpt")).eval()
    torch.testing.assert_close(ordinary.encoder(images), model.encoder(images))
    again = SimMIM.load_from_checkpoint(tmp_path / "skip.ckpt").eval()
    images, mask = draw(again.encoder)
    assert torch.equal(again(images, mask), model(images, mask))
    again.loss_of(images, mask, torch.arange(3))[0].backward()
    unused = [n for n, p in again.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []  # as DDP asks for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "linear", "head_kwargs": None}, "head 'linear' looks at one place alone"),
        ({"mask_ratio": [0.4, 0.8]}, "same number of cells of every image"),
        ({"masking": "foreground"}, "not masking 'foreground'"),
        ({"mask_ratio": 1.0}, "hides all 4 cells"),
        ({"mask_fill": "mean"}, "leave mask_fill 'mean' at token"),
        ({"hidden_tokens": "drop"}, "hidden_tokens 'drop' is not known: use encode or skip"),
        ({"encoder": "test_resnet", "encoder_kwargs": None}, "not of test_resnet: use encode"),
        ({"mask_patch_size": 8}, "mask_patch_size 8 is not a multiple of the 16"),
        (
            {"encoder": BEIT, "encoder_kwargs": OWN_BIAS},
            "set encoder_kwargs use_rel_pos_bias to",
        ),
        ({"encoder": PATCH4, "encoder_kwargs": ODD}, "a window of 3 tokens does not tile 16"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], message: str) -> None:
    name = options.pop("encoder", "vit_tiny_patch16_224")
    given = {"hidden_tokens": "skip", "head": "transformer", "encoder_kwargs": TINY, **options}
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        SimMIM(name, 64, **given)


def test_masks_of_different_counts_are_refused() -> None:
    model = tiny()
    mask = torch.tensor([[[True, False], [False, False]], [[True, True], [False, False]]])
    with pytest.raises(ValueError, match="hide 1 and 2 of 4 cells"):
        model(torch.randn(2, 3, 64, 64), mask)
