"""An encoder of a user's own, in place of one of timm's."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import timm
from torch import nn

from simmim.parts.names import check_call, find_part, find_registered, is_path, signature_of


def find_own_encoder(name: str, *, trust: bool = False) -> Callable[..., nn.Module] | None:
    """Find a user's own encoder, by its import path or as it was registered.

    Args:
        name: What the user says.
        trust: Whether it may be imported.

    Returns:
        What makes it; None where the name is one of timm's, or no name at all.

    Raises:
        ValueError: If it cannot be imported, or is not trusted.
    """
    if (own := find_registered(name, "encoder")) is not None:
        return own
    if not is_path(name) or timm.is_model(name):
        return None
    first = name.partition(".")[0]  # "vit_bsae_patch16_224.mae" is a slip of the pen
    if get_close_matches(first, timm.list_models(), n=1, cutoff=0.8) and find_spec(first) is None:
        return None
    return find_part(name, {}, "encoder", trust=trust)


def build_own(
    create: Callable[..., nn.Module], name: str, wished: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    """Make a user's own encoder.

    Args:
        create: A class or function.
        name: Its name.
        wished: Options that are given to it where it takes them.
        given: Options that it must take.

    Raises:
        ValueError: If it has no such option, or gives something else than a module.
    """
    parameters = signature_of(create).parameters
    wished = {**wished, **{k: given[k] for k in ("num_classes", "in_chans") if k in given}}
    given = {key: value for key, value in given.items() if key not in ("num_classes", "in_chans")}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        wished = {key: value for key, value in wished.items() if key in parameters}
        if given.get("drop_path_rate") and "drop_path_rate" not in parameters:
            raise ValueError(
                f"encoder {name!r} takes no drop_path_rate: leave it out (--model.drop_path_rate 0)"
            )
    check_call(create, name, "encoder", options={**wished, **given})
    model = create(**{**wished, **given})
    if not isinstance(model, nn.Module):
        raise ValueError(f"encoder {name!r} gives a {type(model).__name__}: return an nn.Module")
    return model
