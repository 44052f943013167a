"""Schedule-free averaging (Defazio et al., 2024): three sequences of parameters in the memory of two.

z goes fast, x is its average, and gradients are taken at y in between:

    y = (1 - beta) z + beta x
    z <- z - lr G,  G = direction + weight_decay y
    x <- (1 - c) x + c z,  c = w / (sum of all w so far),  w = (the largest lr so far)^2

The parameters hold y. With the offset e = z - x this is

    e <- e - lr G;  y <- y + beta c e - (1 - beta) lr G;  e <- (1 - c) e

and x = y - (1 - beta) e: no division by beta, and what the user does to the parameters, such as clamping or loading
others, moves all three. Between z and x it is momentum that goes on ever longer, so there is no other.

It is Nesterov's momentum indeed, with decay rates that change from step to step. The state holds m = -k e, and k,
its ``"stretch"``, can be had such that a step is

    m <- mu m + k' lr G;  y <- y - (1 - beta) lr (G + mu m);  k <- k' / (1 - c)
    mu = k' / k,  mu k' = beta c / ((1 - beta) lr)

for which torch has a kernel that goes over memory once.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fishopt.optim.buckets import Bucket, in_parts
from fishopt.optim.fused import has_nesterov, is_laid_out, laid_out_as, nesterov_
from fishopt.optim.sampling import Limits

UNSTRETCHED = -1.0
"""Where the state has no stretch, before the first step and in checkpoints of before there was one, it holds e."""

RANGE = 2.0**-20, 2.0**20
"""What the momentum's decay rate and stretch may be for the kernel: within, nothing is lost in float32."""


def schedule_free_update(bucket: Bucket) -> None:
    """One step in place, of y and m; ``"preconditioner"`` is what the gradient is multiplied by."""
    group = bucket.group
    lr = float(group["lr"]) * min(1.0, bucket.step / max(1, group["warmup"]))
    beta, weight_decay = group["betas"][0], group["weight_decay"]
    params, momenta, factors = bucket.widened(bucket.params), bucket.kept("exp_avg"), bucket.kept("preconditioner")
    grads = laid_out_as(factors, bucket.widened(bucket.grads()))
    limits = bucket.measured(Limits, factors)(grads, group["clip"])
    stretch, share = bucket.states[0].get("stretch", UNSTRETCHED), bucket.share(lr)
    if (held := bucket.states[0].get("beta", beta)) != beta:  # y is to be elsewhere between the same z and x
        torch._foreach_add_(params, momenta, alpha=(beta - held) / stretch)
    nesterov = Nesterov.of(lr, beta, share, stretch) if _can_fuse(params, momenta, factors) else None
    new = settled(lr, beta, share) if nesterov is None else nesterov.stretch
    for ys, gs, ms, fs, *scales in in_parts(params, grads, momenta, factors, *([limits] if limits else [])):
        directions = list(torch._foreach_mul(gs, fs))
        if scales:
            torch._foreach_mul_(directions, *scales)
        if nesterov is not None:
            nesterov.step(ys, directions, ms, weight_decay)
            continue
        if weight_decay:
            torch._foreach_add_(directions, ys, alpha=weight_decay)
        torch._foreach_add_(ms, directions, alpha=stretch * lr)
        torch._foreach_add_(ys, ms, alpha=-beta * share / stretch)
        torch._foreach_sub_(ys, directions, alpha=(1 - beta) * lr)
        torch._foreach_mul_(ms, (1 - share) * new / stretch)
    for state in bucket.states:
        state["stretch"], state["beta"] = new, beta
    bucket.narrow(bucket.params, params)


class Nesterov(NamedTuple):
    """A step of averaging as one of Nesterov's momentum, see above.

    Attributes:
        lr: Learning rate.
        beta: Where between z and x gradients are taken.
        momentum: Decay rate of the momentum, mu.
        gain: What the direction comes into it with, ``k' lr``.
        stretch: The stretch that it leaves.
    """

    lr: float
    beta: float
    momentum: float
    gain: float
    stretch: float

    @classmethod
    def of(cls, lr: float, beta: float, share: float, stretch: float) -> Self | None:
        """The step with the share c; None if there is none, as at z or with the first step, or none of use."""
        if not (lr > 0 and beta > 0 and share < 1 and stretch > 0):
            return None
        new = math.sqrt(stretch * beta * share / ((1 - beta) * lr))
        found = cls(lr, beta, new / stretch, new * lr, new / (1 - share))
        return found if all(RANGE[0] < x < RANGE[1] for x in (found.momentum, found.stretch)) else None

    def step(self, ys: list[Tensor], directions: list[Tensor], momenta: list[Tensor], weight_decay: float) -> None:
        """Moves y and the momentum, in place."""
        lr = (1 - self.beta) * self.lr
        nesterov_(ys, directions, momenta, lr=lr, momentum=self.momentum, gain=self.gain, weight_decay=weight_decay)


def settled(lr: float, beta: float, share: float) -> float:
    """The stretch with which the next momentum's decay rate is about one."""
    found = beta * share / ((1 - beta) * lr) if lr > 0 else 1.0
    return found if RANGE[0] < found < RANGE[1] else 1.0


def _can_fuse(params: list[Tensor], momenta: list[Tensor], factors: list[Tensor]) -> bool:
    return has_nesterov(params[0].device.type) and is_laid_out(params, momenta, factors)
