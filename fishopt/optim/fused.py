"""Adam's step with a second moment that stays as it is, by torch's own fused kernel: one pass over memory."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

BETA2 = 1.0 - 2.0**-53
"""The largest double below one."""

LEAST = 2.0**-40
"""The smallest bias correction in use: updates are scaled down by 2^20 at most, where it is still good to 1e-4."""

MAX_BETA = 0.999
"""The largest decay rate whose power ``beta^s`` is nothing for all counts s in use, 2^13 at least."""

FULL = 2**13
"""Entries of a tensor up to which, and no fewer than which, its update is measured."""

BLOCK, MOST = 64, 62
"""Of a larger tensor, one block of so many entries is measured in so many blocks at most."""


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
    clip: float,
) -> None:
    r"""``m = beta m + (1 - beta) g; p = (1 - lr wd) p - lr m / ((1 - beta^step) sqrt(square) excess)``, in place.

    ``torch._fused_adamw_`` does this but for three things, each of which has a way round.

    - It averages ``g^2`` into the square, ``v = b v + (1 - b) g^2``. With ``b = 1 - 2^-53`` (`BETA2`) that changes v by
      ``2^-53 (g^2 / v - 1)`` of itself: nothing, in float32, unless a gradient is 2^14 times the root of v.
    - It divides v by ``1 - b^s``, with a step count s for each tensor. These counts are ours to choose: infinity leaves
      v as it is, and ``s = log(1 - x) / log(b)`` divides it by x, that is the update by ``sqrt(1/x)``. So a limit on
      each tensor's update gets into the kernel as a tensor, without waiting for the device.
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
        clip: Limit on the root mean square of each tensor's update before ``lr``, see `_counts`; infinity for none.
    """
    correction = 1 - beta**step
    if clip == math.inf:
        counts = [torch.full((), math.inf, dtype=torch.float32, device=params[0].device)] * len(params)
    else:
        counts = _counts(grads, averages, squares, beta, clip * correction)
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


def _counts(
    grads: list[Tensor], averages: list[Tensor], squares: list[Tensor], beta: float, limit: float
) -> list[Tensor]:
    """The step count of each tensor with which the kernel keeps the RMS of ``m / sqrt(square)`` within a limit.

    The RMS is that over all entries of small tensors and over a regular sample of larger ones: another pass or two over
    memory would cost as much again as the step.
    """
    strides = [_stride(g) for g in grads]
    if max(strides) > 1:
        grads, averages, squares = (
            [_sample(x, stride) for x, stride in zip(listed, strides, strict=True)]
            for listed in (grads, averages, squares)
        )
    terms = torch._foreach_lerp(averages, grads, 1 - beta)
    torch._foreach_mul_(terms, terms)
    torch._foreach_div_(terms, squares)
    sums = torch.stack(torch._foreach_norm(terms, 1))  # of what is not negative: a sum
    limits = _negated(tuple(x.numel() for x in terms), sums.device) / sums
    # In range of float32 for any limit: from 2^60 on there is none.
    limits.mul_(min(limit, 2.0**60) ** 2).clamp_(-1.0, -LEAST)
    return list(limits.log1p_().div_(math.log1p(BETA2 - 1)).unbind())


@functools.lru_cache(maxsize=64)
def _negated(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Minus the sizes, at least one each. Kept: copying them to a device in each step would be waiting for it."""
    return torch.tensor([-max(size, 1) for size in sizes], dtype=torch.float32, device=device)


def _stride(x: Tensor) -> int:
    """How many blocks of a tensor make for one in the sample; odd, to not meet the same columns of a matrix always."""
    return max((min(x.numel() // FULL, MOST) - 1) | 1, 1)


def _sample(x: Tensor, stride: int) -> Tensor:
    """One in so many blocks of a dense tensor, in the order of memory: a view."""
    if stride == 1:
        return x
    # The first block of each run of ``stride`` blocks is there, even where the last run is cut short.
    blocks = (x.numel() // BLOCK + stride - 1) // stride
    return x.as_strided((blocks, BLOCK), (BLOCK * stride, 1))


def can_fuse(params: list[Tensor], averages: list[Tensor], squares: list[Tensor], beta: float) -> bool:
    """Whether `adamw_with_frozen_square` is for these parameters, all on one device and of one dtype."""
    if params[0].dtype != torch.float32 or beta > MAX_BETA or not is_exact(params[0].device.type):
        return False
    # The averages were made dense, in the parameters' own layout if that is dense. Looked at in each step: a
    # parameter's data can be replaced.
    strides = [p.stride() for p in params]
    return strides == [m.stride() for m in averages] and strides == [v.stride() for v in squares]


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
        for clip in (math.inf, 0.75):
            adamw_with_frozen_square(p, g, m, v, lr=0.5, beta=0.0, weight_decay=0.5, step=1, clip=clip)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    expected = (1.0 * 0.75 - 0.5 * 3.0) * 0.75 - 0.5 * 0.75
    return all(
        torch.allclose(x, torch.full_like(x, y), rtol=1e-5, atol=0.0)
        for listed, y in ((p, expected), (m, gradient), (v, square))
        for x in listed
    )
