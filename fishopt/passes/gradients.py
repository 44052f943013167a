"""Per-input gradients of one parameter, and what is summed from them, without ever holding them for a whole batch.

A layer's weight gradient is, for one input, a sum over positions of outer products ``g[:, p] u[:, p]^T``: ``g`` what
comes down to the layer's output, ``u`` what the weight multiplies. With one position, any product of powers of it
factors, and a sum over inputs is one matrix product; with several, it is formed for a few inputs at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ELEMENTS = 2**21
"""Numbers in the per-input gradients, or in their factors, that are formed at a time: few enough for a cache."""


@dataclass(frozen=True)
class Reduction:
    """Per-input gradients of several cotangents, ``[K, n, ...]``, to one value per input, ``[n, ...]``.

    Attributes:
        per_input: Entry by entry, and homogeneous; it is told which inputs it is given.
        degree: Of homogeneity: ``per_input(s G) = s^degree per_input(G)``.
    """

    per_input: Callable[[Tensor, slice], Tensor]
    degree: int


VALUE = Reduction(lambda g, rows: g[0], degree=1)
SQUARES = Reduction(lambda g, rows: g.square().sum(0) if len(g) > 1 else g[0].square(), degree=2)


def products() -> Reduction:
    """``sum_m G[m] G[M + m]``, of 2 M cotangents."""
    return Reduction(lambda g, rows: (g[: len(g) // 2] * g[len(g) // 2 :]).sum(0), degree=2)


def weighted_squares(weights: Tensor) -> Reduction:
    """``sum_k weights[k, n] G[k]^2``."""
    return Reduction(lambda g, rows: _weigh(g.square(), weights[:, rows]), degree=2)


def weighted_product_squares(weights: Tensor) -> Reduction:
    """``sum_m weights[m, n] (G[m] G[M + m])^2``."""
    return Reduction(
        lambda g, rows: _weigh((g[: len(weights)] * g[len(weights) :]).square(), weights[:, rows]), degree=4
    )


def fourth_powers(weights: Tensor) -> Reduction:
    """``sum_s weights[s, n] (sum_m G[s, m]^2)^2``, the S M cotangents in order."""
    count = len(weights)
    return Reduction(
        lambda g, rows: _weigh(
            g.square().reshape(count, len(g) // count, *g.shape[1:]).sum(1).square(), weights[:, rows]
        ),
        degree=4,
    )


def _weigh(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights.reshape(*weights.shape, *[1] * (values.ndim - 2))).sum(0)


class PerInput(ABC):
    """The per-input gradients of one parameter for K cotangents and N inputs, ``[K, N, *shape]``.

    Args:
        shape: The parameter's.
        count: N.
    """

    def __init__(self, shape: torch.Size, count: int) -> None:
        self.shape = shape
        self.count = count

    @abstractmethod
    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        """The reduction's value for each input, ``[N, *shape]``, or its sum over inputs, ``[*shape]``."""


class Formed(PerInput):
    """Small enough to be there as a whole, as a bias's are: ``values`` is ``[K, N, *shape]``."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape[2:], values.shape[1])
        self._values = values

    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        found = reduction.per_input(self._values, slice(0, self.count))
        return found if per_input else found.sum(0)


class RankOne(PerInput):
    """One position: ``g[k, n] u[n]^T``, with ``g`` ``[K, N, O]`` and ``u`` ``[N, J]``."""

    def __init__(self, g: Tensor, u: Tensor, shape: torch.Size) -> None:
        super().__init__(shape, len(u))
        self._g, self._u = g, u

    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        # Homogeneity: reduction(g u^T) = reduction(g) (u^degree)^T, and the sum over inputs is a matrix product.
        left = reduction.per_input(self._g, slice(0, self.count))
        right = self._u**reduction.degree
        if per_input:
            return (left[:, :, None] * right[:, None, :]).reshape(self.count, *self.shape)
        return (left.mT @ right).reshape(self.shape)


class Summed(PerInput):
    """Several positions: ``sum_p g[k, n, :, p] u[n, :, p]^T``, in groups of channels that do not meet.

    Args:
        g: Some inputs' left factors, ``[K, n, G, O, P]``.
        u: Some inputs' right factors, ``[n, G, J, P]`` or, where these depend on the cotangent, ``[K, n, G, J, P]``.
        columns: K.
        count: N.
        shape: The parameter's, ``G * O * J`` entries.
        width: Numbers that one input's right factors hold.
    """

    def __init__(
        self,
        g: Callable[[slice], Tensor],
        u: Callable[[slice], Tensor],
        columns: int,
        count: int,
        shape: torch.Size,
        width: int,
    ) -> None:
        super().__init__(shape, count)
        self._g, self._u = g, u
        self._largest = max(shape.numel() * columns, width, 1)

    def reduced(self, reduction: Reduction, *, per_input: bool) -> Tensor:
        step = max(1, MAX_ELEMENTS // self._largest)
        step -= step % 2 if step > 2 else 0  # an even number of products, one for each thread
        parts = (
            reduction.per_input(self._formed(rows), rows)
            for rows in (slice(start, min(start + step, self.count)) for start in range(0, self.count, step))
        )
        if per_input:
            return torch.cat(list(parts)).reshape(self.count, *self.shape)
        total = next(parts).sum(0)
        for part in parts:
            total += part.sum(0)
        return total.reshape(self.shape)

    def _formed(self, rows: slice) -> Tensor:
        g, u = self._g(rows), self._u(rows)
        if u.ndim == g.ndim or len(g) == 1:
            return g @ u.mT
        # One product per input for all cotangents: u is read once.
        k, n, groups, o, p = g.shape
        joined = g.permute(1, 2, 0, 3, 4).reshape(n, groups, k * o, p) @ u.mT
        return joined.reshape(n, groups, k, o, -1).permute(2, 0, 1, 3, 4)
