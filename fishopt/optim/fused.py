"""Adam's step with a second moment that stays as it is, by torch's own fused kernel: one pass over memory."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fishopt.optim.sampling import BETA2, Sample

MAX_BETA = 0.999
"""The largest decay rate whose power ``beta^s`` is nothing for all counts s in use, 2^13 at least."""

NO_KERNEL = (AttributeError, NotImplementedError, RuntimeError, TypeError)
"""What a kernel of torch's that is not there for a kind of device, or takes other arguments, raises."""


def adamw_with_frozen_square(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    *,
    lr: float,
    beta: float,
    weight_decay: float,
    step: int,
    counts: list[Tensor],
) -> None:
    r"""``m = beta m + (1 - beta) g; p = (1 - lr wd) p - lr m / ((1 - beta^step) sqrt(square / x))``, in place.

    ``torch._fused_adamw_`` does this but for three things, each of which has a way round.

    - It averages ``g^2`` into the square, ``v = b v + (1 - b) g^2``. With ``b = 1 - 2^-53`` (`BETA2`) that changes v by
      ``2^-53 (g^2 / v - 1)`` of itself: nothing, in float32, unless a gradient is 2^14 times the root of v.
    - It divides v by ``x = 1 - b^s``, with a step count s for each tensor. These counts are ours to choose: infinity
      leaves v as it is, and ``s = log(1 - x) / log(b)`` divides the update by ``sqrt(1 / x)``. So a limit on each
      tensor's update gets into the kernel as a tensor, without waiting for the device.
    - It corrects m by ``1 - beta^s``, which is 1 for such counts (2^13 at the least). The learning rate corrects it.

    Args:
        params: Parameters in float32, each dense and in the same memory layout as its gradient, average and square.
        grads: Their gradients.
        averages: Moving averages of the gradients.
        squares: The squared denominators.
        lr: Learning rate.
        beta: Decay rate of the averages, at most `MAX_BETA`.
        weight_decay: Decoupled weight decay.
        step: The count of steps in the averages, this one included.
        counts: The counts s, see `Sample.counts` and `unlimited`.
    """
    correction = 1 - beta**step
    torch._fused_adamw_(
        params,
        grads,
        averages,
        squares,
        [],
        counts,
        lr=lr / correction,
        beta1=beta,
        beta2=BETA2,
        weight_decay=weight_decay * correction,
        eps=0.0,
        amsgrad=False,
        maximize=False,
    )


def unlimited(params: list[Tensor]) -> list[Tensor]:
    """The counts that scale no update."""
    return [torch.full((), math.inf, dtype=torch.float32, device=params[0].device)] * len(params)


def can_fuse(params: list[Tensor], averages: list[Tensor], squares: list[Tensor], beta: float) -> bool:
    """Whether `adamw_with_frozen_square` is for these parameters, all on one device and of one dtype."""
    if params[0].dtype != torch.float32 or beta > MAX_BETA or not is_exact(params[0].device.type):
        return False
    return is_laid_out(params, averages, squares)


def is_laid_out(params: list[Tensor], *kept: list[Tensor]) -> bool:
    """Whether what is kept of parameters lies in memory as they do.

    It was made dense, in the parameters' own layout if that is dense. Looked at in each step: a parameter's data can be
    replaced.
    """
    strides = [p.stride() for p in params]
    return all(strides == [x.stride() for x in listed] for listed in kept)


def laid_out_as(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients, copied where their memory layout is not their parameter's: the kernel would mix entries up."""
    return [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in zip(params, grads, strict=True)]


@functools.cache
def is_exact(device: str) -> bool:
    """Whether the kernel is there for a kind of device and does what we need; tried out once, on two small tensors."""
    square, gradient = 4.0, 6.0
    try:
        p, g, m, v = (
            [torch.full((n,), x, dtype=torch.float32, device=device) for n in (3, 70)]
            for x in (1.0, gradient, 0.0, square)
        )
        for counts in (unlimited(p), Sample(m, v).counts(g, 0.0, 0.75)):
            adamw_with_frozen_square(p, g, m, v, lr=0.5, beta=0.0, weight_decay=0.5, step=1, counts=counts)
    except NO_KERNEL:
        return False
    expected = (1.0 * 0.75 - 0.5 * 3.0) * 0.75 - 0.5 * 0.75
    return _are((p, expected), (m, gradient), (v, square))


def _are(*tried: tuple[list[Tensor], float]) -> bool:
    """Whether tensors are full of what they should be."""
    return all(torch.allclose(x, torch.full_like(x, y), rtol=1e-5, atol=0.0) for listed, y in tried for x in listed)


def nesterov_(
    params: list[Tensor],
    directions: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: float,
    momentum: float,
    gain: float,
    weight_decay: float,
) -> None:
    """``G = direction + wd p; m = momentum m + gain G; p = p - lr (G + momentum m)``, in place, by torch's kernel."""
    torch._fused_sgd_(
        params,
        directions,
        momenta,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=1 - gain,
        nesterov=True,
        maximize=False,
        is_first_step=False,
    )


@functools.cache
def has_nesterov(device: str) -> bool:
    """Whether the kernel is there for a kind of device and does that, with any momentum; tried out once."""
    kinds = [(n, dtype) for n in (3, 70) for dtype in (torch.float32, torch.float64)]
    try:
        p, g, m = ([torch.full((n,), x, dtype=t, device=device) for n, t in kinds] for x in (1.0, 2.0, 3.0))
        for one in zip(p, g, m, strict=True):
            nesterov_(*([x] for x in one), lr=0.5, momentum=2.0, gain=0.75, weight_decay=0.5)
    except NO_KERNEL:
        return False
    momentum = 2.0 * 3.0 + 0.75 * 2.5
    moved = 1.0 - 0.5 * (2.5 + 2.0 * momentum)
    return _are((m, momentum), (p, moved))
