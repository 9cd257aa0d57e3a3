"""Weights to go on from: ours, timm's and official ones, into a model of another shape."""

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import official_reference as reference
from official_reference import Swin, ViT
from simmim.classify import Classifier
from simmim.commands.convert import convert
from simmim.pretrain import SimMIM
from simmim.weights import load_encoder, load_weights
from simmim.weights.resize import resize_positions, resize_table
from support import beyond

KWARGS: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "global_pool": ""}


def tiny(encoder: str = "vit_tiny_patch16_224", **kwargs: Any) -> SimMIM:
    defaults = {"img_size": 32, "mask_patch_size": 8, "encoder_kwargs": KWARGS}
    return SimMIM(encoder, **{**defaults, **kwargs})


def checkpoint(model: SimMIM, folder: Path) -> Path:
    """A run's folder with the last checkpoint of a model in it."""
    file = folder / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    state = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    torch.save({"state_dict": state, "hyper_parameters": dict(model.hparams)}, file)
    return folder


def assert_equal_states(a: SimMIM, b: SimMIM, prefix: str) -> None:
    found, expected = a.state_dict(), b.state_dict()
    for name in expected:
        if name.startswith(prefix):
            assert torch.equal(found[name], expected[name]), name


# Ours --------------------------------------------------------------------------------------------


def test_a_run_of_ours_comes_back_whole(tmp_path: Path) -> None:
    first = tiny()
    run = checkpoint(first, tmp_path / "version_0")
    second = tiny(weights=str(run))
    assert_equal_states(second, first, "encoder.")
    assert_equal_states(second, first, "head.")
    report = load_weights(tiny(), run)
    assert report.dropped == dict.fromkeys(("mean", "std"), "the statistics of its data")
    assert not report.missing
    assert not report.head_is_new


def test_the_encoder_of_a_run_of_ours(tmp_path: Path) -> None:
    first = tiny().eval()
    run = checkpoint(first, tmp_path / "version_0")
    encoder: Any = load_encoder(run, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            encoder.forward_features(images), first.encoder.model.forward_features(images)
        )
    assert encoder(images).shape == (2, 3)
    assert not encoder.patch_embed._forward_hooks
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.report.dropped["encoder.mask_token"] == "for pretraining alone"


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ({"head": "mlp"}, "head."),
        ({"target": "patch_normalized_pixels", "target_kwargs": {"patch_size": 4}}, ""),
        ({"head": "transformer"}, "head."),
        ({"mask_fill": "zero"}, ""),
    ],
)
def test_what_does_not_fit_a_new_task_begins_anew(
    change: dict[str, Any], new: str, tmp_path: Path
) -> None:
    first = tiny()
    run = checkpoint(first, tmp_path / "version_0")
    second = tiny(**change)
    report = load_weights(second, run)
    assert_equal_states(second, first, "encoder.model.")
    assert report.head_is_new == (new == "head.")
    assert set(report.missing) == {n for n in second.state_dict() if new and n.startswith(new)}
    if "mask_fill" in change:
        assert report.dropped["encoder.mask_token"] == "no mask token is used here"


def test_colour_weights_on_gray_images(tmp_path: Path) -> None:
    first = tiny()
    run = checkpoint(first, tmp_path / "version_0")
    second = tiny(in_chans=1)
    report = load_weights(second, run)
    kernel = first.encoder.model.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(second.encoder.model.patch_embed.proj.weight, kernel)
    assert report.dropped["head.proj.weight"] == "the head of another prediction"
    assert report.head_is_new


@pytest.mark.parametrize("resize", ["official", "timm"])
@pytest.mark.filterwarnings("ignore")  # timm's interpolation on torch 2.9 and later
def test_positions_take_the_new_size(resize: Any, tmp_path: Path) -> None:
    for name, kwargs, size in (
        ("vit_tiny_patch16_224", KWARGS, [40, 48]),
        ("beit_base_patch16_224", {**KWARGS, **SHARED}, [48, 40]),
    ):
        first = tiny(name, encoder_kwargs=kwargs)
        run = checkpoint(first, tmp_path / name)
        second = tiny(name, encoder_kwargs=kwargs, img_size=size)
        load_weights(second, run, resize=resize)
        old, new = first.encoder.model, second.encoder.model
        grid = (size[0] // 4, size[1] // 4)
        if old.pos_embed is not None:
            expected = resize_positions(old.pos_embed, grid, 1, method=resize)
            assert torch.equal(new.pos_embed, expected)
        else:
            table = old.rel_pos_bias.relative_position_bias_table
            expected = resize_table(table, grid, method=resize)
            assert torch.equal(new.rel_pos_bias.relative_position_bias_table, expected)
        back: Any = load_encoder(checkpoint(second, tmp_path / f"{name}-2"), img_size=32)
        assert back.patch_embed.grid_size == (8, 8)


def test_swins_window_grows_with_the_image(tmp_path: Path) -> None:
    spec = Swin()
    tensors = reference.make_tensors(spec)
    path = reference.save_file(tmp_path / "x.pth", tensors, reference.config_of(spec))
    encoder: Any = load_encoder(path, img_size=48, window_size=6)
    for stage, block in ((0, 1), (1, 0)):
        name = f"layers.{stage}.blocks.{block}.attn.relative_position_bias_table"
        expected = resize_table(tensors[f"encoder.{name}"], (6, 6))
        assert torch.equal(encoder.get_parameter(name), expected)
    assert encoder(torch.randn(1, 3, 48, 48)).shape == (1, 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "kwargs", "words"),
    [
        (
            "vit_tiny_patch16_224",
            {**KWARGS, "depth": 3},
            r"lacks blocks.2.norm1.weight, .* more",
        ),
        ("vit_tiny_patch16_224", {**KWARGS, "depth": 1}, r"has blocks.1.*no place"),
        ("vit_tiny_patch16_224", {**KWARGS, "embed_dim": 48}, r"of shape \(1, 1, 24\)"),
        ("vit_tiny_patch16_224", {**KWARGS, "num_heads": 4}, r"has \[3\] attention heads"),
        ("beit_base_patch16_224", KWARGS, "no place: build it as vit_tiny_patch16_224 of img_size"),
        ("resnet10t", None, "attention heads"),
    ],
)
def test_another_encoder_is_refused(
    encoder: str, kwargs: dict[str, Any] | None, words: str, tmp_path: Path
) -> None:
    run = checkpoint(tiny(), tmp_path / "version_0")
    second = tiny(encoder, encoder_kwargs=kwargs, mask_patch_size=32)
    with pytest.raises(ValueError, match=words) as error:
        load_weights(second, run)
    assert "\n" not in str(error.value)


# timm's ------------------------------------------------------------------------------------------


def test_timms_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    original = timm.create_model

    def create(name: str, pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        if pretrained:
            given.update(kwargs, name=name)
        torch.manual_seed(7 if pretrained else 8)
        return original(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    model = tiny(img_size=[32, 40], weights="timm:vit_tiny_patch16_224")
    assert given["name"] == "vit_tiny_patch16_224"
    assert given["img_size"] == (32, 40)  # timm resizes its own positions
    assert given["depth"] == 2
    torch.manual_seed(7)
    sizes = {"img_size": (32, 40), "num_classes": 0, "drop_path_rate": 0.0}
    expected = original("vit_tiny_patch16_224", **sizes, **KWARGS)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.encoder.model.state_dict()[name], tensor)
    assert model.report.head_is_new


def test_what_timm_cannot_fetch_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'vit_tinny_patch16_224' is not a model of timm"):
        load_encoder("timm:vit_tinny_patch16_224")

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"could not fetch its weights of .*: no network$"):
        load_encoder("timm:vit_tiny_patch16_224")


def test_a_folder_of_timms(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **KWARGS).eval()
    save_for_hf(model, tmp_path, model_args={**KWARGS, "img_size": 32}, safe_serialization=True)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path).eval()(images), model(images))
    assert load_encoder(tmp_path, num_classes=2)(images).shape == (1, 2)
    found = tiny(weights=str(tmp_path)).encoder.model.blocks[1].mlp.fc1.weight
    assert torch.equal(found, model.blocks[1].mlp.fc1.weight)


# Official files ----------------------------------------------------------------------------------


STATE_DICTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "ddp": lambda state: {f"module.{name}": t for name, t in state.items()},
    "script": lambda state: {"state_dict": state, "args": Namespace(lr=1), "optimizer": {}},
    "lightning": lambda state: {
        "state_dict": {f"model.{name}": t for name, t in state.items()}
        | {"fc.bias": torch.ones(2)},
        "hyper_parameters": {"encoder": "vit", "lr": 1},
    },
    "mae": lambda state: {
        "model": state | {"mask_token": torch.ones(1, 1, 8), "decoder_embed.bias": torch.ones(8)}
    },
}


@pytest.mark.parametrize(
    "kind", beyond(2, ["bare", "lightning", *sorted(STATE_DICTS.keys() - {"bare", "lightning"})])
)
def test_the_state_dict_of_a_vit(kind: str, tmp_path: Path) -> None:
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=0, qk_norm=True, reg_tokens=2, **KWARGS
    ).eval()
    file = tmp_path / "x.pth"
    torch.save(STATE_DICTS[kind](model.state_dict()), file)
    with pytest.raises(ValueError, match=r"does not tell the name of its model: .*--encoder NAME"):
        load_encoder(file)
    whole = {**KWARGS, "qk_norm": True, "reg_tokens": 2}
    converted = tmp_path / "x.ckpt"
    convert(file, converted, num_heads=3)
    images = torch.randn(2, 3, 32, 32)
    for encoder in (
        load_encoder(file, num_heads=3),
        load_encoder(file, encoder="vit_tiny_patch16_224", **whole),
        load_encoder(converted),
        Classifier(str(file), "vit_tiny_patch16_224", encoder_kwargs=whole, frozen=True).model,
        tiny(weights=str(file), encoder_kwargs=whole).encoder.model,
    ):
        with torch.no_grad():
            features = cast(Any, encoder).eval().forward_features(images)
        assert torch.equal(features, model.forward_features(images))
        assert len(encoder.state_dict()) == len(model.state_dict())
    report = load_encoder(file, num_heads=3).report
    assert len(report.used) == len(model.state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"patch_size": 8}, {"patch_size": 4}),
        ({"depth": 1, "mlp_ratio": 2}, {"depth": 2, "mlp_ratio": 4.0}),
        ({"class_token": False, "global_pool": "avg"}, {"class_token": True}),
        ({"reg_tokens": 1}, {"reg_tokens": 0}),
    ],
)
def test_what_a_state_dict_is_of_is_said(
    options: dict[str, Any], remedy: dict[str, Any], tmp_path: Path
) -> None:
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, img_size=32, num_classes=0, **KWARGS)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=re.escape(f"encoder_kwargs {remedy}")):
        load_encoder(tmp_path / "x.pth", encoder=name, **{**KWARGS, **options})
    load_encoder(tmp_path / "x.pth", encoder=name, **{**KWARGS, **options, **remedy})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("resnet10t", {}),
        ("convnext_atto", {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2]}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}),
    ],
)
def test_the_state_dict_of_any_encoder(
    encoder: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model: Any = timm.create_model(encoder, num_classes=5, **options).eval()
    file = tmp_path / "x.safetensors"
    save_file(model.state_dict(), file)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        whole: Any = load_encoder(file, encoder=encoder, **options).eval()
        assert torch.equal(whole(images), model(images))
    report: Any = load_encoder(file, encoder=encoder, num_classes=3, **options).report
    assert "dropped (the classifier of other classes)" in str(report)
    with pytest.raises(ValueError, match="give the name of its model"):
        load_encoder(file, encoder="resnet34")
    with pytest.raises(ValueError, match="does not tell the name of its model"):
        load_encoder(file)


def test_what_was_resized_or_adapted_is_said(tmp_path: Path) -> None:
    run = checkpoint(tiny(), tmp_path / "version_0")
    larger: Any = load_encoder(run, img_size=48, in_chans=1).report
    assert "30 tensors used, 1 of them resized from 8 x 8 to 12 x 12, 1 of them" in str(larger)
    assert "1 of them adapted from 3 to 1 channels" in str(larger)
    assert larger.changed["encoder.model.pos_embed"] == "resized from 8 x 8 to 12 x 12"
    assert not load_encoder(run).report.changed  # type: ignore[union-attr]


def test_going_on_from_an_official_file(tmp_path: Path) -> None:
    spec = ViT(embed_dim=24, depth=2, num_heads=3, mlp_ratio=4, patch_size=4)
    tensors = reference.make_tensors(spec)
    path = reference.save_file(tmp_path / "x.pth", tensors, reference.config_of(spec))
    kwargs = {**KWARGS, **SHARED}
    model = tiny("beit_base_patch16_224", encoder_kwargs=kwargs, weights=str(path))
    assert torch.equal(model.head.proj.bias, tensors["decoder.0.bias"])
    assert torch.equal(model.encoder.mask_token, tensors["encoder.mask_token"])
    per_block = {**KWARGS, "global_pool": ""}
    model = tiny("beit_base_patch16_224", encoder_kwargs=per_block, weights=str(path))
    shared = tensors["encoder.rel_pos_bias.relative_position_bias_table"]
    assert torch.equal(model.encoder.model.blocks[1].attn.relative_position_bias_table, shared)
    with pytest.raises(
        ValueError, match=r"has blocks.0.gamma_1.*build it as beit_base_patch16_224"
    ):
        load_weights(
            tiny("beit_base_patch16_224", encoder_kwargs={**kwargs, "init_values": 0.0}), path
        )
