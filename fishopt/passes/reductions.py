"""What per-input gradients are summed to: of several cotangents, one value for each input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """Per-input gradients of several cotangents, ``[K, n, ...]``, to one value per input, ``[n, ...]``.

    Attributes:
        per_input: Entry by entry, and homogeneous; it is told which inputs it is given.
        degree: Of homogeneity: ``per_input(s G) = s^degree per_input(G)``.
    """

    per_input: Callable[[Tensor, slice | Tensor], Tensor]
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


def quartic(shares: Tensor, weights: Tensor) -> tuple[Reduction, ...]:
    """Those of `Pass.quartic_sums`, in its order; of one column the second and the third are the same to the bit."""
    return (
        weighted_squares(shares),
        Reduction(lambda g, rows: _weigh(g.square(), shares[:, rows]).square(), degree=4),
        Reduction(lambda g, rows: _scaled(g.square(), shares[:, rows]).square().sum(0), degree=4),
        fourth_powers(weights),
    )


def _scaled(values: Tensor, weights: Tensor) -> Tensor:
    return values * weights.to(values.dtype).reshape(*weights.shape, *[1] * (values.ndim - 2))


def _weigh(values: Tensor, weights: Tensor) -> Tensor:
    return _scaled(values, weights).sum(0)
