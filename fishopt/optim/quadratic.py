"""The quadratic model of a loss over the span of a few directions: pure functions of a few numbers."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

RANK = 1e-10
"""Eigenvalues of the scaled system, over the largest, that count as zero: directions that are nearly parallel."""


class Quadratic(NamedTuple):
    r"""``m(c) = slopes^T c + c^T curvature c / 2``, the change of the loss by a step ``sum_i c_i d_i``.

    Attributes:
        slopes: ``g^T d_i``, ``[K]``.
        curvature: ``d_i^T G d_j`` with the Gauss-Newton matrix G of the loss, ``[K, K]``.
        metric: ``d_i^T D d_j`` with what steps are measured in by the Levenberg-Marquardt damping, ``[K, K]``.
    """

    slopes: Tensor
    curvature: Tensor
    metric: Tensor

    def minimum(self, damping: float) -> Tensor:
        """The coefficients that minimise ``m(c) + damping c^T metric c / 2``: ``[K]``.

        Of directions that are parallel, or zero, the shortest solution in units of each one's own scale.
        """
        system = self.curvature + damping * self.metric
        scale = system.diagonal().clamp_min(0).rsqrt()
        scale = torch.where(scale.isfinite(), scale, 0.0)
        values, vectors = torch.linalg.eigh(system * scale * scale[:, None])
        inverse = torch.where(values > RANK * values[-1], values.reciprocal(), 0.0)
        return -(vectors @ (inverse * (vectors.T @ (self.slopes * scale)))) * scale

    def scaled(self, by: Tensor) -> Self:
        """The model of the directions times these numbers."""
        return type(self)(self.slopes * by, self.curvature * by * by[:, None], self.metric * by * by[:, None])

    def mixed(self, other: Self, share: float) -> Self:
        """The weighed mean of two models, ``share`` being the other's."""
        return type(self)(*(torch.lerp(a, b, share) for a, b in zip(self, other, strict=True)))

    def allows(self, coefficients: Tensor) -> float:
        """How much the loss may rise before it is not the model's doing: by as much again as its curvature makes it.

        Nothing at the model's own minimum. At another one, such as that of an average of models, it may rise a little.
        """
        return max(self.change(coefficients) + float(coefficients @ self.curvature @ coefficients) / 2, 0.0)

    def change(self, coefficients: Tensor) -> float:
        """``m(c)``."""
        return float(self.slopes @ coefficients + coefficients @ self.curvature @ coefficients / 2)


def inner(lefts: Tensor, rights: Tensor) -> Tensor:
    """The inner products of rows with rows, in float64: ``[K, L]``."""
    return (lefts.double() @ rights.double().T).cpu()
