"""Step size and momentum from the quadratic model of the loss: nothing to tune, and no step that makes it larger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fishopt.optim.atomic import Transaction
from fishopt.optim.objective import Objective
from fishopt.optim.quadratic import Quadratic, inner

AVERAGE = 0.99
"""Decay rate of the average of models, where batches differ."""

SAME = 1e-3
"""What two losses may differ by, relative to them, and be taken for those of the same batch."""

LEAST, MOST = 1e-8, 1e8
"""Limits of the damping."""

TRIALS = 8
"""Steps that are tried, each with more damping, before the parameters are left where they are."""

POOR, GOOD = 0.25, 0.75
"""What the loss fell by over what was predicted: below, the damping grows; above, it shrinks."""

ROUNDING = 16
"""Rounding units that two values of the loss may differ by and be the same: near a minimum no step changes more."""

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


class Memory(NamedTuple):
    """What a search leaves to the next one: plain numbers, which a parameter group can hold and a checkpoint has.

    Attributes:
        damping: The Levenberg-Marquardt damping, in units of the preconditioner.
        loss: Where it ended.
        averaged: Models that were averaged.
        slopes: The average of their entries, each direction of length one in the metric.
        curvature: Those of the matrix.
        metric: That beside its diagonal.
    """

    damping: float = 1.0
    loss: float = 0.0
    averaged: float = 0.0
    slopes: tuple[float, float] = (0.0, 0.0)
    curvature: tuple[float, float, float] = (0.0, 0.0, 0.0)
    metric: float = 0.0

    def after(self, model: Quadratic) -> tuple[Quadratic, Self]:
        """The average with one more model, of directions of length one, and the memory of it."""
        if len(model.slopes) == 1 or not all(bool(part.isfinite().all()) for part in model):
            return model, self
        (a, b), (aa, ab, bb), c = self.slopes, self.curvature, self.metric
        entries = [a, b], [[aa, ab], [ab, bb]], [[1, c], [c, 1]]
        old = Quadratic(*(torch.tensor(x, dtype=torch.float64, device="cpu") for x in entries))
        new = old.mixed(model, max(1 / (self.averaged + 1), 1 - AVERAGE))
        (aa, ab), (_, bb) = new.curvature.tolist()
        a, b = new.slopes.tolist()
        c = float(new.metric[0, 1])
        return new, self._replace(averaged=self.averaged + 1, slopes=(a, b), curvature=(aa, ab, bb), metric=c)


class Found(NamedTuple):
    """A search's outcome.

    Attributes:
        step: The step that was made, a vector; zero if none was good enough.
        memory: For the next search.
        gap: What part of the gradient's slope the loss does not explain, as it is evaluated.
    """

    step: Tensor
    memory: Memory
    gap: float


def search(point: Point, objective: Objective, memory: Memory, undo: Transaction) -> Found:
    r"""Moves the parameters to where the model of the loss is least in the span of ``-g / D`` and the last step.

    The model is ``L + g^T d + d^T G d / 2``, G the exact Gauss-Newton matrix of the loss on the batch, and its minimum
    taken with ``damping d^T D d / 2`` added, D being the preconditioner (Levenberg-Marquardt).

    Where the loss is not the one that the last search ended at, there are other inputs in each batch. The minimum is
    then that of an average of the models since: a batch's own one is that of its noise, too.

    Args:
        point: Where to start.
        objective: The loss.
        memory: What the last search left.
        undo: Takes the parameters back if something fails before it commits.
    """
    origin = [p.detach().clone() for p in point.params]
    undo.on_failure(lambda: _put(point.params, origin))
    theta = flat(origin).to(point.gradient)
    directions = _directions(point, theta)
    value, model, gap = _model(point, objective, directions, theta)
    unit = model.metric.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    average, memory = memory.after(model.scaled(unit))
    chosen = model.scaled(unit) if math.isclose(value, memory.loss, rel_tol=SAME) else average
    damping, slack = memory.damping, _slack(point, value)
    for _ in range(TRIALS):
        c = chosen.minimum(damping) * unit * point.rate
        step = (c.to(directions)[:, None] * directions).sum(0)  # not a product, which autocast would round
        _put(point.params, map(torch.add, origin, split(step, point.params)))
        predicted = model.change(c)
        risen = objective.value() + _penalty(point, theta + step) - value
        if math.isfinite(risen) and risen <= model.allows(c) + slack:
            memory = memory._replace(damping=_adapted(damping, risen, predicted, slack), loss=value + risen)
            return Found(step, memory, gap)
        damping = min(damping * UNDONE, MOST)
        _put(point.params, origin)
    return Found(torch.zeros_like(theta), memory._replace(damping=damping, loss=value), gap)


def _directions(point: Point, theta: Tensor) -> Tensor:
    first = (point.gradient + point.decay * theta).neg_().mul_(point.inverse).mul_(point.shares)
    return torch.stack([first, point.last]) if bool(point.last.any()) else first[None]


def _model(point: Point, objective: Objective, directions: Tensor, theta: Tensor) -> tuple[float, Quadratic, float]:
    """The loss, its model with weight decay, and the gap."""
    named = [dict(zip(point.names, split(d, point.params), strict=True)) for d in directions]
    value, own, curvature = objective.along(named)
    trained = inner(directions, point.gradient[None])[:, 0]
    # The loss's own, where they are known: what they predict is what it is held to.
    slopes = trained if own is None else own
    gap = float((slopes[0] - trained[0]).abs() / trained[0].abs().clamp_min(torch.finfo(trained.dtype).tiny))
    if trained[0].square() <= 2 * curvature[0, 0] * _slack(point, value):
        gap = 0.0  # all that is left of the gradient may be rounding
    decayed = directions * point.decay
    metric = inner(directions / point.inverse, directions)
    model = Quadratic(slopes + inner(decayed, theta[None])[:, 0], curvature + inner(decayed, directions), metric)
    return value + _penalty(point, theta), model, gap


def _slack(point: Point, value: float) -> float:
    return ROUNDING * torch.finfo(point.gradient.dtype).eps * abs(value)


def _penalty(point: Point, theta: Tensor) -> float:
    return float((point.decay * theta.square()).sum()) / 2


def _adapted(damping: float, risen: float, predicted: float, slack: float) -> float:
    if abs(predicted) <= slack:  # too little for the loss to tell how good the model is
        return max(damping * BETTER, LEAST) if predicted else damping
    ratio = risen / predicted if predicted < 0 else 0.0
    factor = WORSE if ratio < POOR else BETTER if ratio > GOOD else 1.0
    return min(max(damping * factor, LEAST), MOST)


@torch.no_grad()
def _put(params: Sequence[Tensor], values: Iterable[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector over parameters as tensors of their shapes, on their devices."""
    parts = vector.split([p.numel() for p in like])
    return [part.view(p.shape).to(p.device) for part, p in zip(parts, like, strict=True)]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector, on the first one's device."""
    return torch.cat([x.reshape(-1).to(tensors[0].device) for x in tensors])
