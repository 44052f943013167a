"""Units of choice: the layers of a network, or the parameter groups that the user passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fishopt.groups import Groups, by_layer

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]] | None
"""What ``params`` may be, as with torch.optim; None for all of the model's."""


def parameter_groups(params: Params, own: list[Tensor]) -> tuple[list[dict[str, Any]], bool]:
    """The parameter groups, and whether layers are the units of choice: unless the user passes groups.

    Args:
        params: What the user passes.
        own: The model's parameters: all of them, since what is frozen may be thawed.

    Raises:
        ValueError: If ``params`` is empty.
    """
    if params is None:
        return [{"params": own}], True
    listed: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if not listed:
        raise ValueError("params is empty; pass some of the model's parameters, or leave it out")
    if isinstance(listed[0], dict):
        return [dict(group) for group in listed], False
    return [{"params": listed}], True


def members(group: dict[str, Any], names: dict[Tensor, str]) -> list[Any]:
    """The parameters of a group as a list, each checked to be the model's.

    Raises:
        ValueError: If one is not.
    """
    listed = group.get("params", ())
    listed = [listed] if isinstance(listed, Tensor) else list(listed)
    parameters = [p[1] if isinstance(p, tuple) else p for p in listed]
    for p in parameters:
        if isinstance(p, Tensor) and p not in names:
            raise ValueError(
                f"params holds a tensor of shape {tuple(p.shape)} that is not a parameter of model; pass the model's "
                "own parameters"
            )
    return parameters


def units(groups: list[dict[str, Any]], names: dict[Tensor, str], *, layerwise: bool) -> tuple[Groups, dict[str, str]]:
    """The units of choice, and the estimator asked for in each.

    Args:
        groups: The optimizer's parameter groups; with ``layerwise`` the first is cut into layers.
        names: Parameter -> its name in the model.
        layerwise: Whether the user left the groups to us.
    """
    found: Groups = {}
    wanted: dict[str, str] = {}
    for i, group in enumerate(groups):
        trained = tuple(names[p] for p in group["params"] if p.requires_grad)
        name = str(group.get("name", f"group {i}"))
        own = by_layer(trained) if layerwise and i == 0 else {f"{name} ({i})" if name in found else name: trained}
        found.update({unit: listed for unit, listed in own.items() if listed})
        wanted.update(dict.fromkeys(own, group["estimator"]))
    return found, wanted
