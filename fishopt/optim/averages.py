"""From new estimates to what preconditioners are made of: a moving average of each parameter's Fisher diagonal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishopt.groups import by_layer
from fishopt.passes import Diagonal

State = dict[str, Any]

ENERGY_DECAY = 0.9
"""Decay rate, per refresh, of the gradients' mean squares: one number for a tensor needs less averaging than each
entry of its Fisher diagonal, and the gradients' size changes faster than their shape."""


class Average(NamedTuple):
    """The averaged Fisher diagonal of one parameter, ``correction * values``, and what damping can be relative to.

    The factor is left out of the values to spare a pass over them; there are few enough to matter.

    Attributes:
        values: Of the parameter's shape, not negative, not corrected for the average's start at zero. They lie in the
            memory of the last preconditioner and may be overwritten.
        correction: What corrects them.
        layer: The corrected mean over the parameter's layer, a scalar tensor.
        model: The same over the model.
        energy: The layer's averaged mean square of the training gradient, zero if none was seen; None if not asked for.
    """

    values: Tensor
    correction: float
    layer: Tensor
    model: Tensor
    energy: Tensor | None = None


def precision(p: Tensor) -> torch.dtype:
    """What a parameter's state is kept in and its step computed in: its own dtype, float32 at least.

    In bfloat16 an average stands still where what it is to take in is below a 512th of it, which with a decay rate of
    0.999 leaves it wrong by a quarter; in float16 it loses gradients below 6e-8 altogether.
    """
    return torch.promote_types(p.dtype, torch.float32)


def begun(p: Tensor) -> State:
    """The state of a parameter that has no estimate yet."""
    zeros = partial(torch.zeros_like, p, dtype=precision(p))
    return {"step": 0, "refreshes": 0, "exp_avg": zeros(), "fisher": zeros()}


def follow(p: Tensor, state: State) -> None:
    """Takes a state to its parameter's device and precision, which `torch.nn.Module.to` may have changed."""
    for name, value in state.items():
        if isinstance(value, Tensor):  # not all of it is ours: masks and counters keep their types
            state[name] = value.to(p.device, precision(p) if value.is_floating_point() else value.dtype)


def measure(params: Mapping[str, Tensor], states: Mapping[str, State]) -> None:
    """Takes the training gradients' mean squares into the moving averages ``"energy"`` of the parameters' states."""
    for name, p in params.items():
        state, grad = states[name], p.grad
        if grad is None:
            continue
        new = torch.linalg.vector_norm(grad, dtype=precision(p)).square_().div_(max(p.numel(), 1))
        old = state.get("energy", torch.zeros_like(new)).to(new)
        # A plain mean at first; from the start, also where earlier refreshes saw no gradient.
        share = max(1 - ENERGY_DECAY, 1 / (state.get("refreshes", 0) + 1))
        state["energy"] = torch.where(old > 0, old.lerp(new, share), new)


def averaged(
    new: Diagonal, params: Mapping[str, Tensor], states: Mapping[str, State], decays: Mapping[str, float]
) -> dict[str, Average]:
    """Takes estimates into the moving averages that the parameters' states hold.

    Args:
        new: The estimates.
        params: The parameters, whose memory layout the averages take.
        states: Each parameter's state; what it lacks is put there.
        decays: The decay rate of each average.
    """
    for name, state in states.items():
        if "fisher" not in state:
            state.update(begun(params[name]))
        follow(params[name], state)
        state["refreshes"] += 1
    for decay in set(decays.values()):
        same = [name for name in states if decays[name] == decay]
        averages = [states[name]["fisher"] for name in same]
        torch._foreach_lerp_(averages, [new[name].to(x) for name, x in zip(same, averages, strict=True)], 1 - decay)
    # An average of I2 can be negative where it is small against its noise; the Fisher information is not.
    values = {name: _not_negative(state) for name, state in states.items()}
    corrections = {name: 1 / (1 - decays[name] ** state["refreshes"]) for name, state in states.items()}
    sums = {name: value.sum() * corrections[name] for name, value in values.items()}
    sizes = {name: max(value.numel(), 1) for name, value in values.items()}
    model = _mean(sums, sizes, sums)
    found = {}
    # By layer, whatever the groups: the Fisher diagonals of layers differ by orders of magnitude.
    for names in by_layer(states).values():
        layer = _mean(sums, sizes, names)
        energies = {name: states[name]["energy"] * sizes[name] for name in names if "energy" in states[name]}
        energy = _mean(energies, sizes, energies) if energies else None
        for name in names:
            of = values[name]
            graft = None if energy is None else energy.to(of)
            found[name] = Average(of, corrections[name], layer.to(of), model.to(of), graft)
    return found


def _not_negative(state: State) -> Tensor:
    fisher: Tensor = state["fisher"]
    memory = state["preconditioner"] if "preconditioner" in state else torch.empty_like(fisher)
    return torch.clamp_min(fisher, 0, out=memory)


def _mean(sums: Mapping[str, Tensor], sizes: Mapping[str, int], names: Iterable[str]) -> Tensor:
    listed = list(names)
    device = sums[listed[0]].device
    return torch.stack([sums[name].to(device) for name in listed]).sum() / sum(sizes[name] for name in listed)
