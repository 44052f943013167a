"""Checkpoints by `torch.distributed.checkpoint`, which knows of groups and parameters' state and of no more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fishopt.optim.averages import begun, precision

Group = dict[str, Any]

KEY = "fishopt"
"""Name of the optimizer's own entry, in a state_dict and in its first group."""


def with_copy(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict whose first group has a copy of the optimizer's own entry.

    As one string: entries that are nested get flattened on the way, which a history of another length does not survive,
    and tensors are moved to the parameters' device, where a generator's state is of no use.
    """
    first, *others = state_dict["param_groups"]
    copied = {**first, KEY: json.dumps(state_dict[KEY], default=_tagged)}
    return {**state_dict, "param_groups": [copied, *others]}


def from_copy(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict as it was before `with_copy`, even if only its groups and parameters' state are left of it."""
    if "param_groups" not in state_dict:
        return state_dict
    listed = state_dict["param_groups"]
    groups = [{key: value for key, value in group.items() if key != KEY} for group in listed]
    copies = [group[KEY] for group in listed if KEY in group]
    found = {**state_dict, "param_groups": groups}
    if KEY not in found and any(copies):
        found[KEY] = json.loads(copies[0], object_hook=_untagged)
    return found


def is_trial(groups: Iterable[Group]) -> bool:
    """Whether a step is the one by which `torch.distributed.checkpoint` has a new optimizer make its state.

    It sets learning rates and gradients to zero for that. A step with a closure has its gradients yet to come.
    """
    return all(
        group["lr"] == 0 and all(p.grad is not None and not p.grad.any() for p in group["params"] if p.requires_grad)
        for group in groups
    )


def make_room(optimizer: torch.optim.Optimizer, scalars: Iterable[str]) -> None:
    """Makes all the state that there will be, for a checkpoint to be loaded into.

    Args:
        optimizer: It has no state yet.
        scalars: Names of what the update rule keeps besides tensors of the parameter's shape.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
        zeros = partial(torch.zeros, dtype=precision(p), device=p.device)
        further = {"preconditioner": torch.zeros_like(p, dtype=precision(p)), **{name: zeros(()) for name in scalars}}
        optimizer.state[p] = {**begun(p), **further}
    optimizer.param_groups[0][KEY] = ""  # of flattened checkpoints only what is there gets loaded


def _tagged(value: Any) -> dict[str, str]:
    if not isinstance(value, Tensor):
        raise TypeError(f"{type(value).__name__} in a state_dict")
    return {"uint8": bytes(value.tolist()).hex()}


def _untagged(value: dict[str, Any]) -> Any:
    if value.keys() == {"uint8"}:
        return torch.tensor(list(bytes.fromhex(value["uint8"])), dtype=torch.uint8, device="cpu")
    return value
