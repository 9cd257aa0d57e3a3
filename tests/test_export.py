"""Exports: what reads them gives what the model gives, and nothing half-made or untrue stays."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification

import simmim.commands.export.check as check
import simmim.commands.export.graph as graph
from simmim.classify import Classifier
from simmim.commands.export import export
from simmim.pretrain import SimMIM
from simmim.weights import load_encoder
from support import exhaustive
from support.commands import refused, simmim
from support.small import SHARED_BIAS
from support.training import quiet_trainer
from test_classify import Data

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
VIT: dict[str, Any] = {"encoder": "vit_tiny_patch16_224", "img_size": 32, "encoder_kwargs": PLAIN}
BEIT_KWARGS = {**PLAIN, **SHARED_BIAS, "global_pool": ""}
BEIT = {**VIT, "encoder": "beit_base_patch16_224", "encoder_kwargs": BEIT_KWARGS}
WINDOWS: dict[str, Any] = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
SWIN = {**VIT, "encoder": "swin_tiny_patch4_window7_224", "encoder_kwargs": WINDOWS}
SIZES = {"dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
CONVNEXT = {"encoder": "convnext_atto", "img_size": 64, "encoder_kwargs": SIZES}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "gray rectangles": {**VIT, "img_size": [32, 48], "in_chans": 1},
    "the paper's vit": BEIT,
    "swin": SWIN,
    "swinv2": {**SWIN, "encoder": "swinv2_tiny_window8_256"},
    "convnext of four channels": {**CONVNEXT, "img_size": [64, 96], "in_chans": 4},
    "resnet": {"encoder": "resnet10t", "img_size": 64},
}
STRIDE_32 = ("convnext_atto", "resnet10t")
NAMES = ["cat", "dog", "a bird"]


def pretrained(folder: Path, **kwargs: Any) -> Path:
    """The checkpoint of a pretraining run, with weights that tell every part apart."""
    options = {"mask_patch_size": 32 if kwargs["encoder"] in STRIDE_32 else 8, **kwargs}
    model = _shaken(SimMIM(**options))
    chans = options.get("in_chans", 3)
    model.set_statistics(
        [0.4 + 0.05 * i for i in range(chans)], [0.2 + 0.01 * i for i in range(chans)]
    )
    return _save(model, folder, {"global_step": 1234})


def classifier(folder: Path, names: list[str] = NAMES, **kwargs: Any) -> tuple[Path, Classifier]:
    """The checkpoint of a classifier, and the classifier."""
    model = Classifier(**kwargs, num_classes=len(names))
    model.set_classes(names)
    model.set_statistics([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    _shaken(model)
    origin = "/home/somebody/runs/animals/version_2: 150 tensors used"
    return _save(model, folder, {"classes": names, "origin": origin}), model.eval()


def _shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean += 0.3 * torch.randn_like(module.running_mean)
                module.running_var *= 0.5 + torch.rand_like(module.running_var)
    return model


def _save(model: Any, folder: Path, more: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    hparams = {name: value for name, value in model.hparams.items() if name != "optimizer"}
    content = {"state_dict": model.state_dict(), "hyper_parameters": hparams, **more}
    torch.save(content, folder / "x.ckpt")
    return folder / "x.ckpt"


def noise(shape: Any, batch: int = 2) -> Tensor:
    """Images that no check of the export has seen."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(99))


@torch.no_grad()
def far(a: Any, b: Any) -> float:
    """The largest difference, as a share of the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / a.abs().max())


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def shape_of(spec: dict[str, Any]) -> tuple[int, ...]:
    """Channels, height and width of an encoder's images."""
    size = spec["img_size"]
    return (spec.get("in_chans", 3), *((size, size) if isinstance(size, int) else size))


# A folder for timm and Hugging Face --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", *(exhaustive(k) for k in ENCODERS if k != "vit")])
def test_timm_and_transformers_open_an_encoder(kind: str, tmp_path: Path) -> None:
    path, shape = pretrained(tmp_path, **ENCODERS[kind]), shape_of(ENCODERS[kind])
    done = export(str(path), str(tmp_path / "out"))
    assert done.files == ["README.md", "config.json", "model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == done.files
    assert [c.reader for c in done.checks] == [
        "timm.create_model",
        "timm.create_model, forward_features",
        "simmim.load_encoder",
        "transformers.AutoModel",
    ]
    images = noise(shape)
    original: Any = load_encoder(path).eval()
    expected = original.forward_features(images)
    assert expected.std() > 0.1
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(model.forward_features(images), expected)
    assert torch.equal(model(images), original(images))
    theirs: Any = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(theirs(images).last_hidden_state, expected)
    config = config_of(tmp_path / "out")["pretrained_cfg"]
    assert config["input_size"] == list(shape)
    assert config["mean"] == pytest.approx([0.4 + 0.05 * i for i in range(shape[0])])
    assert not {"license", "tag", "origin_url", "test_input_size"} & set(config)


def test_a_classifier_keeps_its_names_and_goes_on_in_classify(tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    path, original = classifier(tmp_path, **VIT, multi_label=True)
    path.rename(run / "checkpoints" / "last.ckpt")
    (run / "config.yaml").write_text("data:\n  val_crop: 0.875\n")
    out = export(str(run), str(tmp_path / "out")).folder
    images = noise((3, 32, 32))
    theirs: Any = AutoModelForImageClassification.from_pretrained(out).eval()
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert torch.equal(theirs(images).logits, original(images))
    second = export(str(out), str(tmp_path / "again")).folder  # an export can be exported again
    again = Classifier(weights=str(second)).eval()
    assert again.classes == NAMES
    assert torch.equal(again(images), original(images))
    assert torch.equal(again.mean, original.mean)
    assert torch.equal(again.std, original.std)
    config = config_of(out)
    assert config_of(second)["pretrained_cfg"] == config["pretrained_cfg"]
    assert config["problem_type"] == "multi_label_classification"
    crop = config["pretrained_cfg"]
    assert (crop["crop_pct"], crop["interpolation"]) == (0.875, "bicubic")  # the run's
    card = (out / "README.md").read_text()
    for words in ("0 cat, 1 dog, 2 a bird", "on weights of animals/version_2", "sigmoid"):
        assert words in card
    assert "somebody" not in card


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (VIT, {"batch_norm": True}),
        exhaustive(VIT, {"pooling": "token"}),
        exhaustive(BEIT, {"pooling": "token", "batch_norm": True}),
        exhaustive(SWIN, {"batch_norm": True}),
        exhaustive({"encoder": "resnet10t", "img_size": 64}, {}),
    ],
)
def test_a_probe_becomes_timms_head(
    spec: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    path, original = classifier(tmp_path, **spec, frozen=True, **options)
    export(str(path), str(tmp_path / "out"))
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = noise(shape_of(spec))
    assert far(original(images), model(images)) < 1e-5


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        (VIT, {"frozen": True, "layer": 1}, "reads layer 1 of vit_tiny_patch16_224"),
        (VIT, {"pooling": "attention"}, "does not pool by this attention"),
        (BEIT, {"frozen": True}, "is not a linear layer on the mean of its features"),
        (CONVNEXT, {"frozen": True}, "is not a linear layer on the mean of its features"),
    ],
)
def test_a_probe_that_timm_has_no_head_for_is_refused(
    spec: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path, _ = classifier(tmp_path, **spec, **options)
    with pytest.raises(ValueError, match=rf"{words}.*--format onnx or --format torch"):
        export(str(path), str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


def test_the_moving_average_is_exported_as_it_is_validated(tmp_path: Path) -> None:
    model = Classifier(**VIT, ema_decay=0.9, base_lr=5.0, warmup_epochs=0)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    run = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=[keep])
    run.fit(model, datamodule=Data())
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    export(str(tmp_path / "last.ckpt"), str(tmp_path / "out"))
    found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).head.weight
    name = "encoder.model.head.weight"
    assert torch.equal(found, content["state_dict"][name])
    assert not torch.equal(found, content["current_model_state"][name])


def test_an_epsilon_that_timms_config_cannot_say(tmp_path: Path) -> None:
    def of_epsilon(value: float) -> str:
        kwargs = {**PLAIN, "norm_eps": value}
        return str(pretrained(tmp_path / str(value), **{**VIT, "encoder_kwargs": kwargs}))

    (tmp_path / "out").mkdir()
    done = export(of_epsilon(1e-5), str(tmp_path / "out"))
    assert "epsilon 1e-05" in done.notes[0]
    assert "epsilon 1e-05" in (done.folder / "README.md").read_text()
    assert max(c.difference for c in done.checks) > 0
    again = load_encoder(done.folder)
    assert {m.eps for m in again.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    path, out = of_epsilon(0.1), tmp_path / "2"
    with pytest.raises(ValueError, match=r"epsilon 0.1, which timm's config cannot say"):
        export(path, str(out))
    assert not out.exists()
    assert export(path, str(out), "torch").checks[0].passed


def test_another_tasks_checkpoint_gives_its_encoder(tmp_path: Path) -> None:
    original = load_encoder(pretrained(tmp_path, **VIT)).eval()
    state = {f"encoder.model.{name}": t for name, t in original.state_dict().items()}
    state |= {"decoder.weight": torch.ones(4, 24), "head.bias": torch.ones(4)}
    state |= {"mean": torch.full((1, 3, 1, 1), 0.5), "std": torch.full((1, 3, 1, 1), 0.25)}
    hparams = {**VIT, "in_chans": 3, "num_classes": 4, "frozen": True, "decoder_channels": 8}
    content = {"state_dict": state, "hyper_parameters": hparams, "classes": list("abcd")}
    torch.save(content, tmp_path / "segmenter.ckpt")
    done = export(str(tmp_path / "segmenter.ckpt"), str(tmp_path / "out"))
    for text in (str(done), (Path(done.folder) / "README.md").read_text()):
        assert "the segmentation head on it is not exported" in text
    assert config_of(done.folder)["num_classes"] == 0
    assert "label_names" not in config_of(done.folder)
    model: Any = timm.create_model(f"local-dir:{done.folder}", pretrained=True).eval()
    images = noise((3, 32, 32))
    assert torch.equal(model(images), original(images))  # type: ignore[operator]


# Graphs ------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "options", "format"),
    [
        ("vit", {"frozen": True, "layer": 1}, "torch"),
        ("vit", {"pooling": "attention"}, "torch"),
        ("swin", {"frozen": True, "layer": "all"}, "torch"),  # of several layers the last predicts
        ("the paper's vit", {}, "torch"),
        ("swin", {"frozen": True, "layer": 1}, "onnx"),
        ("swin", {"pooling": "attention"}, "onnx"),
    ],
)
def test_graphs_run_any_classifier(
    kind: str, options: dict[str, Any], format: Any, tmp_path: Path
) -> None:
    path, original = classifier(tmp_path, **ENCODERS[kind], **options)
    folder = export(str(path), str(tmp_path / "out"), format).folder
    for batch in (1, 5):
        images = noise((3, 32, 32), batch)
        assert far(original(images), run_graph(folder, images)) < 1e-4


def test_what_a_graph_takes_and_gives_is_said_in_the_file(tmp_path: Path) -> None:
    path = pretrained(tmp_path, **{**VIT, "img_size": [32, 48], "mask_patch_size": 8})
    encoder: Any = load_encoder(path).eval()
    pixels = torch.rand(2, 3, 32, 48)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.4, 0.45, 0.5], [0.2, 0.21, 0.22]))
    tokens = encoder.forward_features((pixels - mean) / std)[:, 1:]
    features = tokens.transpose(1, 2).unflatten(2, (4, 6))
    for output, expected in (("embedding", tokens.mean(1)), ("features", features)):
        folder = tmp_path / output
        export(str(path), str(folder), "torch", output, normalize=True)  # type: ignore[arg-type]
        extra = {graph.METADATA: ""}
        model = torch.export.load(folder / "model.pt2", extra_files=extra).module()
        assert far(expected, model(pixels)) < 1e-5
        said = json.loads(extra[graph.METADATA])
        assert said["input"] == "images, float32, (batch, 3, 32, 48), pixels in 0..1"
        assert (said["output"], said["normalize"], said["mean"]) == (output, True, [0.4, 0.45, 0.5])
        assert "the model normalises them itself" in (folder / "README.md").read_text()


def run_graph(folder: Path, images: Tensor) -> Tensor:
    if (folder / "model.pt2").exists():
        return torch.export.load(folder / "model.pt2").module()(images)  # type: ignore[no-any-return]
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert session.get_inputs()[0].shape[0] == "batch"
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def test_onnx_runs_a_classifier(tmp_path: Path) -> None:
    import onnx

    path, original = classifier(tmp_path, **VIT)
    done = export(str(path), str(tmp_path / "out"), "onnx", normalize=True)
    assert done.files == ["README.md", "model.onnx"]
    pixels = torch.rand(5, 3, 32, 32)
    assert far(original(original.normalize(pixels)), run_graph(done.folder, pixels)) < 1e-4
    metadata = {p.key: p.value for p in onnx.load(done.folder / "model.onnx").metadata_props}
    assert json.loads(metadata["classes"]) == NAMES
    assert metadata["normalize"] == "true"


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_onnx_and_torch_run_any_encoder(kind: str, format: Any, tmp_path: Path) -> None:
    path = pretrained(tmp_path, **ENCODERS[kind])
    images = noise(shape_of(ENCODERS[kind]), 5)
    expected = load_encoder(path).eval()(images)
    folder = export(str(path), str(tmp_path / "out"), format).folder
    assert far(expected, run_graph(folder, images)) < 1e-4


# What a user can get wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("batch", check.BATCHES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_agreement(batch: int, value: float) -> None:
    def broken(images: Tensor) -> Tensor:
        return images * value if len(images) == batch else images

    def whole(images: Tensor) -> Tensor:
        return images

    assert check.compare("x", whole, whole, (1, 2, 2)).passed
    for expected, found in ((whole, broken), (broken, whole), (broken, broken)):
        assert not check.compare("x", expected, found, (1, 2, 2)).passed
    assert check.compare("x", whole, lambda x: x * 1.00009, (1, 2, 2)).passed
    assert not check.compare("x", whole, lambda x: x * 1.00011, (1, 2, 2)).passed
    with pytest.raises(ValueError, match=r"x gives \[1, 2, 2\] for 1 images"):
        check.compare("x", whole, lambda x: x[:, 0], (1, 2, 2))


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"format": "tflite"}, "--format tflite is not known: use timm, onnx, torch"),
    ({"output": "tokens"}, "--output tokens is not known"),
    ({"normalize": True}, "--output and --normalize are for onnx and torch"),
    ({"private": True}, "give --push_to_hub USER/NAME as well"),
    ({"push_to_hub": "name"}, "give it as USER/NAME"),
    ({"push_to_hub": "a b/c"}, "--push_to_hub a b/c: Repo id"),
    ({"weights": "none.ckpt"}, "none.ckpt does not exist"),
    ({"weights": "gray.ckpt"}, "does not say the mean and standard deviation of the 2"),
    ({"format": "onnx"}, r"needs onnxscript and onnxruntime: pip install 'simmim\[onnx\]'"),
    ({"format": "torch"}, r"torch cannot make a graph of vit_tiny.*--format timm"),
]


def test_mistakes_are_one_sentence(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def specialise(self: graph.Graph, images: Tensor) -> Tensor:
        return self.model(images[: len(images)] if len(images) == 2 else images)

    content = torch.load(pretrained(workdir, **{**VIT, "in_chans": 2}), weights_only=True)
    del content["state_dict"]["mean"]
    torch.save(content, "gray.ckpt")
    path = pretrained(workdir, **VIT)
    monkeypatch.setattr(graph.Graph, "forward", specialise)  # which torch cannot trace
    monkeypatch.setattr(graph, "find_spec", lambda name: None if name != "onnx" else name)
    for options, words in MISTAKES:
        with pytest.raises(ValueError, match=words) as error:
            export(**{"weights": str(path), "out": "out", **options})
        assert "\n" not in str(error.value)
        assert sorted(p.name for p in workdir.iterdir()) == ["gray.ckpt", "x.ckpt"]


def test_nothing_is_kept_that_fails_its_check_and_nothing_of_the_users_is_lost(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained(workdir, **VIT)
    with monkeypatch.context() as patch:
        patch.setattr(check, "TOLERANCE", -1.0)
        said = refused(capsys, "export --weights x.ckpt --out out", status=1)
    assert "gives other numbers and was not kept: timm.create_model: largest difference" in said
    assert [p.name for p in workdir.iterdir()] == ["x.ckpt"]
    out = workdir / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    said = refused(capsys, "export --weights x.ckpt --out out", status=1)
    assert "is not empty: give another --out, or --overwrite true" in said
    simmim("export --weights x.ckpt --out out --overwrite=true")
    said = capsys.readouterr().out
    assert "checked by transformers.AutoModel: largest difference 0.0e+00" in said
    assert (out / "thesis.txt").read_text() == "mine"
    timm.create_model(f"local-dir:{out}", pretrained=True)


# The card and the Hub ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["pretrained", "classifier", "torch"])
def test_the_cards_lines_run(make: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = classifier(tmp_path, **VIT)[0] if make == "classifier" else pretrained(tmp_path, **VIT)
    monkeypatch.chdir(tmp_path)
    export(str(path), "out", "torch" if make == "torch" else "timm")
    card = Path("out/README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == (1 if make == "torch" else 3)
    for block in blocks:
        found: dict[str, Any] = {}
        exec(block, found)
        if "output" in found:
            assert found["output"].shape[0] == 1
        else:
            assert isinstance(found["encoder"], nn.Module)


class Hub:
    """What the Hub would be told."""

    public = False
    told: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        pass

    def create_repo(self, repo: str, **kwargs: Any) -> Any:
        self.told.append(kwargs)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo}")

    def repo_info(self, repo: str) -> Any:
        return type("Info", (), {"private": not self.public})

    def upload_folder(self, **kwargs: Any) -> None:
        self.told.append(kwargs)


def test_pushing_uploads_what_was_written_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pretrained(tmp_path, **VIT)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"is written, but could not be pushed to me/animals: ."):
        export(str(path), str(out), push_to_hub="me/animals")  # HF_HUB_OFFLINE is set for all tests
    assert (out / "model.safetensors").is_file()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "told", [])
    done = export(str(path), str(out), push_to_hub="me/animals", private=True, overwrite=True)
    made, sent = Hub.told
    assert made["private"] is True
    assert sent["repo_id"] == "me/animals"
    assert sent["allow_patterns"] == ["README.md", "config.json", "model.safetensors"]
    assert done.url == "https://huggingface.co/me/animals"
    assert "hf-hub:me/animals" in (out / "README.md").read_text()
    monkeypatch.setattr(Hub, "public", True)
    with pytest.raises(ValueError, match=r"not pushed: me/animals exists already and is public"):
        export(str(path), str(out), overwrite=True, push_to_hub="me/animals", private=True)
    assert len(Hub.told) == 3  # made again, not sent
