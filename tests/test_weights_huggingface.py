"""Hugging Face folders: the same features, reconstruction and loss as transformers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simmim.pretrain import SimMIM
from simmim.weights import load_encoder, load_weights

VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "encoder_stride": 4,
}
BEIT = {name: value for name, value in VIT.items() if name != "encoder_stride"}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 3],
    "window_size": 4,
    "encoder_stride": 4,
}
OURS = {
    "vit_base_patch16_224": {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "swin_base_patch4_window7_224": {
        "patch_size": 2,
        "embed_dim": 12,
        "depths": [2, 2],
        "num_heads": [2, 3],
        "window_size": 4,
    },
}


def save(kind: str, folder: Path, **config: Any) -> Any:
    """A transformers model with weights so large that every part of it matters, and its folder."""
    import transformers as hf  # seconds, which the fast tests are spared

    model = getattr(hf, kind)(getattr(hf, kind).config_class(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1, 0.2)
            elif parameter.ndim > 1 and "embeddings" not in name and "table" not in name:
                parameter.normal_(0, 1.2 * parameter[0].numel() ** -0.5)
            elif "projection" in name:
                parameter.normal_(0, 0.02)  # so small that the norms' epsilon matters
            else:
                parameter.normal_(0, 0.3)
    hf.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model


def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        features = model.eval().forward_features(images)  # type: ignore[operator]
    return features.flatten(1, 2) if features.ndim == 4 else features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ViTModel", VIT),
        ("ViTForImageClassification", {**VIT, "qkv_bias": False}),
        ("DeiTForMaskedImageModeling", VIT),
        ("DeiTForImageClassificationWithTeacher", VIT),
        ("BeitModel", {**BEIT, "use_relative_position_bias": True}),
        (
            "BeitModel",
            {
                **BEIT,
                "use_absolute_position_embeddings": True,
                "use_mean_pooling": False,
                "layer_scale_init_value": 0.0,
            },
        ),
        ("BeitForImageClassification", {**BEIT, "use_shared_relative_position_bias": True}),
        (
            "BeitForMaskedImageModeling",
            {**BEIT, "use_shared_relative_position_bias": True, "use_mask_token": True},
        ),
        ("SwinModel", SWIN),
        ("SwinForMaskedImageModeling", SWIN),
        ("Swinv2ForMaskedImageModeling", SWIN),
    ],
)
def test_features_are_those_of_transformers(
    kind: str, config: dict[str, Any], tmp_path: Path
) -> None:
    model = save(kind, tmp_path / "x", **config)
    encoder: Any = load_encoder(tmp_path / "x")
    images = torch.randn(2, 3, 16, 16)
    base = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        expected = base(images).last_hidden_state
        if kind == "BeitForMaskedImageModeling":  # its last norm is the head's
            expected = model.layernorm(expected)
    assert expected.std() > 0.3
    assert (tokens_of(encoder, images) - expected).abs().max() < 1e-5
    report = encoder.report
    assert set(report.used) | set(report.dropped) == set(_names(tmp_path / "x"))
    assert set(report.missing.values()) <= {"the head begins anew"}


def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.slow
def test_mean_pooling_keeps_its_norm(tmp_path: Path) -> None:
    model = save("BeitModel", tmp_path / "x", **BEIT, use_relative_position_bias=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images).pooler_output
        assert (load_encoder(tmp_path / "x").eval()(images) - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("encoder", OURS)
def test_going_on_with_a_masked_model_and_its_decoder(encoder: str, tmp_path: Path) -> None:
    kind = "ViT" if encoder.startswith("vit") else "Swin"
    config = VIT if kind == "ViT" else SWIN
    theirs = save(f"{kind}ForMaskedImageModeling", tmp_path / "x", **config)
    model = SimMIM(
        encoder,
        img_size=16,
        mask_patch_size=4,
        mask_ratio=0.5,
        encoder_kwargs={**OURS[encoder], **({"mlp_ratio": 2.0} if kind == "ViT" else {})},
        weights=str(tmp_path / "x"),
    ).eval()
    images, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 4, 4) < 0.5
    finest = mask.repeat_interleave(4 // config["patch_size"], 1)  # type: ignore[operator]
    finest = finest.repeat_interleave(4 // config["patch_size"], 2)  # type: ignore[operator]
    with torch.no_grad():
        expected = theirs(images, bool_masked_pos=finest.flatten(1))
        assert (model(images, mask) - expected.reconstruction).abs().max() < 2e-5
        loss, _ = model.loss_of(images, mask, torch.arange(2))
    assert abs(loss - expected.loss) < 1e-6


@pytest.mark.slow
def test_a_checkpoint_keeps_the_epsilon_of_the_weights(tmp_path: Path) -> None:
    save("ViTModel", tmp_path / "x", **VIT)
    name = "vit_base_patch16_224"
    kwargs = {**OURS[name], "mlp_ratio": 2.0}
    model = SimMIM(name, img_size=16, mask_patch_size=4, encoder_kwargs=kwargs)
    report = load_weights(model, tmp_path / "x")
    assert report.head_is_new
    assert report.missing["encoder.mask_token"] == "the mask token begins anew"
    again = SimMIM(**{k: v for k, v in model.hparams.items() if k != "optimizer"})
    for one in (model, again):
        assert {m.eps for m in one.encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}


def test_what_timm_does_not_have_is_refused(tmp_path: Path) -> None:
    for config, words in (
        ({"model_type": "resnet"}, "holds a resnet: use one of vit, deit, beit, swin, swinv2"),
        ({"model_type": "vit", "hidden_act": "relu"}, "has the activation 'relu'"),
        ({"model_type": "swin", "use_absolute_embeddings": True}, "has absolute positions"),
        ({}, "names no model of timm or Hugging Face"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            load_encoder(tmp_path)


@pytest.mark.slow
def test_another_number_of_heads_is_refused(tmp_path: Path) -> None:
    save("ViTModel", tmp_path / "x", **VIT)  # no shape tells its 3 heads
    kwargs = {**OURS["vit_base_patch16_224"], "num_heads": 2, "mlp_ratio": 2.0}
    with pytest.raises(ValueError, match=r"has \[3\] attention heads and the encoder \[2\]"):
        SimMIM(img_size=16, mask_patch_size=4, encoder_kwargs=kwargs, weights=str(tmp_path / "x"))


@pytest.mark.slow
def test_an_incomplete_attention_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save("ViTModel", tmp_path / "x", **VIT)
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.1.attention.attention.key.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="lacks the key of"):
        load_encoder(tmp_path / "x")
