"""Official files: the same reconstruction, loss and optimisation as the official code."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import official_reference as reference
from official_reference import Spec, Swin, Tensors, ViT
from simmim.commands.convert import convert
from simmim.masking import upsample_mask
from simmim.optim import Schedule, param_groups
from simmim.pretrain import SimMIM, load_official
from simmim.weights import load_encoder

SPECS: dict[str, Spec] = {
    "vit-shared": ViT(),
    "vit-shared-no-layer-scale": ViT(layer_scale=False),
    "vit-per-block": ViT(positions="per_block"),
    "vit-absolute": ViT(positions="absolute"),
    "vit-absolute-no-layer-scale": ViT(positions="absolute", layer_scale=False),
    "vit-none": ViT(positions="none"),
    "vit-two-channels": ViT(in_chans=2, patch_size=4),
    "swin": Swin(),
    "swin-window-of-a-stage": Swin(window_size=8),
    "swin-three-stages": Swin(depths=[2, 1, 1], num_heads=[1, 2, 4]),
    "swin-odd-window": Swin(img_size=40, window_size=5),
    "swinv2": Swin(v2=True),
    "swinv2-window-of-a-stage": Swin(window_size=8, v2=True),
}
CELL = 8


def draw(spec: Spec, n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Images, a mask of cells, and the same mask as the official code has it, of tokens."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, spec.in_chans, spec.img_size, spec.img_size, generator=generator)
    grid = spec.img_size // CELL
    mask = torch.rand(n, grid, grid, generator=generator) < 0.6
    return images, mask, upsample_mask(mask, (spec.side, spec.side))[:, 0].float()


def untold(spec: Spec) -> dict[str, Any]:
    """What neither shapes nor buffers tell of a model."""
    if not isinstance(spec, ViT) or spec.positions in ("shared", "per_block"):
        return {}
    size = {"img_size": spec.img_size} if spec.positions == "none" else {}
    return {"num_heads": spec.num_heads, **size}


def assert_same(model: SimMIM, tensors: Tensors, spec: Spec) -> None:
    """Reconstruction within 2e-5, loss within 1e-6."""
    images, mask, tokens = draw(spec)
    expected = reference.reconstruct(tensors, spec, images, tokens)
    model.eval()
    with torch.no_grad():
        prediction = model(images, mask)
        loss, _ = model.loss_of(images, mask, torch.arange(len(images)))
    assert expected.std() > 0.3
    assert (prediction - expected).abs().max() < 2e-5
    assert abs(loss - reference.loss_of(images, expected, tokens, spec)) < 1e-6


# Parity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_file_gives_the_official_reconstruction_and_so_does_its_mapping(
    spec: Spec, tmp_path: Path
) -> None:
    tensors = reference.make_tensors(spec)
    path = reference.save_file(tmp_path / "x.pth", tensors, reference.config_of(spec))
    model = load_official(path)
    assert model.encoder.mask_patch_size == CELL  # as its configuration says
    assert model.hparams["mask_ratio"] == 0.5
    assert model.encoder.img_size == (spec.img_size, spec.img_size)
    assert model.encoder.stride == spec.features[1]
    assert_same(model, tensors, spec)

    more = {**tensors, "ema.step": torch.zeros(1)}
    again = load_official(more, mask_patch_size=CELL, **untold(spec))
    assert again.encoder.img_size == model.encoder.img_size
    assert again.hparams["encoder_kwargs"] == model.hparams["encoder_kwargs"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    report = again.report  # every tensor is accounted for
    assert set(report.used) | set(report.dropped) == set(more)
    assert not set(report.used) & set(report.dropped)
    assert not report.missing
    assert not report.head_is_new
    state = set(again.state_dict())
    assert set(report.used.values()) == {n for n in state if n.startswith(("encoder.", "head."))}
    buffers = {n for n in tensors if n.endswith(("index", "attn_mask", "coords_table"))}
    assert {n for n, why in report.dropped.items() if why == "computed anew"} == buffers
    assert report.dropped["ema.step"] == "no part of an encoder"


def test_without_buffers_a_file_needs_its_configuration(tmp_path: Path) -> None:
    for spec in (Swin(), Swin(v2=True)):
        tensors = {
            name: tensor
            for name, tensor in reference.make_tensors(spec).items()
            if not name.endswith(("index", "mask", "coords_table"))
        }
        path = reference.save_file(tmp_path / "x.pth", tensors, reference.config_of(spec))
        assert_same(load_official(path), tensors, spec)
        with pytest.raises(ValueError, match="say it, as in"):
            load_official(tensors, mask_patch_size=CELL)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (
            ViT(),
            "blocks.0.gamma_1 blocks.2.attn.q_bias blocks.2.attn.v_bias norm.bias cls_token "
            "mask_token rel_pos_bias.relative_position_bias_table",
        ),
        (ViT(positions="per_block"), "blocks.1.attn.relative_position_bias_table"),
        (ViT(positions="absolute"), "pos_embed"),
        (
            Swin(),
            "layers.0.blocks.1.attn.relative_position_bias_table layers.0.downsample.norm.bias",
        ),
        (
            Swin(v2=True),
            "layers.0.blocks.0.attn.logit_scale layers.1.blocks.1.attn.cpb_mlp.2.weight",
        ),
    ],
    ids=["vit", "vit-per-block", "vit-absolute", "swin", "swinv2"],
)
def test_every_part_matters_in_the_reference(spec: Spec, parts: str) -> None:
    # With weights near their initialisation a missing table moves the loss by 2e-6 alone.
    tensors = reference.make_tensors(spec)
    images, _, tokens = draw(spec)
    expected = reference.reconstruct(tensors, spec, images, tokens)
    for part in parts.split():
        tensor = tensors[f"encoder.{part}"]
        changed = {**tensors, f"encoder.{part}": tensor + 0.1 * torch.randn(tensor.shape)}
        other = reference.reconstruct(changed, spec, images, tokens)
        assert (other - expected).abs().max() > 1e-3, part
    wrong = replace(spec)
    wrong.eps = 1e-5 if isinstance(spec, ViT) else 1e-6  # type: ignore[misc]
    other = reference.reconstruct(tensors, wrong, images, tokens)
    assert (other - expected).abs().max() > 1e-4


# Sizes -------------------------------------------------------------------------------------------


def test_released_swinv2_files_may_say_rpe_mlp() -> None:
    spec = Swin(v2=True)
    tensors = reference.make_tensors(spec)
    old = {name.replace("cpb_mlp", "rpe_mlp"): tensor for name, tensor in tensors.items()}
    assert_same(load_official(old, mask_patch_size=CELL), tensors, spec)


def test_swinv2_coordinates_relative_to_another_window(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Swin(v2=True)
    images, _, tokens = draw(spec)
    tensors = reference.make_tensors(spec)
    plain = reference.reconstruct(tensors, spec, images, tokens)
    monkeypatch.setattr(reference, "coords_table", partial(reference.coords_table, pretrained=3))
    assert (reference.reconstruct(tensors, spec, images, tokens) - plain).abs().max() > 1e-3
    tensors = reference.make_tensors(spec)
    model = load_official(tensors, mask_patch_size=CELL)
    assert model.hparams["encoder_kwargs"]["pretrained_window_sizes"] == [3, 3]
    assert_same(model, tensors, spec)


def test_the_normalised_target_of_a_swinv2_file(tmp_path: Path) -> None:
    spec = Swin(v2=True)
    config = reference.config_of(spec)
    config["MODEL"]["SIMMIM"] = {"NORM_TARGET": {"ENABLE": True, "PATCH_SIZE": 47}}
    path = reference.save_file(tmp_path / "x.pth", reference.make_tensors(spec), config)
    model = load_official(path)
    assert model.hparams["target"] == "normalized_pixels"
    assert model.hparams["target_kwargs"] == {"window": 47}
    assert load_official(path, target="pixels").hparams["target_kwargs"] is None


def test_what_is_given_wins() -> None:
    spec = ViT(positions="absolute")
    tensors = reference.make_tensors(spec)
    model = load_official(
        tensors, num_heads=2, img_size=64, mask_patch_size=16, drop_path_rate=0.1, base_lr=1e-3
    )
    assert model.encoder.model.blocks[0].attn.num_heads == 2
    assert model.encoder.img_size == (64, 64)
    assert model.encoder.model.pos_embed.shape == (1, 65, 24)
    assert model.encoder.mask_patch_size == 16
    assert model.hparams["drop_path_rate"] == 0.1
    assert model.hparams["base_lr"] == 1e-3
    assert "drop_path_rate" not in model.hparams["encoder_kwargs"]


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("encoder.blocks.1.mlp.fc2.bias", "lacks blocks.1.mlp.fc2.bias of the encoder"),
        ("encoder.norm.weight", "lacks norm.weight of the encoder"),
        ("encoder.mask_token", "no pretraining file, .*: use it as it is"),
        ("decoder.0.weight", "no pretraining file, .*: use it as it is"),
        ("encoder.patch_embed.proj.weight", "no official SimMIM or Swin file"),
    ],
)
def test_what_is_not_complete_is_refused(name: str, words: str) -> None:
    tensors = reference.make_tensors(ViT())
    del tensors[name]
    with pytest.raises(ValueError, match=words):
        load_official(tensors, mask_patch_size=CELL)


def test_what_no_timm_model_has_is_refused() -> None:
    tensors = reference.make_tensors(Swin())
    positions = {"encoder.absolute_pos_embed": torch.zeros(1, 256, 12)}
    with pytest.raises(ValueError, match="has absolute_pos_embed, unlike any Swin of timm"):
        load_official({**tensors, **positions})
    with pytest.raises(ValueError, match="for which the encoder has no place"):
        load_official(
            {**reference.make_tensors(ViT()), "encoder.blocks.0.attn.k_bias": torch.zeros(24)},
            mask_patch_size=CELL,
        )


def test_sizes_that_nothing_tells_are_asked_for() -> None:
    tensors = reference.make_tensors(ViT(positions="none"))
    with pytest.raises(ValueError, match="num_heads of its model: say it, as in num_heads="):
        load_official(tensors, img_size=32)
    with pytest.raises(ValueError, match="img_size of its model"):
        load_official(tensors, num_heads=3)


# Checkpoints and encoders ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("spec", [ViT(), Swin(v2=True)], ids=["vit", "swinv2"])
def test_a_converted_file_is_a_checkpoint_of_ours(spec: Spec, tmp_path: Path) -> None:
    tensors = reference.make_tensors(spec)
    path = reference.save_file(tmp_path / "x.pth", tensors, reference.config_of(spec))
    out = tmp_path / "new" / "x.ckpt"
    report = convert(path, out)
    assert len(report.used) + len(report.dropped) == len(tensors)
    assert torch.load(out, weights_only=True)
    assert_same(SimMIM.load_from_checkpoint(out), tensors, spec)
    assert [file.name for file in out.parent.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("spec", [ViT(), Swin(), Swin(v2=True)], ids=["vit", "swin", "swinv2"])
def test_the_encoder_of_a_pretraining_file(spec: Spec, tmp_path: Path) -> None:
    tensors = reference.make_tensors(spec)
    path = reference.save_file(tmp_path / "x.pth", tensors, None)
    encoder = load_encoder(path).eval()
    images, _, tokens = draw(spec)
    expected = reference.encode(tensors, spec, images, torch.zeros_like(tokens))
    with torch.no_grad():
        features = encoder.forward_features(images)
    features = (
        features[:, 1:].transpose(1, 2) if spec.kind == "vit" else features.permute(0, 3, 1, 2)
    )
    assert (features.reshape(expected.shape) - expected).abs().max() < 2e-5
    names = ("decoder.0.bias", "decoder.0.weight", "encoder.mask_token")
    assert {encoder.report.dropped[name] for name in names} == {"for pretraining alone"}


def fine_tuned(spec: Spec, classes: int = 5) -> Tensors:
    """The file that the official fine-tuning writes: no prefix, no decoder, a head."""
    tensors = {
        name.removeprefix("encoder."): tensor
        for name, tensor in reference.make_tensors(spec).items()
        if not name.startswith("decoder.") and "mask_token" not in name
    }
    if spec.kind == "vit":
        for part in ("weight", "bias"):
            tensors[f"fc_norm.{part}"] = tensors.pop(f"norm.{part}")
    width, _ = spec.features
    generator = torch.Generator().manual_seed(5)
    tensors["head.weight"] = torch.randn(classes, width, generator=generator)
    tensors["head.bias"] = torch.randn(classes, generator=generator)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [ViT(positions="per_block"), Swin(), Swin(v2=True)],
    ids=["vit", "swin", "swinv2"],
)
def test_a_fine_tuned_file_keeps_its_classifier(spec: Spec, tmp_path: Path) -> None:
    tensors = fine_tuned(spec)
    path = reference.save_file(tmp_path / "x.pth", tensors, None)
    model = load_encoder(path).eval()
    images, _, tokens = draw(spec)
    visible = torch.zeros_like(tokens)
    if spec.kind == "vit":  # its norm stands behind the pooling
        bare = {**tensors, "norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
        bare["mask_token"] = torch.zeros(1, 1, 24)
        t = bare
        x = torch.nn.functional.conv2d(
            images, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=8
        )
        x = reference._vit(x.flatten(2).transpose(1, 2), t, spec)
        pooled = reference.norm(x.mean(1), t, "fc_norm", spec.eps)
    else:
        with_token = {**tensors, "mask_token": torch.zeros(1, 1, spec.embed_dim)}
        pooled = reference.encode(with_token, spec, images, visible).mean((2, 3))
    expected = pooled @ tensors["head.weight"].T + tensors["head.bias"]
    with torch.no_grad():
        assert (model(images) - expected).abs().max() < 2e-5
        assert load_encoder(path, num_classes=0)(images).shape == pooled.shape
    other = load_encoder(path, num_classes=7)
    assert other.report.dropped["head.weight"] == "the classifier of other classes"
    assert set(other.report.missing.values()) == {"the head begins anew"}


def test_fine_tuning_the_vit_shares_its_table_out(tmp_path: Path) -> None:
    spec = ViT()
    tensors = reference.make_tensors(spec)
    path = reference.save_file(tmp_path / "x.pth", tensors, None)
    model = load_encoder(
        path,
        use_rel_pos_bias=True,
        use_shared_rel_pos_bias=False,
        global_pool="avg",
        num_classes=4,
    )
    table = tensors["encoder.rel_pos_bias.relative_position_bias_table"]
    for block in model.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, table)
        assert block.attn.relative_position_bias_table.data_ptr() != table.data_ptr()
    assert model.report.dropped["encoder.norm.weight"].startswith("mean pooling")
    assert set(model.report.missing) == {
        f"encoder.model.{module}.{part}"
        for module in ("fc_norm", "head")
        for part in ("weight", "bias")
    }
    assert isinstance(model.norm, torch.nn.Identity)


# Optimisation ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [ViT(), ViT(positions="absolute"), Swin(), Swin(v2=True)], ids=lambda s: s.kind
)
def test_five_steps_of_adamw_agree(spec: Spec) -> None:
    tensors = reference.make_tensors(spec)
    model = load_official(tensors, mask_patch_size=CELL, **untold(spec)).train()
    images, mask, tokens = draw(spec, 4)
    keys = torch.arange(4)

    rate = {"warmup_lr": 2e-4, "lr": 1e-3}
    optimizer = torch.optim.AdamW(param_groups(model, 0.5, compat="official"))
    schedule = Schedule(
        optimizer, schedule="cosine", total_steps=20, warmup_steps=4, compat="official", **rate
    )
    losses = []
    for _ in range(5):
        loss, _ = model.loss_of(images, mask, keys)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    theirs = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    expected = _official_steps(theirs, spec, images, tokens, rate)
    assert losses == pytest.approx(expected, abs=2e-6)
    assert losses[-1] < losses[0]
    state = model.state_dict()
    for name, ours in model.report.used.items():
        found, wanted = state[ours], theirs[name].detach()
        if name.endswith("qkv.bias"):  # a key's bias has no gradient, but for rounding
            found, wanted = (x.unflatten(0, (3, -1))[::2] for x in (found, wanted))
        assert (found - wanted).abs().max() < 1e-5, name
        assert (tensors[name] - theirs[name]).abs().max() > 1e-4, name


def _official_steps(
    tensors: Tensors, spec: Spec, images: Tensor, tokens: Tensor, rate: dict[str, float]
) -> list[float]:
    """Five steps as main_simmim.py and optimizer.py make them."""
    trained = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(("index", "attn_mask", "coords_table"))
    }
    spared_matrices = {"encoder.pos_embed", "encoder.cls_token"}
    if spec.kind != "vit":
        spared_matrices = {"encoder.absolute_pos_embed", "encoder.mask_token"}
    spared = {
        name
        for name, tensor in trained.items()
        if tensor.ndim == 1 or name.endswith(".bias") or name in spared_matrices
    }
    decayed = [tensor for name, tensor in trained.items() if name not in spared]
    groups = [
        {"params": decayed},
        {"params": [trained[name] for name in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate["warmup_lr"], weight_decay=0.5)
    slope, losses = (rate["lr"] - rate["warmup_lr"]) / 4, []
    for step in range(5):
        prediction = reference.reconstruct(tensors, spec, images, tokens)
        loss = reference.loss_of(images, prediction, tokens, spec)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 5.0)
        optimizer.step()
        for group in optimizer.param_groups:  # the scheduler is told of step k after step k
            group["lr"] = rate["warmup_lr"] + step * slope
        losses.append(loss.item())
    return losses
