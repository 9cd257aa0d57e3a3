"""What users call: weights of any kind into a timm model, a SimMIM, or a checkpoint of ours."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from lightning import __version__ as lightning_version
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from simmim.bar import status
from simmim.durable import written_whole
from simmim.weights.files import find_checkpoint, read_checkpoint
from simmim.weights.fit import HEAD, MODEL, TOKEN, Report, Weights, fit
from simmim.weights.official import official_weights
from simmim.weights.resize import Resize
from simmim.weights.shards import is_sharded, read_sharded
from simmim.weights.sources import build_encoder, is_ours, open_weights
from simmim.weights.state_dict import find_tensors, is_official, timm_state_dict

if TYPE_CHECKING:  # they import this module
    from simmim.pretrain import SimMIM
    from simmim.recipe import Recipe


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
    given = {"num_classes": _classes(weights), **weights.architecture.options, **timm_kwargs}
    model = build_encoder(weights.architecture, given)
    for ours in [name for name in weights.tensors if not name.startswith(MODEL)]:
        weights.drop(ours, "for pretraining alone")
    places = {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    model.report = fit(weights, places, model, resize)  # type: ignore[assignment]
    return model


def load_official(
    source: str | Path | Mapping[str, Any],
    *,
    encoder: str | None = None,
    img_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    num_heads: int | Sequence[int] | None = None,
    window_size: int | None = None,
    mask_patch_size: int | None = None,
    target: str | None = None,
    resize: Resize = "official",
    **encoder_kwargs: Any,
) -> "SimMIM":
    """Build the model of an official pretraining release, decoder included.

    The state dict of a timm model gives the encoder; the decoder begins anew.

    What the file says or its shapes imply need not be given; what is given wins. How the release
    was optimised (learning rates, drop path) is not taken over: pass drop_path_rate=0.1 to go on
    with the ViT as it was.

    Args:
        source: A .pth file, or a mapping: of official names to tensors, buffers included, or what
            such a file holds. Or the state dict of a timm model.
        encoder: Name of the timm model that a state dict is of; of a ViT num_heads will do.
        img_size: Size of the images in pixels.
        patch_size: Pixels per token of the stem.
        num_heads: Attention heads, of Swin a number for each stage. No shape tells those of a ViT
            without position-bias tables.
        window_size: Swin's window, in tokens.
        mask_patch_size: Side of a mask cell in pixels; 32 where the file does not say.
        target: What is predicted; pixels where the file does not say.
        resize: How positions change size, as the "official" code or as "timm" does it.
        encoder_kwargs: Further options of the encoder, or of SimMIM.

    Returns:
        The model; its attribute `report` says what became of each tensor.

    Raises:
        ValueError: If the file is no pretraining file, lacks a part, or asks for code to be run.
    """
    from simmim.pretrain import SimMIM

    is_mapping = isinstance(source, Mapping)
    content = source if isinstance(source, Mapping) else read_checkpoint(find_checkpoint(source))
    if is_ours(content):
        raise ValueError(f"{source} is no official file, but a checkpoint of ours: use it as it is")
    file = "the mapping" if is_mapping else str(source)
    options = {
        name: encoder_kwargs.pop(name)
        for name in {*encoder_kwargs} & {*inspect.signature(SimMIM).parameters}
    }
    tensors = find_tensors(content, file)
    sizes: dict[str, Any] = {
        "img_size": img_size,
        "patch_size": patch_size,
        "num_heads": num_heads,
        "window_size": window_size,
    }
    if not is_official(content, tensors):
        given = {name: value for name, value in sizes.items() if value is not None}
        weights = timm_state_dict(tensors, file, encoder, {**encoder_kwargs, **given})
    elif encoder is None:
        weights = official_weights({**content, "model": tensors}, file, **sizes)
        if f"{HEAD}proj.weight" not in weights.tensors or TOKEN not in weights.tensors:
            raise ValueError(
                f"{file} is no pretraining file, it has no decoder or no mask token: use it as it "
                "is, --model.weights FILE, or open it with load_encoder"
            )
    else:
        raise ValueError(f"{file} is an official file, which tells its model: leave encoder out")
    task = weights.architecture.task
    if target is not None and target != task.get("target", "pixels"):
        task = {**task, "target": target, "target_kwargs": None}
    if mask_patch_size is not None:
        task = {**task, "mask_patch_size": mask_patch_size}
    model = SimMIM(
        encoder=weights.architecture.encoder,
        **{
            "img_size": img_size or weights.architecture.img_size,
            "in_chans": weights.architecture.in_chans,
            "encoder_kwargs": {**weights.architecture.options, **encoder_kwargs},
            **task,
            **options,
        },
    )
    report = fit(weights, _places(model), model.encoder.model, resize)
    model.report = report
    return model


def load_weights(
    model: "Recipe", source: str | Path, resize: Resize = "official", *, trust: bool = False
) -> Report:
    """Load weights to go on from, as `--model.weights` does.

    Args:
        model: The model. A head that does not fit, or is not in the file, begins anew.
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
    _check_heads(weights, model.encoder.model)
    report = fit(weights, _places(model), model.encoder.model, resize)
    if (eps := weights.architecture.norm_eps) is not None:  # a checkpoint of this model keeps it
        model.hparams["encoder_kwargs"] = {**options, "norm_eps": eps}
    rank_zero_info(str(report))
    model.report = report
    return report


def convert(weights: str | Path, out: str | Path, **kwargs: Any) -> Report | str:
    """Turn an official pretraining file, or a checkpoint in shards, into one file of ours.

    The state dict of a timm model becomes one as well, with `encoder` and a new head.

    Args:
        weights: The official .pth file, or the state dict of a timm model; or a checkpoint in
            shards, or the folder of its run.
        out: The checkpoint; `SimMIM.load_from_checkpoint` opens it.
        kwargs: As in `load_official`.

    Returns:
        What became of each tensor; of shards, which are only put together, one sentence.

    Raises:
        ValueError: As in `load_official`, or if a shard is missing, or `out` is there already.
    """
    found = find_checkpoint(weights)
    if Path(out).exists():
        raise ValueError(f"{out} is there already: remove it, or give another --out")
    if is_sharded(found):
        content = read_sharded(found)
        _write(content, Path(out))
        return f"{found}, with {content['global_step']} steps behind it, in one file: {out}"
    with status("Reading and fitting the weights"):
        model = load_official(weights, **kwargs)
    checkpoint = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": lightning_version,
        "epoch": 0,
        "global_step": 0,
    }
    _write(checkpoint, Path(out))
    return cast(Report, model.report)


def _write(checkpoint: Mapping[str, Any], out: Path) -> None:
    with written_whole(out) as part:
        torch.save(checkpoint, part)


def _places(model: "Recipe") -> dict[str, Tensor]:
    """The tensors of encoder and head, by name."""
    state = model.state_dict()
    return {n: t for n, t in state.items() if n.startswith((MODEL, HEAD)) or n == TOKEN}


def _classes(weights: Weights) -> int:
    """Number of classes of the classifier in a file; 0 where there is none."""
    config = timm.get_pretrained_cfg(weights.architecture.encoder)
    names = (config.classifier if config else None) or "head"
    first = names if isinstance(names, str) else names[0]
    tensor = weights.tensors.get(f"{MODEL}{first}.weight")
    return 0 if tensor is None else len(tensor)


def _check_heads(weights: Weights, model: nn.Module) -> None:
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
