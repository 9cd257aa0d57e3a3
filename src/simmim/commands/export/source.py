"""What is exported: a timm model, perhaps with a probe on it, and what one must know to use it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from torch import Tensor, nn

from simmim.evaluation.readout import Probe, choose_layers, read_tokens
from simmim.weights import Report, find_checkpoint
from simmim.weights.api import encoder_of
from simmim.weights.backbone import class_names, our_checkpoint, statistics_of
from simmim.weights.fit import Architecture
from simmim.weights.sources import open_weights


@dataclass
class Source:
    """A model in eval mode, and what one must know to use it.

    Attributes:
        weights: What the user calls it.
        model: The timm model.
        probe: Classifies what the model gives; None where timm's own head does, or nothing.
        architecture: Name and options of the timm model.
        statistics: Mean and standard deviation of each channel, of pixels in 0..1.
        crop: crop_pct, crop_mode and interpolation of the evaluation, by timm's names.
        classes: Names of the classes; empty where there is no classifier, or they are not known.
        multi_label: Whether an image can have several.
        history: How it was trained, in a sentence.
        report: What became of each tensor of the file.
        left_out: What of a checkpoint is not exported, as a sentence; "" where nothing is.
    """

    weights: str
    model: Any
    probe: "Probed | None"
    architecture: Architecture
    statistics: tuple[list[float], list[float]]
    crop: dict[str, Any]
    classes: list[str]
    multi_label: bool
    history: str
    report: Report
    left_out: str = ""

    @property
    def is_classifier(self) -> bool:
        """Whether it gives logits."""
        return self.probe is not None or getattr(self.model, "num_classes", 0) > 0

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.architecture.img_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (self.architecture.in_chans, *self.img_size)


class Probed(nn.Module):
    """An encoder and the probe that reads it: images -> logits."""

    def __init__(self, model: nn.Module, probe: Probe, layers: list[int]) -> None:
        super().__init__()
        self.model, self.probe, self.layers = model, probe, layers

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images, (B, C, H, W) -> logits, (B, K)."""
        class_token = self.probe.pooling == "token"
        tokens = read_tokens(self.model, images, self.layers, class_token=class_token)[-1]
        return cast(Tensor, self.probe(*tokens))


def open_source(weights: str, *, trust: bool = False) -> Source:
    """Open what is to be exported.

    Args:
        weights: As `path` of `load_encoder`. A checkpoint of ours gives what was validated: with
            ema_decay that is the moving average.
        trust: As of `load_encoder`.

    Raises:
        ValueError: If the encoder in the file is not complete, or its pixel statistics are not
            known.
    """
    opened = open_weights(weights, {}, trust=trust)
    model = cast(Any, encoder_of(opened).eval())
    opened.architecture.options.pop("num_classes", None)
    ours = our_checkpoint(weights)
    hparams = (ours or {}).get("hyper_parameters", {})
    statistics = statistics_of(weights, opened.architecture.in_chans)
    if statistics is None:
        raise ValueError(
            f"{weights} does not say the mean and standard deviation of the "
            f"{opened.architecture.in_chans} channels that it was trained with: pretrain or "
            "classify from it, and export that run"
        )
    probe = _probe(ours, model) if ours else None
    is_classifier = probe is not None or getattr(model, "num_classes", 0) > 0
    classes = class_names(weights) if is_classifier else []
    if ours and is_classifier and not classes:
        classes = [str(i) for i in range(hparams["num_classes"])]
    return Source(
        weights=weights,
        model=model,
        probe=probe,
        architecture=opened.architecture,
        statistics=(_decimals(statistics[0]), _decimals(statistics[1])),
        crop=_crop(weights, ours, model),
        classes=classes,
        multi_label=bool(hparams.get("multi_label")),
        history=_history(weights, ours, opened.architecture.encoder),
        report=model.report,
        left_out=_left_out(hparams),
    )


def _probe(ours: Mapping[str, Any], model: Any) -> Probed | None:
    """The head that a Classifier has beside its encoder; of a sweep the last, which predicts."""
    state, hparams = ours["state_dict"], ours["hyper_parameters"]
    heads = sorted({name.split(".")[1] for name in state if name.startswith("heads.")})
    if not heads or not _is_classifier(hparams):
        return None
    layers = choose_layers(hparams["layer"], model, hparams["encoder"])
    prefix = f"heads.{heads[-1]}."
    tensors = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    classes, width = tensors["linear.weight"].shape
    probe = Probe(width, classes, hparams["pooling"], hparams["batch_norm"])
    probe.load_state_dict(tensors)
    return Probed(model, probe, layers).eval()


def _left_out(hparams: Mapping[str, Any]) -> str:
    """Say that the head of a Segmenter or Detector, which no format holds, stays behind."""
    for option, head in (("decoder_channels", "segmentation head"), ("fpn_channels", "detector")):
        if option in hparams:
            return (
                f"this is the encoder alone: the {head} on it is not exported, and stays in the run"
            )
    return ""


def _is_classifier(hparams: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is a Classifier's: no other task pools."""
    return "pooling" in hparams


def _crop(weights: str, ours: Mapping[str, Any] | None, model: Any) -> dict[str, Any]:
    """What is cut out of an image, and how it is resized, where the model is evaluated."""
    if ours is None:
        config: Mapping[str, Any] = model.pretrained_cfg or {}
        folder = Path(weights).expanduser() / "config.json"
        if folder.is_file():
            config = yaml.safe_load(folder.read_text("utf-8")).get("pretrained_cfg") or config
        names = ("crop_pct", "crop_mode", "interpolation")
        return {name: config[name] for name in names if config.get(name) is not None}
    run = find_checkpoint(weights).absolute().parent.parent / "config.yaml"
    said = (yaml.safe_load(run.read_text("utf-8")) or {}) if run.is_file() else {}
    data = said.get("data") or {}
    return {
        "crop_pct": data.get("val_crop", 1.0),
        "crop_mode": "center",
        "interpolation": "bicubic" if _is_classifier(ours["hyper_parameters"]) else "bilinear",
    }


def _decimals(values: list[float]) -> list[float]:
    """The shortest decimals of the same float32 numbers: 0.4, not 0.4000000059604645."""
    return [float(str(np.float32(value))) for value in values]


def _history(weights: str, ours: Mapping[str, Any] | None, encoder: str) -> str:
    """How it was trained, in a sentence."""
    if ours is None:
        return f"The weights are those of {_last_part(weights)}."
    hp, steps = ours["hyper_parameters"], ours.get("global_step", 0)
    if "mask_ratio" in hp:
        ratio = hp["mask_ratio"]
        hidden = f"{ratio:.0%}" if isinstance(ratio, float) else f"{ratio[0]:.0%} to {ratio[1]:.0%}"
        return (
            f"It was pretrained without labels, by masked image modelling (SimMIM, "
            f"arXiv:2111.09886): {hidden} of each image hidden in cells of "
            f"{hp['mask_patch_size']} pixels, target {hp['target']}, {steps:,} steps."
        )
    origin = _last_part(str(ours.get("origin", "")).partition(": ")[0])
    began = f", on weights of {origin}" if origin and origin != "from scratch" else ""
    if not _is_classifier(hp):
        return f"It was trained as a part of another model{began}, {steps:,} steps."
    layer = "" if hp["layer"] is None else f", layer {hp['layer']},"
    frozen = f"A linear probe of the frozen encoder{layer} was trained"
    how = frozen if hp["frozen"] else "It was fine-tuned"
    return f"{how} to tell {hp['num_classes']} classes apart{began}, {steps:,} steps."


def _last_part(path: str) -> str:
    """The name of a run or a file, without the folders of whoever trained it."""
    parts = [part for part in Path(path).parts if part not in ("checkpoints", "last.ckpt")]
    is_run = parts and parts[-1].startswith("version_")
    return "/".join(parts[-2:] if is_run else parts[-1:])
