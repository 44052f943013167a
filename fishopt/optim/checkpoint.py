"""Whether a checkpoint belongs to an optimizer: by its kind, and by the names and shapes of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fishopt.optim.averages import precision

Identity = dict[str, Any]
"""``"optimizer"``, and for each group ``"names"`` and ``"shapes"`` of its parameters."""


def refuse_another(state_dict: dict[str, Any], here: Identity) -> dict[str, Any]:
    """The part of ``state_dict`` that is fishopt's own.

    Raises:
        ValueError: If it is of another kind of optimizer, or of another model.
    """
    own = state_dict.get("fishopt")
    if own is None:
        raise ValueError("state_dict has no entry 'fishopt'; pass the state_dict of a fishopt optimizer")
    if own["optimizer"] != here["optimizer"]:
        raise ValueError(f"state_dict is of {own['optimizer']}; load it into that, not into {here['optimizer']}")
    if [len(group) for group in own["names"]] != [len(group) for group in here["names"]]:
        raise ValueError(
            f"state_dict is of another model or of other parameter groups: {_sizes(own)} parameters in its groups, "
            f"{_sizes(here)} here; build the same model and groups first"
        )
    for theirs, mine in zip(_parameters(own), _parameters(here), strict=True):
        if theirs != mine:
            raise ValueError(
                f"state_dict is of another model: it has {_shown(theirs)} where this one has {_shown(mine)}"
            )
    return dict(own)


def restore_precision(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Undoes the rounding of a loaded state to its parameters' dtype, which torch.optim does to all state.

    Args:
        state_dict: What was loaded.
        groups: The parameter groups that it was loaded into.
        states: The state of each of their parameters.
    """
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    params = (p for group in groups for p in group["params"])
    for key, p in zip(keys, params, strict=True):
        for name, saved in state_dict["state"].get(key, {}).items():
            if isinstance(saved, Tensor) and saved.dtype != p.dtype:
                states[p][name] = saved.to(p.device, precision(p), copy=True)


def _parameters(identity: Identity) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (name, tuple(shape))
        for names, shapes in zip(identity["names"], identity["shapes"], strict=True)
        for name, shape in zip(names, shapes, strict=True)
    ]


def _sizes(identity: Identity) -> str:
    return ", ".join(str(len(group)) for group in identity["names"])


def _shown(parameter: tuple[str, tuple[int, ...]]) -> str:
    return f"{parameter[0]!r} of shape {parameter[1]}"
