"""How large an update is, from a sample of its entries: another pass over memory would cost as much as the step."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

BETA2 = 1.0 - 2.0**-53
"""The largest double below one, the decay rate that step counts are to: see `fishopt.optim.fused`."""

LEAST = 2.0**-40
"""The smallest bias correction in use: updates are scaled down by 2^20 at most, where it is still good to 1e-4."""

FULL = 2**13
"""Entries of a tensor up to which, and no fewer than which, its update is measured."""

BLOCK, MOST = 64, 62
"""Of a larger tensor, one block of so many entries is measured in so many blocks at most."""


class Measured:
    """What is kept of tensors to measure updates by: small ones in full, of larger ones a regular sample of blocks.

    Args:
        tensors: Lists of tensors, dense and all in the same memory layout.
    """

    def __init__(self, *tensors: list[Tensor]) -> None:
        self._of = [x for listed in tensors for x in listed]

    def is_of(self, *tensors: list[Tensor]) -> bool:
        """Whether it is of these very tensors."""
        given = [x for listed in tensors for x in listed]
        return len(given) == len(self._of) and all(map(operator.is_, given, self._of))


class Sample(Measured):
    """Measures the updates that averages of gradients make.

    Args:
        averages: Moving averages of the gradients.
        squares: The squared denominators.
    """

    def __init__(self, averages: list[Tensor], squares: list[Tensor]) -> None:
        super().__init__(averages, squares)
        self._averages = list(map(sampled, averages))
        self._inverse_roots = list(torch._foreach_sqrt(list(map(sampled, squares))))
        torch._foreach_reciprocal_(self._inverse_roots)
        sizes = [-float(max(m.numel(), 1)) for m in self._averages]
        self._negated_sizes = torch.tensor(sizes, dtype=torch.float32, device=averages[0].device)

    def counts(self, grads: list[Tensor], beta: float, limit: float) -> list[Tensor]:
        """The step counts with which the RMS of each ``m / sqrt(square)``, after this step's averaging, has a limit."""
        terms = torch._foreach_lerp(self._averages, list(map(sampled, grads)), 1 - beta)
        torch._foreach_mul_(terms, self._inverse_roots)
        sums = torch.stack(torch._foreach_norm(terms)).square_()
        # Minus x. Within 2^60 the square of the limit is in range of float32.
        x = (self._negated_sizes / sums).mul_(min(max(limit, 2.0**-60), 2.0**60) ** 2).clamp_(-1.0, -LEAST)
        return list(x.log1p_().mul_(1 / math.log1p(BETA2 - 1)).unbind())


class Limits(Measured):
    """Measures the updates that gradients themselves make.

    Args:
        factors: What gradients are multiplied by.
    """

    def __init__(self, factors: list[Tensor]) -> None:
        super().__init__(factors)
        self._factors = list(map(sampled, factors))
        sizes = [float(max(x.numel(), 1)) for x in self._factors]
        self._lengths = torch.tensor(sizes, dtype=factors[0].dtype, device=factors[0].device).sqrt_()

    def __call__(self, grads: list[Tensor], clip: float) -> list[Tensor] | None:
        """What each ``grad * factor`` is to be multiplied by; None if it is known that nothing is."""
        if clip == math.inf:
            return None
        terms = torch._foreach_mul(list(map(sampled, grads)), self._factors)
        scales = (self._lengths * clip).div_(torch.stack(torch._foreach_norm(terms)))
        if scales.is_cpu and bool((scales >= 1).all()):  # elsewhere that would be waited for
            return None
        return list(scales.clamp_max_(1.0).unbind())


def sampled(x: Tensor) -> Tensor:
    """The part of a dense tensor that is measured: a view."""
    stride = _stride(x)
    return _blocks(x, stride) if stride > 1 else x


def _stride(x: Tensor) -> int:
    """How many blocks of a tensor make for one in the sample; odd, to not meet the same columns of a matrix always."""
    return max((min(x.numel() // FULL, MOST) - 1) | 1, 1)


def _blocks(x: Tensor, stride: int) -> Tensor:
    """The first one of each so many blocks of a dense tensor, in the order of memory: a view."""
    blocks = (x.numel() // BLOCK + stride - 1) // stride
    return x.as_strided((blocks, BLOCK), (BLOCK * stride, 1))
