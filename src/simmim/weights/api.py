"""What users call: weights of any kind into a timm model, a SimMIM, or a checkpoint of ours."""

from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from simmim.weights.fit import HEAD, MODEL, TOKEN, Report, Weights, fit
from simmim.weights.resize import Resize
from simmim.weights.sources import build_encoder, open_weights


def load_encoder(
    path: str | Path,
    *,
    encoder: str | None = None,
    resize: Resize = "official",
    trust: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """Load an encoder as an ordinary timm model.

    Args:
        path: A checkpoint of ours or its run's folder, an official SimMIM or Swin file (pretrained
            or fine-tuned), a Hugging Face folder of a ViT, DeiT, BEiT, Swin or SwinV2, a folder of
            timm's, the state dict of a timm model (MAE's releases are such), or `timm:NAME` for
            timm's own weights.
        encoder: Name of the timm model that a state dict is of; of a ViT num_heads will do.
        resize: How positions change size, as the "official" code or as "timm" does it.
        trust: Whether an encoder of a user's own, which a checkpoint names by its import path, may
            be imported, which runs its code.
        timm_kwargs: Options of the timm model that are to differ from the file's: img_size,
            num_classes, window_size, ... The classifier of a fine-tuned file is kept unless
            num_classes says otherwise. The paper fine-tunes its ViT with use_rel_pos_bias=True,
            use_shared_rel_pos_bias=False (each block gets a copy of the shared table) and
            global_pool="avg".

    Returns:
        The timm model; its attribute `report` says what became of each tensor.

    Raises:
        ValueError: If the encoder in the file is not complete or does not fit, or if the file is
            of no kind that is known, or asks for code to be run.
    """
    weights = open_weights(path, timm_kwargs, encoder=encoder, trust=trust)
    if encoder not in (None, weights.architecture.encoder):
        raise ValueError(
            f"{path} is of {weights.architecture.encoder}, not of {encoder}: leave encoder out"
        )
    return encoder_of(weights, resize, **timm_kwargs)


def encoder_of(weights: Weights, resize: Resize = "official", **timm_kwargs: Any) -> nn.Module:
    """Build the timm model of a file that is open, as `load_encoder` does."""
    given = {"num_classes": count_classes(weights), **weights.architecture.options, **timm_kwargs}
    model = build_encoder(weights.architecture, given)
    for ours in [name for name in weights.tensors if not name.startswith(MODEL)]:
        weights.drop(ours, "for pretraining alone")
    places = {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    model.report = fit(weights, places, model, resize)  # type: ignore[assignment]
    return model


def load_weights(
    model: Any, source: str | Path, resize: Resize = "official", *, trust: bool = False
) -> Report:
    """Load weights to go on from, as `--model.weights` does.

    Args:
        model: A SimMIM. A head that does not fit, or is not in the file, begins anew.
        source: As `path` of `load_encoder`.
        resize: How positions change size, as the "official" code or as "timm" does it.
        trust: As of `load_encoder`.

    Returns:
        What became of each tensor; the model's attribute `report` keeps it.

    Raises:
        ValueError: If the file's encoder is not complete, or is not the model's.
    """
    options = dict(model.hparams.get("encoder_kwargs") or {})
    options.pop("norm_eps", None)
    size, chans = list(model.encoder.img_size), model.hparams["in_chans"]
    given = {**options, "img_size": size, "in_chans": chans}
    weights = open_weights(source, given, encoder=model.hparams["encoder"], trust=trust)
    check_heads(weights, model.encoder.model)
    report = fit(weights, places_of(model), model.encoder.model, resize)
    if (eps := weights.architecture.norm_eps) is not None:  # a checkpoint of this model keeps it
        model.hparams["encoder_kwargs"] = {**options, "norm_eps": eps}
    rank_zero_info(str(report))
    model.report = report
    return report


def places_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of encoder and head, by name."""
    state = model.state_dict()
    return {n: t for n, t in state.items() if n.startswith((MODEL, HEAD)) or n == TOKEN}


def count_classes(weights: Weights) -> int:
    """Number of classes of the classifier in a file; 0 where there is none."""
    config = timm.get_pretrained_cfg(weights.architecture.encoder)
    names = (config.classifier if config else None) or "head"
    first = names if isinstance(names, str) else names[0]
    tensor = weights.tensors.get(f"{MODEL}{first}.weight")
    return 0 if tensor is None else len(tensor)


def check_heads(weights: Weights, model: nn.Module) -> None:
    """Refuse another number of attention heads: no shape would tell, and all would be wrong."""
    with torch.device("meta"):
        source = build_encoder(weights.architecture, weights.architecture.options)
    theirs, ours = _heads(source), _heads(model)
    if theirs != ours:
        raise ValueError(
            f"{weights.source} has {theirs} attention heads and the encoder {ours}: build it with "
            f"encoder {weights.architecture.encoder} and encoder_kwargs "
            f"{weights.architecture.options}"
        )


def _heads(model: nn.Module) -> list[int]:
    """Attention heads, where they change from block to block."""
    heads = [module.num_heads for module in model.modules() if hasattr(module, "num_heads")]
    return [n for i, n in enumerate(heads) if isinstance(n, int) and (not i or n != heads[i - 1])]
