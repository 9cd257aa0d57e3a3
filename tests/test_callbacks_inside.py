"""Attention against what can be computed by hand; the images of largest loss."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from callback_parts import DigitsData, MiniSimMIM, trainer
from simmim.callbacks import Inside, WorstImages
from simmim.callbacks.inside import WatchAttention, attention_maps, inspect
from simmim.loss import masked_mean
from simmim.pretrain import SimMIM
from simmim.training.kernels import choose_attention

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
VIT: dict[str, Any] = {"encoder_kwargs": TINY}


def watched(query: torch.Tensor, key: torch.Tensor, **options: Any) -> dict[str, float]:
    with WatchAttention((2, 2), 8) as watch:
        F.scaled_dot_product_attention(query, key, key, **options)
    return watch.summary()


def test_attention_that_looks_everywhere_or_at_itself() -> None:
    zeros, eye = torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]
    even = watched(zeros, zeros)
    assert even["attention/entropy_1"] == pytest.approx(1)
    assert even["attention/distance_1"] == pytest.approx(8 * (1 + 1 + 2**0.5) / 4)
    own = watched(1000 * eye, eye)
    assert own == pytest.approx({"attention/entropy_1": 0, "attention/distance_1": 0}, abs=1e-6)
    # A mask and a bias change where it looks, a scale how sharply.
    masked = watched(zeros, zeros, attn_mask=torch.eye(4).bool())
    assert masked["attention/distance_1"] == pytest.approx(0)
    biased = watched(zeros, zeros, attn_mask=100 * torch.eye(4))
    assert biased["attention/distance_1"] == pytest.approx(0, abs=1e-6)
    assert watched(eye, eye, scale=0.0)["attention/entropy_1"] == pytest.approx(1)


def test_prefix_tokens_have_no_place_and_windows_no_distance() -> None:
    five = torch.zeros(1, 1, 5, 4)  # a class token before 2 x 2 patches
    assert watched(five, five)["attention/distance_1"] == pytest.approx(8 * (2 + 2**0.5) / 4)
    three = torch.zeros(1, 1, 3, 4)
    assert watched(three, three).keys() == {"attention/entropy_1"}


@pytest.mark.parametrize(
    ("encoder", "options", "kinds"),
    [
        ("vit_tiny_patch16_224", TINY, {"entropy", "distance"}),
        ("beit_base_patch16_224", TINY, {"entropy", "distance"}),
        ("resnet18", {}, set()),
    ],
)
def test_real_encoders(encoder: str, options: dict[str, Any], kinds: set[str]) -> None:
    model = SimMIM(
        encoder, img_size=32, mask_patch_size=32 if not kinds else 8, **{"encoder_kwargs": options}
    ).eval()
    attention = inspect(model, torch.randn(2, 3, 32, 32))
    layers = (1, 2, 3) if kinds else ()
    assert attention.keys() == {f"attention/{k}_{n}" for k in kinds for n in layers}
    assert all(value > 0 for value in attention.values())


def test_windows_as_large_as_the_last_grid_have_no_distance() -> None:
    swin = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}
    model = SimMIM(
        "swin_tiny_patch4_window7_224", img_size=32, mask_patch_size=8, encoder_kwargs=swin
    ).eval()
    choose_attention(model, fused=True)  # as while it trains
    attention = inspect(model, torch.randn(2, 3, 32, 32))
    # Stage 1 has 8 x 8 tokens in windows of 4 x 4, stage 2 one window.
    assert attention.keys() == {
        "attention/entropy_1", "attention/entropy_2", "attention/distance_2"
    }  # fmt: skip
    assert attention_maps(model.encoder, torch.randn(2, 3, 32, 32), (0, 0)).shape == (1, 2, 1, 4, 4)


def test_attention_maps_are_the_weights_of_timms_own_arithmetic() -> None:
    model = SimMIM("vit_tiny_patch16_224", img_size=(24, 32), mask_patch_size=8, **VIT).eval()
    images = torch.randn(2, 3, 24, 32)
    choose_attention(model, fused=False)  # as in half precision on a CPU: maps do not depend on it
    maps = attention_maps(model.encoder, images, (2, 1))
    assert not model.encoder.model.blocks[0].attn.fused_attn
    assert maps.shape == (3, 2, 2, 3, 4)
    vit = model.encoder.model
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    first = vit.blocks[0]
    query, key, _ = first.attn.qkv(first.norm1(tokens)).view(2, 13, 3, 2, 16).unbind(2)
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(16**-0.5).softmax(-1)
    place = 1 + 2 * 4 + 1  # behind the class token
    torch.testing.assert_close(maps[0], weights[:, :, place, 1:].unflatten(-1, (3, 4)))
    hidden = torch.zeros(2, 3, 4, dtype=torch.bool)
    hidden[:, 0, 0] = True
    assert not torch.equal(attention_maps(model.encoder, images, (2, 1), hidden)[0], maps[0])


def test_attention_maps_that_there_are_none_of() -> None:
    model = SimMIM("vit_tiny_patch16_224", img_size=32, mask_patch_size=8, **VIT).eval()
    with pytest.raises(ValueError, match=r"place \(4, 0\) is outside of the 4 x 4 patches"):
        attention_maps(model.encoder, torch.randn(1, 3, 32, 32), (4, 0))
    net = SimMIM("resnet18", img_size=32, mask_patch_size=32).eval()
    with pytest.raises(ValueError, match="no layer of resnet18 looks at the whole image"):
        attention_maps(net.encoder, torch.randn(1, 3, 32, 32), (0, 0))


@pytest.mark.slow
def test_a_look_leaves_no_trace(tmp_path: Path) -> None:
    weights = []
    for callbacks in ((), (Inside(1), WorstImages(1))):
        torch.manual_seed(0)
        model = MiniSimMIM()
        trainer(tmp_path, *callbacks).fit(model, datamodule=DigitsData())
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_worst_images_are_those_of_the_largest_loss(tmp_path: Path) -> None:
    data, model = DigitsData(), MiniSimMIM()
    fit = trainer(tmp_path, WorstImages(1, num_images=5), max_epochs=1)
    fit.fit(model, datamodule=data)
    model.eval()
    losses = []
    for i in range(len(data.val)):
        sample = data.val[i]
        batch = {"image": sample["image"][None], "index": sample["index"][None]}
        raw, images, index = model.inputs(batch, 0)
        mask, _ = model.draw_mask(raw, index, validation=True)
        with torch.no_grad():
            losses.append(float(masked_mean(model.error(model(images, mask), images), mask)))
    with (tmp_path / "worst.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    places = sorted(range(len(losses)), key=losses.__getitem__, reverse=True)[:5]
    assert [int(row["path"]) for row in rows] == places
    assert [float(row["loss"]) for row in rows] == pytest.approx([losses[i] for i in places], 1e-4)
    assert [path.name for path in (tmp_path / "worst").iterdir()] == ["epoch_0001.png"]
