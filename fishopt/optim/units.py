"""Units of choice: the layers of a network, or the parameter groups that the user passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from torch import Tensor, nn

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
        TypeError: If it is not a list, or one of parameters and groups.
    """
    if params is None:
        return [{"params": own}], True
    listed = _listed(params)
    groups = [dict(group) for group in listed if isinstance(group, Mapping)]
    if groups and len(groups) < len(listed):
        raise TypeError("params holds both groups and parameters; pass a list of either")
    for group in groups:
        group["params"] = _listed(_members_of(group))
    if not (any(group["params"] for group in groups) if groups else listed):
        raise ValueError("params is empty; pass some of the model's parameters, or leave it out")
    return groups or [{"params": listed}], not groups


def members(group: dict[str, Any], names: dict[Tensor, str]) -> list[Any]:
    """The parameters of a group as a list, each checked to be the model's.

    Raises:
        ValueError: If one is not.
        TypeError: If one is no tensor.
    """
    parameters = [p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in _listed(_members_of(group))]
    for p in parameters:
        if not isinstance(p, Tensor):
            raise TypeError(f"params holds a {type(p).__name__}; pass the model's own parameters")
        if p not in names:
            raise ValueError(
                f"params holds a tensor of shape {tuple(p.shape)} that is not a parameter of model; pass the model's "
                "own parameters"
            )
    return parameters


def _members_of(group: dict[str, Any]) -> Any:
    if "params" not in group:
        raise ValueError(f"params holds a group {group!r} without an entry 'params'; put the model's parameters there")
    return group["params"]


def _listed(params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        return [params]
    # Of a set the order changes from run to run, and with it what a checkpoint holds.
    if isinstance(params, str | Mapping | Set) or not isinstance(params, Iterable):
        raise TypeError(f"params is a {type(params).__name__}; pass parameters of model in a list, or a list of groups")
    return list(params)


LEFT = " (no longer in the model)"
"""Goes with the last name of a parameter that was taken out of the model."""


def known_as(model: nn.Module, before: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """Parameter -> its name: layers are put in, wrapped and pruned while training goes on.

    Args:
        model: The model.
        before: The names so far, also of parameters that have left the model by now.
    """
    now = {p: name for name, p in model.named_parameters()}
    return {p: name.removesuffix(LEFT) + LEFT for p, name in before.items()} | now


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
        trained = tuple(names[p] for p in group["params"] if p.requires_grad and not names[p].endswith(LEFT))
        name = str(group.get("name", f"group {i}"))
        own = by_layer(trained) if layerwise and i == 0 else {f"{name} ({i})" if name in found else name: trained}
        found.update({unit: listed for unit, listed in own.items() if listed})
        wanted.update(dict.fromkeys(own, group["estimator"]))
    return found, wanted
