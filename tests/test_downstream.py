"""What the three fine-tuning tasks share: weights, classes, frozen encoders, going on."""

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from simmim import Classifier, Detector, Segmenter, load_encoder
from simmim.data.classification import ClassificationData
from simmim.data.detection import DetectionData
from simmim.data.segmentation import SegmentationData
from simmim.optim import param_groups
from simmim.pretrain import SimMIM
from support.commands import assert_same_tensors
from support.runs import DATA
from support.small import TINY_VIT, noise_loader
from support.training import quiet_trainer

ENCODER = {**TINY_VIT, "encoder_kwargs": {**TINY_VIT["encoder_kwargs"], "depth": 4}}
TASKS: dict[str, tuple[Any, Any, str]] = {
    "classify": (Classifier, ClassificationData, "images"),
    "segment": (Segmenter, SegmentationData, "masks"),
    "detect": (Detector, DetectionData, "boxes"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "classify": {},
    "segment": {"decoder_channels": 16},
    "detect": {"fpn_channels": 16, "proposals": 50, "rois_per_image": 16},
}
RANDOM = {"classify": {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5}}
CLASSES = {
    "classify": ["cat", "dog"],
    "segment": ["ground", "box"],
    "detect": ["cat", "dog"],
}
each_task = pytest.mark.parametrize("task", TASKS)


def build(task: str, **options: Any) -> Any:
    """A model of a task, from scratch unless there are weights."""
    encoder = {} if "weights" in options else ENCODER
    return TASKS[task][0](**{**encoder, **OPTIONS[task], **options})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ of two classes, masks/ and boxes/."""
    folder = tmp_path_factory.mktemp("data")
    with chdir(folder):
        for task in TASKS:
            DATA[task]()
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of pretraining with pixel statistics of its own."""
    model = SimMIM(**ENCODER, mask_patch_size=8)
    model.set_statistics([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    run = quiet_trainer()
    run.fit(model, noise_loader())
    run.save_checkpoint(path := tmp_path_factory.mktemp("pretrained") / "pre.ckpt")
    return path


@pytest.fixture(scope="module")
def trained(
    place: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Any]]:
    """Of each task a checkpoint after a step from pretrained weights, and the model."""
    found = {}
    for task in TASKS:
        model = build(task, weights=str(pretrained), base_lr=0.1, warmup_epochs=0)
        run = quiet_trainer(max_steps=1, limit_val_batches=0)
        run.fit(model, datamodule=data(task, place))
        run.save_checkpoint(path := tmp_path_factory.mktemp("trained") / f"{task}.ckpt")
        found[task] = path, model.eval()
    return found


def data(task: str, place: Path, **options: Any) -> L.LightningDataModule:
    _, kind, folder = TASKS[task]
    kwargs = {"img_size": 32, "batch_size": 4, "num_workers": 0, **options}
    module: L.LightningDataModule = kind(root=str(place / folder), **kwargs)
    return module


def renamed(task: str, folder: Path) -> Path:
    """The same data, with another name of the second class."""
    with chdir(folder):
        root = DATA[task]()
        if task == "classify":
            (root / "dog").rename(root / "wolf")
        else:
            for file in root.rglob("*.json"):
                content = json.loads(file.read_text())
                text = json.dumps(content).replace('"dog"', '"wolf"').replace('"box"', '"wolf"')
                file.write_text(text)
    return folder


def outputs(model: Any) -> list[torch.Tensor]:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.eval()(images)
    return [*found[0].values()] if isinstance(found, list) else [found]


def assert_same_outputs(a: Any, b: Any) -> None:
    for one, other in zip(outputs(a), outputs(b), strict=True):
        torch.testing.assert_close(one, other)


# Weights and classes -----------------------------------------------------------------------------


@each_task
def test_pretrained_weights_come_in_whole(task: str, pretrained: Path) -> None:
    source = SimMIM.load_from_checkpoint(pretrained)
    model = build(task, weights=str(pretrained))
    expected = source.encoder.model.state_dict()
    for name, tensor in model.model.state_dict().items():
        if name in expected:
            assert torch.equal(tensor, expected[name]), name
    assert "blocks.3.mlp.fc2.weight" in model.model.state_dict()
    assert model.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert model.hparams["img_size"] in (32, [32, 32])
    assert not model.head_is_trained


@pytest.mark.slow
@each_task
def test_a_checkpoint_opens_alone_and_is_a_source_of_weights(
    task: str, trained: dict[str, tuple[Path, Any]]
) -> None:
    path, model = trained[task]
    assert torch.load(path, weights_only=True)["classes"] == CLASSES[task]
    again = type(model).load_from_checkpoint(path)
    assert again.classes == CLASSES[task]
    assert_same_tensors(again.state_dict(), model.state_dict())
    encoder: Any = load_encoder(path).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        encoder.forward_features(images), model.model.forward_features(images)
    )
    onward = build(task, weights=str(path))  # its head comes along
    assert onward.head_is_trained
    assert_same_outputs(onward, model)
    other = build(task, weights=str(path), num_classes=5, in_chans=1, img_size=48)
    assert not other.head_is_trained
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(other.model.get_parameter(name), model.model.get_parameter(name))


@pytest.mark.slow
@each_task
def test_other_classes_are_refused_but_in_training(
    task: str, trained: dict[str, tuple[Path, Any]], place: Path, tmp_path: Path
) -> None:
    path, _ = trained[task]
    options = {"val_fraction": 0.5} if task == "classify" else {}
    other = data(task, renamed(task, tmp_path), **options)
    with pytest.raises(ValueError, match="not trained"):
        quiet_trainer().validate(build(task), datamodule=data(task, place))
    inherited = build(task, weights=str(path))
    known = ", ".join(CLASSES[task])
    for model, ckpt_path in ((inherited, None), (build(task), path)):
        with pytest.raises(ValueError, match=f"wolf, this [a-z]+ knows {known}"):
            quiet_trainer().validate(model, datamodule=other, ckpt_path=ckpt_path, verbose=False)
    before = outputs(inherited)
    # The one step is the first of the warm-up, with a learning rate of 0.
    run = quiet_trainer(max_steps=1, limit_val_batches=0)
    run.fit(inherited.train(), datamodule=other)
    assert inherited.classes == [CLASSES[task][0], "wolf"]
    after = outputs(inherited)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("classify", {"layer": 5, "frozen": True}, "use 1 to 4"),
        ("classify", {"layer": 1}, "frozen"),
        ("classify", {"batch_norm": True}, "frozen"),
        ("classify", {"mixup": -1.0}, "mixup -1.0"),
        ("segment", {"layer": 2}, "for head linear on a frozen encoder"),
        ("segment", {"head": "linear", "frozen": True, "layer": 9}, "does not exist"),
        ("segment", {"dropout": 1.0}, "is no share"),
        ("segment", {"aux_weight": -1.0}, "is negative"),
        ("segment", {"stride": 40}, "leave pixels out"),
        ("detect", {"anchor_sizes": [8.0, 16.0]}, "2, not 5"),
        ("detect", {"anchor_ratios": (0.0, 1.0)}, "above 0"),
        ("detect", {"proposals": 0}, "proposals 0"),
        ("detect", {"score_threshold": 2.0}, "score_threshold"),
        *((task, {"layer_decay": 0.5, "frozen": True}, "frozen encoder") for task in TASKS),
        *((task, {"layer_decay": 2.0}, "layer_decay 2.0") for task in TASKS),
        *((task, {"drop_path_rate": 1.0}, "drop_path_rate") for task in TASKS),
        *((task, {"weights": "nowhere/at/all.ckpt"}, "does not exist") for task in TASKS),
        *((task, {"num_classes": 1}, "num_classes 1") for task in ("classify", "segment")),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(
    task: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        build(task, **{"num_classes": 2, **options})
    assert "\n" not in str(error.value)


# Training ----------------------------------------------------------------------------------------


@each_task
def test_a_frozen_encoder_stays_bitwise_as_it_was(task: str, place: Path) -> None:
    modes = []

    class Keep(L.Callback):
        def on_train_batch_end(self, run: L.Trainer, module: Any, *args: Any) -> None:
            modes.append(module.model.training)

    model = build(task, frozen=True, base_lr=1.0, warmup_epochs=0)
    encoder = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    others = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("encoder.model" in name for name in others)
    run = quiet_trainer(None, Keep(), max_steps=2, limit_val_batches=0, gradient_clip_val=1.0)
    run.fit(model, datamodule=data(task, place))
    assert set(modes) == {False}
    assert_same_tensors(model.model.state_dict(), encoder)
    optimised = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in model.parameters() if p.requires_grad} != set()


@each_task
def test_layers_of_the_encoder_decay_and_what_is_on_it_does_not(task: str) -> None:
    model = build(task, num_classes=2)
    groups = param_groups(model, 0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = {n: scale[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    levels = {f"encoder.model.blocks.{i}.": 0.5 ** (4 - i) for i in range(4)}  # the head is 5
    levels |= {f"encoder.model.{n}": 0.5**5 for n in ("patch_embed", "cls_token", "pos_embed")}
    for name, rate in named.items():
        assert rate == next((v for k, v in levels.items() if name.startswith(k)), 1.0), name
    assert set(levels.values()) | {1.0} == set(named.values())


@pytest.mark.slow
@each_task
def test_going_on_is_bitwise_the_same(task: str, place: Path, tmp_path: Path) -> None:
    def fit(stop: int, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
        class Stop(L.Callback):
            def on_train_batch_end(self, run: L.Trainer, *args: Any) -> None:
                run.should_stop = run.global_step >= stop
                if run.should_stop:
                    run.save_checkpoint(tmp_path / f"{stop}.ckpt")

        torch.manual_seed(0)
        model = build(task, **RANDOM.get(task, {}), drop_path_rate=0.2, base_lr=0.1)
        run = quiet_trainer(tmp_path, Stop(), max_epochs=3)
        run.fit(model, datamodule=data(task, place), ckpt_path=ckpt)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    whole = fit(6)
    fit(3)  # within an epoch
    assert_same_tensors(whole, fit(6, tmp_path / "3.ckpt"))
