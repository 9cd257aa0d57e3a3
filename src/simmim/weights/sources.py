"""Any source of weights -> its tensors under our names, and the model that they are for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from simmim.encoder import create_timm_model
from simmim.encoders.custom import find_own_encoder
from simmim.weights.files import find_checkpoint, is_url, read_checkpoint, read_folder, read_json
from simmim.weights.fit import HEAD, MODEL, TOKEN, Architecture, Weights, first_convs
from simmim.weights.huggingface import hugging_face_weights
from simmim.weights.official import official_weights
from simmim.weights.state_dict import find_tensors, is_official, timm_state_dict

TIMM = "timm:"


def open_weights(
    source: str | Path,
    timm_kwargs: Mapping[str, Any],
    *,
    encoder: str | None = None,
    trust: bool = False,
) -> Weights:
    """Open what `--model.weights` names.

    Args:
        source: A checkpoint of ours or its run's folder, an official file, a folder that
            `save_pretrained` or timm wrote, the state dict of a timm model, or `timm:NAME`.
        timm_kwargs: Options of the model that is to be built, for what the source does not tell;
            of `timm:NAME`, the model that timm resizes its own weights to.
        encoder: Name of the timm model that a state dict is of.
        trust: Whether an encoder of a user's own, which a checkpoint names, may be imported.

    Returns:
        The tensors.

    Raises:
        ValueError: If it is none of these, does not exist, or asks for code to be run.
    """
    if str(source).startswith(TIMM):
        return _timm_weights(str(source), timm_kwargs)
    folder = Path(source).expanduser()
    if not is_url(source) and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if "model_type" in config and "architecture" not in config:
            return hugging_face_weights(folder, config)
        return _timm_folder(folder, config)
    content = read_checkpoint(find_checkpoint(source))
    if is_ours(content):
        weights = _our_weights(content, str(source))
        weights.architecture.trust = trust
        find_own_encoder(weights.architecture.encoder, trust=trust)
        return weights
    tensors = find_tensors(content, str(source))
    if is_official(content, tensors):
        return official_weights({**content, "model": tensors}, str(source), hints=timm_kwargs)
    return timm_state_dict(tensors, str(source), encoder, timm_kwargs, trust=trust)


def build_encoder(architecture: Architecture, options: Mapping[str, Any]) -> nn.Module:
    """Build the timm model that is described, where the options do not say otherwise."""
    options = {"img_size": architecture.img_size, "in_chans": architecture.in_chans, **options}
    size, chans = options.pop("img_size"), options.pop("in_chans")
    sides = (size, size) if isinstance(size, int) else (size[0], size[1])
    rates = {"drop_rate": 0.0, "drop_path_rate": 0.0}
    name, trust = architecture.encoder, architecture.trust
    return create_timm_model(name, sides, chans, rates, options, trust=trust)


def is_ours(content: Any) -> bool:
    """Whether a checkpoint is one of simmim's: it names its encoder, and has one."""
    if not isinstance(content, Mapping):
        return False
    hparams, state = content.get("hyper_parameters"), content.get("state_dict")
    names = isinstance(hparams, Mapping) and isinstance(hparams.get("encoder"), str)
    foreign = isinstance(state, Mapping) and not any(str(n).startswith(MODEL) for n in state)
    return names and state is not None and not foreign


def _our_weights(content: Mapping[str, Any], source: str) -> Weights:
    hparams, state = content["hyper_parameters"], content["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{source} is damaged: its state_dict is no table of tensors")
    options = dict(hparams.get("encoder_kwargs") or {})
    eps = options.pop("norm_eps", None)
    size, chans = hparams.get("img_size", 224), hparams.get("in_chans", 3)
    weights = Weights(source, Architecture(hparams["encoder"], size, chans, options, norm_eps=eps))
    for name, tensor in state.items():
        if name.startswith((MODEL, HEAD)) or name == TOKEN:
            weights.add(name, name, tensor)
        elif name in ("mean", "std"):
            weights.dropped[name] = "the statistics of its data"
        else:
            weights.skip(name)
    weights.grid = _patches(weights)
    return weights


def _patches(weights: Weights) -> tuple[int, int] | None:
    """Rows and columns of patches, where the model's images are not square."""
    size, kernel = weights.architecture.img_size, f"{MODEL}patch_embed.proj.weight"
    if isinstance(size, int) or size[0] == size[1] or kernel not in weights.tensors:
        return None
    height, width = weights.tensors[kernel].shape[-2:]
    return size[0] // height, size[1] // width


def _timm_weights(source: str, timm_kwargs: Mapping[str, Any]) -> Weights:
    name = source.removeprefix(TIMM)
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    options = {**timm_kwargs, "num_classes": 0}
    size = options.pop("img_size", config.input_size[-1] if config else 224)
    architecture = Architecture(name, size, options.pop("in_chans", 3), options)
    try:
        model = build_encoder(architecture, {**options, "pretrained": True})
    except ValueError:
        raise
    except Exception as error:  # whatever a network can do
        said = str(error).partition("\n")[0]
        raise ValueError(f"timm could not fetch its weights of {name!r}: {said}") from error
    weights = Weights(source, architecture)
    for inner, tensor in model.state_dict().items():
        weights.add(inner, f"{MODEL}{inner}", tensor)
    if config and architecture.in_chans != config.input_size[0]:
        how = f"adapted from {config.input_size[0]} to {architecture.in_chans} channels"
        weights.changed |= {f"{MODEL}{name}": how for name in first_convs(model)}
    if config and size not in (config.input_size[-1], [*config.input_size[-2:]]):
        positions = f"{MODEL}pos_embed"
        weights.changed |= {positions: "resized by timm"} if positions in weights.tensors else {}
    return weights


def _timm_folder(folder: Path, config: Mapping[str, Any]) -> Weights:
    """A folder of timm's save_for_hf, which `simmim export --format timm` writes as well."""
    if "architecture" not in config:
        raise ValueError(f"{folder}/config.json names no model of timm or Hugging Face")
    chans, *sides = config.get("pretrained_cfg", {}).get("input_size", (3, 224, 224))
    options = dict(config.get("model_args") or {})
    size = options.pop("img_size", sides)
    architecture = Architecture(
        config["architecture"],
        size if isinstance(size, int) or size[0] != size[1] else size[0],
        options.pop("in_chans", chans),
        options,
        norm_eps=config.get("simmim", {}).get("norm_eps"),  # timm's config has no place for it
    )
    weights = Weights(str(folder), architecture)
    for name, tensor in read_folder(folder).items():
        weights.add(name, f"{MODEL}{name}", tensor)
    weights.grid = _patches(weights)
    return weights
