"""Heads: the paper's to the letter, what each of them sees, and each of them on every target."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simmim.head import HEADS, InverseHead, LinearHead, MLPHead, TransformerHead
from simmim.target import TARGETS
from simmim.testing import check_head

SMALL: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {},
    "transformer": {"depth": 2, "width": 32, "num_heads": 4},
    "inverse": {"depths": [1, 2, 2, 1], "width": 64, "window_size": 3},
}


def make(
    name: str, upsample: int | Fraction, in_features: int = 24, out_chans: int = 5
) -> nn.Module:
    return HEADS[name](in_features, out_chans, upsample, **SMALL[name])


@torch.no_grad()
def reach(head: nn.Module, features: Tensor, place: tuple[int, int]) -> Tensor:
    """Where the prediction changes with the feature at one place, (H, W)."""
    moved = features.clone()
    moved[:, :, place[0], place[1]] += 1
    return (head(moved) - head(features)).abs().amax((0, 1)) > 1e-6


# All of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_each_head_holds_to_what_a_users_own_must(name: str) -> None:
    for upsample in (1, 6, 14, 16, Fraction(16, 8), Fraction(1, 2)):
        check_head(HEADS[name], upsample=upsample, **SMALL[name])
        prediction = make(name, upsample)(torch.randn(2, 24, 4, 6))
        assert prediction.shape == (2, 5, 4 * upsample, 6 * upsample)


@pytest.mark.parametrize("name", HEADS)
def test_bfloat16(name: str) -> None:
    head, features = make(name, 8), torch.randn(2, 24, 4, 6)
    expected = head(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = head(features)
    throughout = head.bfloat16()(features.bfloat16())
    for ours in (under_autocast, throughout):
        torch.testing.assert_close(ours.float(), expected, atol=0.06, rtol=0.1)


@pytest.mark.parametrize("name", HEADS)
def test_a_coarser_target_sees_the_mean_of_what_it_covers(name: str) -> None:
    """An element of 32 px and features of 16: four features an element."""
    torch.manual_seed(1)
    head = make(name, Fraction(16, 32))
    torch.manual_seed(1)
    plain = make(name, 1)
    features = torch.randn(2, 24, 4, 6)
    torch.testing.assert_close(head(features), plain(F.avg_pool2d(features, 2)))


@pytest.mark.parametrize("name", HEADS)
def test_what_has_no_whole_number_is_refused(name: str) -> None:
    for upsample in (0, -1, Fraction(16, 14), Fraction(2, 3)):
        with pytest.raises(ValueError, match=rf"{upsample} target elements .* choose a size"):
            make(name, upsample)


TARGET_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("pixels", {"size": [2, 3]}),  # 1/32 of the image, with features of 16 px
    ("patch_normalized_pixels", {}),
    ("hog", {}),
    ("features", {"teacher": "test_vit", "pretrained": False}),
    ("color_bins", {"size": [8, 12], "bins": 4}),
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("stride", "in_chans"), [(16, 3), (32, 1)])
def test_every_head_predicts_every_target(head: str, stride: int, in_chans: int) -> None:
    images = torch.randn(1, in_chans, 64, 96)
    features = torch.randn(1, 24, 64 // stride, 96 // stride)
    statistics = {"mean": [0.5] * in_chans, "std": [0.25] * in_chans}
    for name, options in TARGET_OPTIONS:
        target = TARGETS[name](in_chans=in_chans, img_size=(64, 96), **statistics, **options)
        model = HEADS[head](24, target.out_chans, Fraction(stride, target.stride), **SMALL[head])
        prediction = model(features)
        assert prediction.shape[1] == target.out_chans
        assert prediction.shape[2:] == target(images).shape[2:]


# Linear and MLP ----------------------------------------------------------------------------------


def test_the_linear_head_is_the_official_decoder() -> None:
    """Each feature's pixels in the order (channel, row, column), worded without PixelShuffle."""
    head = LinearHead(24, 3, 4)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "proj.weight": (4 * 4 * 3, 24, 1, 1),
        "proj.bias": (4 * 4 * 3,),
    }
    features = torch.randn(2, 24, 3, 5)
    rows = features.movedim(1, -1) @ head.proj.weight.flatten(1).mT + head.proj.bias
    expected = rows.view(2, 3, 5, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 12, 20)
    torch.testing.assert_close(head(features), expected)


def test_the_mlp_head_by_hand() -> None:
    head = MLPHead(4, 2, 1, hidden_features=7)
    features = torch.randn(2, 4, 3, 5)
    first, last = head.hidden[0], head.out.proj
    rows = features.movedim(1, -1) @ first.weight.view(7, 4).mT + first.bias
    rows = rows * 0.5 * (1 + torch.erf(rows / math.sqrt(2)))
    rows = rows @ last.weight.view(2, 7).mT + last.bias
    torch.testing.assert_close(head(features), rows.movedim(-1, 1))
    assert MLPHead(4, 2, 1).out.proj.in_channels == 4


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_light_heads_see_one_feature_an_element(name: str) -> None:
    changed = reach(make(name, 4), torch.randn(1, 24, 3, 5), (1, 3))
    expected = torch.zeros(12, 20, dtype=torch.bool)
    expected[4:8, 12:16] = True
    assert torch.equal(changed, expected)


# Transformer -------------------------------------------------------------------------------------


def test_the_transformer_head_sees_everything() -> None:
    head = make("transformer", 4)
    assert reach(head, torch.randn(1, 24, 3, 5), (1, 3)).all()
    assert not any("pos" in name for name, _ in head.named_parameters())


def test_positions_are_fixed_sines_and_cosines() -> None:
    """With no block, no norm and no projection the prediction is the features plus positions."""
    head = TransformerHead(16, 16, 1, depth=0, width=16, num_heads=1)
    head.norm = nn.Identity()  # type: ignore[assignment]
    for layer in (head.embed, head.out.proj):
        nn.init.dirac_(layer.weight)
        nn.init.zeros_(layer.bias)
    positions = head(torch.zeros(1, 16, 3, 5))[0].movedim(0, -1)  # 3, 5, 16
    bands = 10000 ** -(torch.arange(4) / 4)
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    expected = [f(axis[..., None] * bands) for f in (torch.sin, torch.cos) for axis in (y, x)]
    torch.testing.assert_close(positions, torch.cat(expected, -1))


# Inverse Swin ------------------------------------------------------------------------------------


def stages(head: InverseHead) -> list[tuple[int, int]]:
    """Width and depth of each run of blocks."""
    found: list[tuple[int, int]] = []
    for module in head.stages:
        if hasattr(module, "expansion"):
            continue
        same = found and found[-1][0] == module.dim
        found[-1:] = [(module.dim, found[-1][1] + 1)] if same else [*found[-1:], (module.dim, 1)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "upsample", "expected"),
    [
        ("tiny", 32, [(768, 2), (384, 6), (192, 2), (96, 2)]),  # Swin-T, the other way round
        ("base", 32, [(1024, 2), (512, 18), (256, 2), (128, 2)]),
        ("tiny", 16, [(768, 2), (384, 6), (192, 4)]),  # two doublings leave the 4 x 4
        ("tiny", 1, [(768, 12)]),
    ],
)
def test_the_inverse_head_is_swin_in_reverse(
    variant: str, upsample: int, expected: list[tuple[int, int]]
) -> None:
    with torch.device("meta"):
        head = InverseHead(1024, 3, upsample, variant=variant)
        assert stages(head) == expected
        assert head(torch.randn(1, 1024, 6, 6)).shape == (1, 3, 6 * upsample, 6 * upsample)


def test_the_inverse_head_alternates_its_windows_but_in_the_first_stage() -> None:
    head = InverseHead(8, 3, 32, depths=[2, 3, 2, 2], width=64, window_size=4)
    shifts = [module.shift_size[0] for module in head.stages if not hasattr(module, "expansion")]
    assert shifts == [0, 0, 0, 2, 0, 0, 2, 0, 2]
    for grid in ((3, 3), (5, 9), (1, 1)):  # which the windows do not divide
        assert head(torch.randn(1, 8, *grid)).shape[2:] == (32 * grid[0], 32 * grid[1])


def test_patch_expanding_keeps_each_token_in_its_place() -> None:
    """Without blocks, each feature has charge of its own elements and of no others."""
    head = InverseHead(24, 2, 16, depths=[0, 0, 0], width=32)
    changed = reach(head, torch.randn(1, 24, 3, 5), (1, 3))
    expected = torch.zeros(48, 80, dtype=torch.bool)
    expected[16:32, 48:64] = True
    assert torch.equal(changed, expected)


def test_patch_expanding_undoes_patch_merging() -> None:
    """With the same order of quarters, a merge and its inverse are the identity."""
    expanding: Any = InverseHead(8, 1, 8, depths=[0, 0], width=8).stages[0]
    expanding.norm = nn.Identity()
    with torch.no_grad():
        expanding.expansion.weight.copy_(torch.cat([torch.eye(8), -torch.eye(8)]))
    tokens = torch.randn(1, 2, 3, 8)
    fine = expanding(tokens)
    assert fine.shape == (1, 4, 6, 4)
    quarters = torch.cat([tokens, -tokens], -1).unflatten(3, (4, 4))
    for i in range(4):  # row by row: upper left, upper right, lower left, lower right
        assert torch.equal(fine[:, i // 2 :: 2, i % 2 :: 2], quarters[..., i, :])


@pytest.mark.parametrize(
    ("head", "options", "remedy"),
    [
        ("transformer", {"width": 30, "num_heads": 2}, "use a width of 32$"),
        ("transformer", {"width": 32, "num_heads": 3}, "use a width of 36$"),
        ("transformer", {"width": 500}, "use a width of 512$"),
        ("inverse", {"variant": "small"}, "'small' .* neither tiny nor base"),
        ("inverse", {"width": 60}, "width 60 .* use a multiple of 8"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_remedy(
    head: str, options: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        HEADS[head](24, 3, 32, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "inverse"])
def test_deep_heads_learn(name: str) -> None:
    """Thirty steps towards noise take a quarter off the loss at least."""
    features, target = torch.randn(2, 24, 2, 2), torch.randn(2, 3, 16, 16)
    head = make(name, 8, out_chans=3)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(30):
        loss = F.l1_loss(head(features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.75 * target.abs().mean()
