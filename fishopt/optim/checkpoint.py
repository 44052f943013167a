"""Checkpoints: whether one belongs to an optimizer, and how those of older versions are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fishopt.checks import check_flag, checked_option
from fishopt.estimators import ESTIMATORS
from fishopt.optim.averages import precision
from fishopt.optim.checks import number, whole

TRAINED, AVERAGE, ASKED = "trained", "average", "average, asked for"
"""What the parameters hold: what is trained, or its average, put in by itself or by the user."""

Identity = dict[str, Any]
"""``"optimizer"``, and for each group ``"names"`` and ``"shapes"`` of its parameters."""


def identity(optimizer: torch.optim.Optimizer, name_of: Mapping[Tensor, str]) -> Identity:
    """The optimizer's own."""
    groups = [group["params"] for group in optimizer.param_groups]
    return {
        "optimizer": type(optimizer).__name__,
        "names": [[name_of[p] for p in params] for params in groups],
        "shapes": [[list(p.shape) for p in params] for params in groups],
    }


VERSION = 3
"""Of the layout of fishopt's part of a checkpoint; counted up with every change to it."""


def _from_1(own: dict[str, Any]) -> dict[str, Any]:
    """Fishopt 0.1.0, which kept neither a version nor whether a refresh had ever succeeded, and skipped no steps."""
    curvature = own["curvature"]
    has_succeeded = own["steps"] > 0 or own["is_fresh"]
    failures = [*curvature["failures"], has_succeeded]
    return {**own, "skipped": [0, 0], "curvature": {**curvature, "failures": failures}}


def _from_2(own: dict[str, Any]) -> dict[str, Any]:
    """Of before there were averages of parameters."""
    return {**own, "holds": TRAINED}


OLDER: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2}
"""Version -> what makes the next one's layout of it."""

BEFORE = {"schedule_free": False, "warmup": 0}
"""Options that say what the state means, and what it meant before there was the option."""


def read(state_dict: dict[str, Any], here: Identity) -> dict[str, Any]:
    """The part of ``state_dict`` that is fishopt's own, in today's layout.

    Raises:
        ValueError: If it is of a newer version, of another kind of optimizer, or of another model.
    """
    own = state_dict.get("fishopt")
    if not isinstance(own, dict):
        raise ValueError("state_dict has no entry 'fishopt'; pass the state_dict of a fishopt optimizer")
    version = own.get("version", 1)
    if version not in (*OLDER, VERSION):
        raise ValueError(
            f"state_dict has layout version {version!r}, and this fishopt reads up to {VERSION}; load it with the "
            "fishopt that wrote it, or a newer one"
        )
    _refuse_another(own, here)
    while version in OLDER:
        own, version = OLDER[version](own), version + 1
    return dict(own)


def _refuse_another(own: dict[str, Any], here: Identity) -> None:
    if own["optimizer"] != here["optimizer"]:
        raise ValueError(f"state_dict is of {own['optimizer']}; load it into that, not into {here['optimizer']}")
    if any([len(group) for group in own[key]] != [len(group) for group in here[key]] for key in ("names", "shapes")):
        raise ValueError(
            f"state_dict is of another model or of other parameter groups: {_sizes(own)} parameters in its groups, "
            f"{_sizes(here)} here; build the same model and groups first"
        )
    for theirs, mine in zip(_parameters(own), _parameters(here), strict=True):
        if theirs != mine:
            raise ValueError(
                f"state_dict is of another model: it has {_shown(theirs)} where this one has {_shown(mine)}"
            )


@contextmanager
def refuse_damaged(state_dict: Any) -> Iterator[None]:
    """Names the cause where something is missing from a checkpoint, or is not what was saved.

    Raises:
        ValueError: If so.
        TypeError: If it is no dict at all.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; pass what state_dict() returned")
    try:
        yield
    except KeyError as error:
        raise ValueError(f"state_dict lacks {error}: it is damaged, or was edited; pass it whole") from error
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"state_dict is damaged, {type(error).__name__}: {error}; pass what state_dict() returned, whole"
        ) from error


def check_values(own: Mapping[str, Any]) -> None:
    """Checks what would be loaded as it is, and break a later step.

    Raises:
        ValueError: If something is not of the kind that is saved.
    """
    curvature = own["curvature"]
    counts = {"steps": own["steps"], "next_selection": curvature["next_selection"]}
    for name, value in counts.items():
        whole(f"state_dict['fishopt']: {name}", value, low=0)
    numbers = {"seconds": [own["seconds"], curvature["seconds"]], "moment": own["moment"]}
    for name, values in {**numbers, "failures": curvature["failures"][:2], "noise": curvature["noise"]}.items():
        for value in values:
            number(f"state_dict['fishopt']: {name}", value)
    check_flag("state_dict['fishopt']: is_fresh", own["is_fresh"])
    checked_option("state_dict['fishopt']: holds", own["holds"], (TRAINED, AVERAGE, ASKED))
    for choice in curvature["choices"]:
        checked_option("state_dict['fishopt']: estimator", choice["estimator"], tuple(ESTIMATORS))


NUMBERS = ("step", "refreshes", "averaged", "lr_max", "stretch", "beta")
"""What a parameter's state holds as plain numbers."""


def check_states(states: Mapping[Tensor, Any], names: Mapping[Tensor, str]) -> None:
    """Checks that what was loaded for each parameter is whole and of its shape.

    Raises:
        ValueError: If it is not.
    """
    for p, state in states.items():
        own = dict.fromkeys(("exp_avg", "fisher", "preconditioner"), tuple(p.shape))
        shapes: dict[str, tuple[int, ...]] = {"step": (), "refreshes": (), **own}
        if not shapes.keys() & state.keys():  # wrappers around an optimizer keep things of theirs there as well
            continue
        optional = dict.fromkeys((*NUMBERS, "peak", "energy"), ()) | {"y": tuple(p.shape)}
        shapes |= {name: shape for name, shape in optional.items() if name in state}
        for name, shape in shapes.items():
            value = state[name]
            where = f"state_dict['state'] of {names[p]!r}: {name}"
            if name in NUMBERS:
                number(where, value, above=name == "stretch")
            elif not isinstance(value, Tensor) or value.shape != shape:
                shown = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"={value!r}"
                raise ValueError(f"{where}{shown}, not a tensor of shape {shape}; pass what state_dict() returned")


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
