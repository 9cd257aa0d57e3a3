"""Parameter groups, layer decay, learning rates and the official initialisation, by hand."""

import math
from itertools import product
from typing import Any

import pytest
import timm
import torch
from torch import nn

from simmim.optim import Schedule, init_official_, lr_at, param_groups, scaled_lr

TINY: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2},
    "beit_base_patch16_224": {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (2, 3),
        "num_heads": (2, 2),
        "window_size": 4,
    },
    "swinv2_tiny_window8_256": {
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (2, 2),
        "num_heads": (2, 2),
        "window_size": 4,
    },
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)},
    "test_resnet": {},
}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}


def encoder(name: str, num_classes: int = 0, **kwargs: Any) -> nn.Module:
    kwargs = {**TINY[name], **kwargs}
    if not name.startswith(("convnext", "test_resnet")):
        kwargs["img_size"] = 16
    return timm.create_model(name, num_classes=num_classes, **kwargs)


class Holder(nn.Module):
    """A timm model in the place where SimMIM has it, a mask token, and a head."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.model = encoder(name, **kwargs)
        self.encoder.mask_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.head = nn.Conv2d(16, 12, 1)


def names_by_decay(model: nn.Module, **kwargs: Any) -> tuple[set[str], set[str]]:
    """Names with weight decay, and names without."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    sets: tuple[set[str], set[str]] = set(), set()
    for group in param_groups(model, 0.05, **kwargs):
        assert group["weight_decay"] in (0.0, 0.05)
        sets[group["weight_decay"] == 0.0].update(name_of[id(p)] for p in group["params"])
    return sets


# Parameter groups --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_each_parameter_is_in_exactly_one_group_and_kernels_alone_decay(name: str) -> None:
    model = Holder(name)
    frozen = next(iter(model.encoder.model.parameters()))
    frozen.requires_grad_(False)
    for layer_decay, compat in product((None, 0.65), ("default", "official")):
        options: Any = {"layer_decay": layer_decay, "compat": compat}
        groups = param_groups(model, 0.05, **options)
        found = [id(p) for group in groups for p in group["params"]]
        assert len(found) == len(set(found))
        assert set(found) == {id(p) for p in model.parameters()} - {id(frozen)}
        assert len({group["name"] for group in groups}) == len(groups)
    decayed, spared = names_by_decay(model)
    parameters = dict(model.named_parameters())
    assert all(parameters[n].ndim > 1 for n in decayed)
    assert not [n for n in decayed if n.endswith(".bias")]
    assert "encoder.mask_token" in spared
    assert "head.weight" in decayed


@pytest.mark.parametrize(
    ("name", "kwargs", "default", "official"),
    [
        # What several dimensions has and is spared, as meant and as released.
        (
            "beit_base_patch16_224",
            SHARED,
            {"cls_token", "mask_token", "rel_pos_bias.relative_position_bias_table"},
            {"cls_token"},
        ),
        (
            "beit_base_patch16_224",
            {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
            {"cls_token", "mask_token", "pos_embed"},
            {"cls_token", "pos_embed"},
        ),
        (
            "swin_tiny_patch4_window7_224",
            {},
            {"mask_token"}
            | {
                f"layers.{i}.blocks.{j}.attn.relative_position_bias_table"
                for i, depth in enumerate((2, 3))
                for j in range(depth)
            },
            {"mask_token"},
        ),
        (
            "swinv2_tiny_window8_256",
            {},
            {"mask_token"}
            | {
                f"layers.{i}.blocks.{j}.attn.{what}"
                for i in range(2)
                for j in range(2)
                for what in ("logit_scale", "cpb_mlp.0.weight", "cpb_mlp.2.weight")
            },
            {"mask_token"},
        ),
    ],
)
def test_the_matrices_without_decay_by_hand(
    name: str, kwargs: dict[str, Any], default: set[str], official: set[str]
) -> None:
    model = Holder(name, **kwargs)
    for compat, expected in (("default", default), ("official", official)):
        _, spared = names_by_decay(model, compat=compat)
        parameters = dict(model.named_parameters())
        matrices = {n for n in spared if parameters[n].ndim > 1}
        assert {n.split("encoder.")[-1].removeprefix("model.") for n in matrices} == expected


def test_official_fine_tuning_spares_the_tables_of_swin_but_not_of_vit() -> None:
    for name, spares in (("swin_tiny_patch4_window7_224", True), ("beit_base_patch16_224", False)):
        model = encoder(name, num_classes=3)
        _, spared = names_by_decay(model, layer_decay=0.9, compat="official")
        tables = {n for n, _ in model.named_parameters() if n.endswith("bias_table")}
        assert tables
        assert tables <= spared if spares else not tables & spared


# Layer decay -------------------------------------------------------------------------------------


def scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, 0.05, layer_decay=layer_decay)
    return {name_of[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        (  # 3 blocks: levels 0 (embedding), 1, 2, 3, 4 (head); 0.5 ** (4 - level)
            "vit_tiny_patch16_224",
            {},
            {
                "cls_token": 0.0625,
                "pos_embed": 0.0625,
                "patch_embed.proj.weight": 0.0625,
                "blocks.0.norm1.weight": 0.125,
                "blocks.1.attn.qkv.weight": 0.25,
                "blocks.2.mlp.fc2.bias": 0.5,
                "norm.weight": 1.0,
                "head.weight": 1.0,
            },
        ),
        *(
            (  # 4 blocks: levels 0 to 5; timm's layers.1.downsample is the end of stage 0
                name,
                {"depths": (2, 2)},
                {
                    "patch_embed.proj.weight": 0.03125,
                    "layers.0.blocks.0.attn.proj.weight": 0.0625,
                    "layers.0.blocks.1.attn.proj.weight": 0.125,
                    "layers.1.downsample.reduction.weight": 0.125,
                    "layers.1.downsample.norm.weight": 0.125,
                    "layers.1.blocks.0.attn.proj.weight": 0.25,
                    "layers.1.blocks.1.attn.proj.weight": 0.5,
                    "norm.weight": 1.0,
                    "head.fc.weight": 1.0,
                },
            )
            for name in ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
        ),
    ],
)
def test_layer_decay_by_hand(name: str, kwargs: Any, expected: dict[str, float]) -> None:
    found = scales(encoder(name, num_classes=3, **kwargs), 0.5)
    assert {name: found[name] for name in expected} == expected


def test_levels_do_not_depend_on_where_the_head_is() -> None:
    alone = scales(encoder("beit_base_patch16_224", num_classes=3, **SHARED), 0.65)
    held = scales(Holder("beit_base_patch16_224", **SHARED), 0.65)
    for name, scale in alone.items():
        if not name.startswith("head."):
            assert held[f"encoder.model.{name}"] == scale
    assert held["head.weight"] == 1.0
    assert held["encoder.mask_token"] == 0.65**4
    assert held["encoder.model.rel_pos_bias.relative_position_bias_table"] == 1.0


@pytest.mark.parametrize("name", TINY)
def test_layers_rise_from_the_embedding_to_the_head(name: str) -> None:
    groups = param_groups(encoder(name, num_classes=3), 0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in groups}
    assert scales == {0.5**i for i in range(len(scales))}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


def test_layer_decay_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="group_matcher"):
        param_groups(nn.Linear(2, 2), 0.05, layer_decay=0.5)


# Learning rates ----------------------------------------------------------------------------------


def test_the_rate_grows_with_the_batch() -> None:
    assert scaled_lr(2e-4, 2048) == 8e-4
    assert scaled_lr(1e-4, 64) == 1.25e-5


def curve(n: int, **kwargs: Any) -> list[float]:
    defaults: dict[str, Any] = {
        "schedule": "cosine",
        "lr": 1.0,
        "total_steps": 8,
        "warmup_steps": 2,
        "warmup_lr": 0.2,
        "min_lr": 0.1,
    }
    return [lr_at(step, **{**defaults, **kwargs}) for step in range(n)]


def test_cosine_by_hand() -> None:
    expected = [
        0.2,
        0.6,  # 0.2 + 1 x (1 - 0.2) / 2
        0.868198051533946,  # 0.1 + 0.45 x (1 + cos 45 degrees)
        0.722207544564290,  # 0.1 + 0.45 x (1 + cos 67.5 degrees)
        0.55,  # halfway
        0.377792455435710,
        0.231801948466054,
        0.134254210369921,
        0.1,  # the end, and for ever after
        0.1,
    ]
    assert curve(10) == pytest.approx(expected, abs=1e-14)


def test_multistep_by_hand_and_what_is_not_known() -> None:
    found = curve(8, schedule="multistep", milestones=[6, 4], gamma=0.1)
    assert found == pytest.approx([0.2, 0.6, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    assert curve(1, warmup_steps=0) == [1.0]  # without warm-up: at the top
    with pytest.raises(ValueError, match="'linear' is not known: use cosine or multistep"):
        curve(1, schedule="linear")


def released(n: int, epochs: int, warmup_epochs: int, lr: float, **kwargs: Any) -> list[float]:
    """The released runs' rates: what main_simmim.py and timm 0.4.12's scheduler do, in sequence."""
    base, warmup_lr, min_lr = lr, kwargs["warmup_lr"], kwargs["min_lr"]
    num_steps, warmup_t = epochs * n, warmup_epochs * n
    slope = (base - warmup_lr) / warmup_t
    rate, rates = warmup_lr, []  # the scheduler's constructor
    for epoch in range(epochs):
        for idx in range(n):
            rates.append(rate)  # optimizer.step()
            t = epoch * n + idx  # then step_update
            if t < warmup_t:
                rate = warmup_lr + t * slope
            elif kwargs["schedule"] == "multistep":
                passed = sum(t >= milestone for milestone in kwargs["milestones"])
                rate = base * (0.1**passed)
            else:
                rate = min_lr + 0.5 * (base - min_lr) * (1 + math.cos(math.pi * t / num_steps))
    return rates


@pytest.mark.parametrize(
    "kwargs",
    [
        {"schedule": "cosine", "lr": 8e-4, "warmup_lr": 4e-6, "min_lr": 4e-5},
        {
            "schedule": "multistep",
            "lr": 4e-4,
            "warmup_lr": 2e-6,
            "min_lr": 2e-5,
            "milestones": [77, 84],
        },
    ],
)
def test_official_rates_to_the_last_digit(kwargs: dict[str, Any]) -> None:
    expected = released(7, 13, 2, **kwargs)
    found = [
        lr_at(step, total_steps=91, warmup_steps=14, compat="official", **kwargs)
        for step in range(91)
    ]
    assert found == expected
    assert found[0] == found[1] == kwargs["warmup_lr"]


def optimizer(scales: tuple[float, ...] = (1.0, 0.5)) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr_scale": scale} for scale in scales]
    return torch.optim.AdamW(groups)


def rates(optimizer: torch.optim.Optimizer, schedule: Schedule, n: int) -> list[list[float]]:
    found = []
    for _ in range(n):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


CURVE: dict[str, Any] = {
    "schedule": "cosine",
    "lr": 1.0,
    "total_steps": 4,
    "warmup_steps": 2,
    "warmup_lr": 0.2,
    "min_lr": 0.1,
}


def test_the_schedule_sets_each_group_times_its_scale() -> None:
    opt = optimizer()
    expected = [lr_at(step, **CURVE) for step in range(4)]
    assert rates(opt, Schedule(opt, **CURVE), 4) == [[lr, 0.5 * lr] for lr in expected]
    assert [group["initial_lr"] for group in opt.param_groups] == [1.0, 0.5]


def test_officially_all_layers_share_the_first_and_the_last_rate() -> None:
    opt = optimizer()
    found = rates(opt, Schedule(opt, **CURVE, compat="official"), 6)
    assert found[0] == found[1] == [0.2, 0.2]
    assert found[2] == pytest.approx([0.6, 0.35])  # 0.2 + (1 - 0.2) / 2 and 0.2 + (0.5 - 0.2) / 2
    assert found[5] == [0.1, 0.1]


@pytest.mark.parametrize("total_steps", [4, 8])
def test_a_run_goes_on_at_the_rates_of_the_curve_that_it_is_given_now(total_steps: int) -> None:
    first, second = optimizer(), optimizer()
    before = Schedule(first, **CURVE)
    rates(first, before, 2)
    given = {**CURVE, "total_steps": total_steps}
    after = Schedule(second, **given)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    assert rates(second, after, 2) == [[lr_at(t, **given) * s for s in (1, 0.5)] for t in (2, 3)]
    last = lr_at(4, **given)
    assert after.get_last_lr() == [last, 0.5 * last]


# Initialisation ----------------------------------------------------------------------------------


def test_the_official_init_of_the_vit() -> None:
    model = Holder("beit_base_patch16_224", embed_dim=128, init_values=0.1, **SHARED)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.encoder.model.rel_pos_bias.relative_position_bias_table.data.fill_(1)
    gammas = [block.gamma_1.clone() for block in model.encoder.model.blocks]
    init_official_(model)
    one_sigma = 0.02 * math.sqrt(1 - 2 * 0.24197072 / 0.68268949)  # of a normal cut at +- sigma
    assert one_sigma == pytest.approx(0.0108, abs=5e-5)
    vit = model.encoder.model
    for weight in (
        vit.patch_embed.proj.weight,
        vit.blocks[1].attn.qkv.weight,
        vit.blocks[2].mlp.fc1.weight,
    ):
        assert weight.std().item() == pytest.approx(one_sigma, rel=0.05)
        assert weight.abs().max() <= 0.02
    for token in (vit.cls_token, model.encoder.mask_token):
        assert 0.005 < token.std().item() < 0.016
        assert token.abs().max() <= 0.02
    for i, block in enumerate(vit.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(one_sigma / math.sqrt(2 * i), rel=0.05)
        assert block.attn.q_bias.abs().max() == block.mlp.fc1.bias.abs().max() == 0
        assert torch.equal(block.norm1.weight, torch.ones(128))
        assert torch.equal(block.gamma_1, gammas[i - 1])
    assert vit.rel_pos_bias.relative_position_bias_table.abs().max() == 0


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_the_official_init_of_swin(name: str) -> None:
    model = Holder(name, embed_dim=64)
    init_official_(model)
    swin = model.encoder.model
    for weight in (
        swin.layers[0].blocks[1].attn.qkv.weight,
        swin.layers[1].downsample.reduction.weight,
        swin.layers[1].blocks[0].mlp.fc2.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.abs().max() > 0.05
    bound = 1 / math.sqrt(3 * 2 * 2)  # torch's default for a convolution of 3 x 2 x 2 inputs
    assert bound * 0.9 < swin.patch_embed.proj.weight.abs().max() <= bound
    norm = swin.layers[0].blocks[0].norm1.weight
    assert torch.equal(norm, torch.zeros(64) if "v2" in name else torch.ones(64))
    if "v2" in name:
        scale = swin.layers[0].blocks[0].attn.logit_scale
        assert torch.equal(scale, torch.full_like(scale, math.log(10)))
    else:
        table = torch.cat(
            [p.flatten() for n, p in swin.named_parameters() if n.endswith("bias_table")]
        )
        assert table.std().item() == pytest.approx(0.02, rel=0.1)


def test_there_is_no_official_init_of_other_encoders() -> None:
    with pytest.raises(ValueError, match="use compat"):
        init_official_(Holder("test_resnet"))
