"""Step size and momentum from the quadratic model of the loss: nothing to tune, and no step that makes it larger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fishopt.optim.atomic import Transaction
from fishopt.optim.objective import Objective
from fishopt.optim.quadratic import Quadratic, inner

LEAST, MOST = 1e-8, 1e8
"""Limits of the damping."""

TRIALS = 8
"""Steps that are tried, each with more damping, before the parameters are left where they are."""

POOR, GOOD = 0.25, 0.75
"""What the loss fell by over what was predicted: below, the damping grows; above, it shrinks."""

WORSE, BETTER, UNDONE = 2.25, 1 / 1.5, 4.0
"""By what factors, and by what after a step that was undone."""


class Point(NamedTuple):
    """Where a search starts, all of it as vectors over the parameters.

    Attributes:
        names: The parameters' names.
        params: The parameters.
        gradient: The loss's gradient.
        inverse: The inverse of the preconditioner.
        last: The last step.
        decay: The weight decay of each entry, or of all.
        shares: The learning rate of each entry, or of all, relative to the largest.
        rate: The largest: how much of a step is made.
    """

    names: list[str]
    params: list[Tensor]
    gradient: Tensor
    inverse: Tensor
    last: Tensor
    decay: Tensor | float
    shares: Tensor | float
    rate: float


class Found(NamedTuple):
    """A search's outcome.

    Attributes:
        step: The step that was made, a vector; zero if none made the loss smaller.
        damping: What the next search starts from.
        undone: Steps that were undone.
    """

    step: Tensor
    damping: float
    undone: int


def search(point: Point, objective: Objective, damping: float, undo: Transaction) -> Found:
    r"""Moves the parameters to where the model of the loss is least in the span of ``-g / D`` and the last step.

    The model is ``L + g^T d + d^T G d / 2``, G the exact Gauss-Newton matrix of the loss on the batch, and its minimum
    taken with ``damping d^T D d / 2`` added, D being the preconditioner (Levenberg-Marquardt).

    Args:
        point: Where to start.
        objective: The loss.
        damping: The Levenberg-Marquardt damping.
        undo: Takes the parameters back if something fails before it commits.
    """
    origin = [p.detach().clone() for p in point.params]
    undo.on_failure(lambda: torch._foreach_copy_(point.params, origin))
    theta = flat(origin).to(point.gradient)
    directions = _directions(point, theta)
    value, model, penalty = _model(point, objective, directions, theta)
    found = Found(torch.zeros_like(theta), damping, 0)
    for undone in range(TRIALS):
        c = model.minimum(damping) * point.rate
        step = c.to(directions) @ directions
        _move(point.params, origin, step)
        predicted = model.change(c)
        risen = objective.value() - value + penalty(c, step)
        if math.isfinite(risen) and risen <= 0 and predicted <= 0:
            return Found(step, _adapted(damping, risen, predicted), undone)
        damping = min(damping * UNDONE, MOST)
        torch._foreach_copy_(point.params, origin)
        found = Found(found.step, damping, undone + 1)
    return found


def _directions(point: Point, theta: Tensor) -> Tensor:
    first = (point.gradient + point.decay * theta).neg_().mul_(point.inverse).mul_(point.shares)
    return torch.stack([first, point.last]) if bool(point.last.any()) else first[None]


def _model(
    point: Point, objective: Objective, directions: Tensor, theta: Tensor
) -> tuple[float, Quadratic, Callable[[Tensor, Tensor], float]]:
    """The loss, its model with weight decay, and the change of what the objective does not know of by a step."""
    named = [dict(zip(point.names, split(d, point.params), strict=True)) for d in directions]
    value, own, curvature = objective.along(named)
    slopes = inner(directions, point.gradient[None])[:, 0]
    # Penalties that the user adds to the loss; nothing is known of them but the slope.
    others = torch.zeros_like(slopes) if own is None else slopes - own
    decayed = directions * point.decay
    metric = inner(directions / point.inverse, directions)
    model = Quadratic(slopes + inner(decayed, theta[None])[:, 0], curvature + inner(decayed, directions), metric)

    def penalty(c: Tensor, step: Tensor) -> float:
        return float(others @ c + (point.decay * step * (theta + step / 2)).sum())

    return value, model, penalty


def _adapted(damping: float, risen: float, predicted: float) -> float:
    ratio = risen / predicted if predicted < 0 else 0.0
    factor = WORSE if ratio < POOR else BETTER if ratio > GOOD else 1.0
    return min(max(damping * factor, LEAST), MOST)


def _move(params: Sequence[Tensor], origin: Sequence[Tensor], step: Tensor) -> None:
    for p, old, d in zip(params, origin, split(step, params), strict=True):
        p.copy_(old + d)


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector over parameters as tensors of their shapes, on their devices."""
    parts = vector.split([p.numel() for p in like])
    return [part.view(p.shape).to(p.device) for part, p in zip(parts, like, strict=True)]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector, on the first one's device."""
    return torch.cat([x.reshape(-1).to(tensors[0].device) for x in tensors])
