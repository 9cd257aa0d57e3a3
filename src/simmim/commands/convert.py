"""`simmim convert`: an official release, a state dict or shards -> one checkpoint of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning import __version__ as lightning_version

from simmim.base.files import written_whole
from simmim.base.progress import status
from simmim.pretrain import load_official
from simmim.weights import Report, find_checkpoint
from simmim.weights.shards import is_sharded, read_sharded


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
