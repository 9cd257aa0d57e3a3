"""A folder that timm opens by `local-dir:DIR`, and Hugging Face by `AutoModel.from_pretrained`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

import simmim
from simmim.commands.export.check import Check, compare
from simmim.commands.export.source import Source
from simmim.encoder import set_norm_eps
from simmim.evaluation.readout import Probe
from simmim.weights.api import load_encoder
from simmim.weights.sources import build_encoder

# What timm's pretrained_cfg says of the weights themselves. The rest (tag, license, origin_url,
# ...) is that of timm's own weights for this architecture, and would be untrue here.
KEPT = {
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("num_classes", "pool_size", "first_conv", "classifier", "custom_load"),
}
GRAPHS = "use --format onnx or --format torch, which keep the probe as it is"


def write_timm_folder(source: Source, folder: Path) -> tuple[list[Check], list[str]]:
    """Write config.json and model.safetensors, and compare what reads them with the model.

    Args:
        source: What is exported.
        folder: An empty folder.

    Returns:
        The comparisons, and what a user must be told.

    Raises:
        ValueError: If timm's config cannot say what the model is.
    """
    model, options, name = source.model, source.architecture.options, source.architecture.encoder
    if ":" not in name and not timm.is_model(name):
        raise ValueError(
            f"timm has no model {name}: use --format onnx or --format torch, or register it with "
            "timm.models.register_model and pretrain it by that name"
        )
    if source.probe is not None:
        model, pooling = _with_head(source)
        options = {**options, **pooling}
    save_for_hf(
        model,
        folder,
        model_config=_model_config(source),
        model_args=_model_args(source, options),
        safe_serialization=True,
    )
    _amend(folder / "config.json", source)
    built: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    notes = _notes(source, built)
    checks = _checks_of_timm(model, built, folder, source)
    checks += _checks_of_transformers(model, folder, source)
    failed = next((check for check in checks if not check.passed), None)
    if notes and failed:
        raise ValueError(
            f"{notes[0]}, and {failed}: use --format onnx or --format torch, which keep it"
        )
    return checks, notes


# The config --------------------------------------------------------------------------------------


def _model_config(source: Source) -> dict[str, Any]:
    mean, std = source.statistics
    preprocessing = {**source.crop, "mean": mean, "std": std, "input_size": source.shape}
    config: dict[str, Any] = {"pretrained_cfg": preprocessing}
    if source.classes:
        config["label_names"] = source.classes
    if source.multi_label:
        config["problem_type"] = "multi_label_classification"  # transformers' name for it
    return config


def _model_args(source: Source, options: dict[str, Any]) -> dict[str, Any]:
    """What `timm.create_model` needs beside the name, so that it builds the same model."""
    architecture = source.architecture
    args = {**options, "in_chans": architecture.in_chans}
    try:
        with torch.device("meta"):
            timm.create_model(architecture.encoder, **args, img_size=source.img_size)
    except TypeError:  # a model that takes any size has no such option
        return args
    return {**args, "img_size": source.img_size}


def _amend(path: Path, source: Source) -> None:
    """Take out what is not true of these weights, and add what timm's config has no place for."""
    config = json.loads(path.read_text("utf-8"))
    # It stands above them; transformers gives it a second time, which timm would refuse.
    config.get("model_args", {}).pop("num_classes", None)
    made = config["pretrained_cfg"]
    config["pretrained_cfg"] = {name: made[name] for name in made if name in KEPT}
    config["simmim"] = {"version": simmim.__version__}
    if source.architecture.norm_eps is not None:
        config["simmim"]["norm_eps"] = source.architecture.norm_eps
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _notes(source: Source, built: nn.Module) -> list[str]:
    """Say what timm builds otherwise than the weights were made with."""
    ours = source.architecture.norm_eps
    theirs = {m.eps for m in built.modules() if isinstance(m, nn.LayerNorm)}
    if ours is None or theirs <= {ours}:
        return []
    return [
        f"the LayerNorms of these weights have epsilon {ours:g}, which timm's config cannot say: "
        f"timm and Hugging Face build them with {' and '.join(f'{eps:g}' for eps in theirs)}"
    ]


# A probe as timm's head --------------------------------------------------------------------------


def _with_head(source: Source) -> tuple[Any, dict[str, Any]]:
    """Build the timm model whose own classifier is the probe.

    Returns:
        The model, and the options that make it pool as the probe does.

    Raises:
        ValueError: If timm has no such model.
    """
    assert source.probe is not None
    probe, name = source.probe.probe, source.architecture.encoder
    if source.probe.layers:
        raise ValueError(
            f"the probe reads layer {source.probe.layers[-1]} of {name}, timm's head only the end "
            f"of the model: {GRAPHS}"
        )
    if probe.pooling == "attention":
        raise ValueError(f"timm's head of {name} does not pool by this attention: {GRAPHS}")
    if probe.pooling == "token":
        poolings: list[dict[str, Any]] = [{"global_pool": "token"}]
    else:  # in a ViT fc_norm would move the last norm behind the mean
        poolings = [{"global_pool": "avg", "fc_norm": False}, {"global_pool": "avg"}]
    for pooling in poolings:
        model = _try_head(source, probe, pooling)
        if model is not None:
            return model, pooling
    raise ValueError(
        f"timm's head of {name} is not a linear layer on the {probe.pooling} of its features, as "
        f"the probe is: {GRAPHS}"
    )


def _try_head(source: Source, probe: Probe, pooling: dict[str, Any]) -> Any | None:
    """The timm model with this pooling and the probe for its head; None if it is another model."""
    assert source.probe is not None
    options = {**source.architecture.options, **pooling, "num_classes": probe.linear.out_features}
    try:
        model: Any = build_encoder(source.architecture, options)
    except ValueError:  # it has no such option
        return None
    set_norm_eps(model, source.architecture.norm_eps)
    head = f"{model.pretrained_cfg['classifier']}."
    places, tensors = model.state_dict(), source.model.state_dict()
    if {name for name in places if not name.startswith(head)} != set(tensors):
        return None
    weight, bias = _linear(probe)
    if places[f"{head}weight"].numel() != weight.numel():
        return None
    shaped = weight.view_as(places[f"{head}weight"])
    model.load_state_dict({**tensors, f"{head}weight": shaped, f"{head}bias": bias})
    model.eval()
    same = compare("timm", source.probe, model, source.shape).passed
    return model if same else None


def _linear(probe: Probe) -> tuple[Tensor, Tensor]:
    """Weight and bias of the probe, with its BatchNorm folded in: w / s, b - w m / s."""
    weight, bias = probe.linear.weight.detach(), probe.linear.bias.detach()
    if probe.norm is None:
        return weight, bias
    mean, var = probe.norm.running_mean, probe.norm.running_var
    assert mean is not None
    assert var is not None
    scaled = weight / (var + probe.norm.eps).sqrt()
    return scaled, bias - scaled @ mean


# Reading it back ---------------------------------------------------------------------------------


def _checks_of_timm(model: Any, timms: Any, folder: Path, source: Source) -> list[Check]:
    ours: Any = load_encoder(folder).eval()
    pairs = [
        ("timm.create_model", model, timms),
        ("timm.create_model, forward_features", model.forward_features, timms.forward_features),
        ("simmim.load_encoder", model, ours),
    ]
    if source.probe is not None:  # against the probe itself, not only its place in timm's head
        pairs.append(("timm.create_model, against the probe", source.probe, timms))
    return [compare(name, expected, found, source.shape) for name, expected, found in pairs]


def _checks_of_transformers(model: Any, folder: Path, source: Source) -> list[Check]:
    if find_spec("transformers") is None:
        return []
    from transformers import AutoModel, AutoModelForImageClassification

    with _quiet_transformers():
        base: Any = AutoModel.from_pretrained(folder).eval()
    checks = [
        compare(
            "transformers.AutoModel",
            model.forward_features,
            lambda images: base(images).last_hidden_state,
            source.shape,
        )
    ]
    if source.is_classifier:
        with _quiet_transformers():
            whole: Any = AutoModelForImageClassification.from_pretrained(folder).eval()
        name = "transformers.AutoModelForImageClassification"
        checks.append(compare(name, model, lambda images: whole(images).logits, source.shape))
    return checks


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar, and no report of the head that AutoModel leaves out."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
