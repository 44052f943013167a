"""Likelihoods whose outputs are independent given the input: everything follows from one scalar function."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fishopt.likelihoods.base import Interval, Likelihood, Quartic, unit_columns


class Independent(Likelihood):
    """A family that factorises over outputs, ``F(h) = sum_a f(h_a)``, with one label ``y_a`` per output.

    A subclass needs two methods, `log_partition` and `sample`. The cumulants of ``t(y)`` are the derivatives of ``f``,
    so mean, variance and fourth cumulant come from autograd; override them where a closed form is at hand. Override
    `natural` to refuse outputs outside f's domain, and `valid_targets` to refuse labels outside the support.
    """

    @abstractmethod
    def log_partition(self, h: Tensor) -> Tensor:
        """``f``, elementwise: same shape as ``h``; four times differentiable by torch.func."""

    def log_base_measure(self, y: Tensor) -> Tensor:
        """Log of the base measure, elementwise; needed for the value of the NLL alone, zero unless overridden."""
        return torch.zeros_like(y)

    def label_statistic(self, y: Tensor) -> Tensor:
        """``t(y)``, elementwise; the label itself unless overridden."""
        return y

    def mean(self, h: Tensor) -> Tensor:
        return _derivative(self.log_partition, 1)(h)

    def second_cumulant(self, h: Tensor) -> Tensor:
        """The variance of ``t(y_a)``, f'': same shape as ``h``."""
        return _derivative(self.log_partition, 2)(h)

    def fourth_cumulant(self, h: Tensor) -> Tensor:
        """The fourth cumulant of ``t(y_a)``, f'''': same shape as ``h``, of any sign."""
        return _derivative(self.log_partition, 4)(h)

    def nll(self, h: Tensor, y: Tensor) -> Tensor:
        y = y.to(h.dtype).reshape(h.shape)
        terms = self.log_partition(h) - self.label_statistic(y) * h - self.log_base_measure(y)
        return terms.sum(-1)

    def statistic(self, h: Tensor, y: Tensor) -> Tensor:
        y = y.to(h.dtype)
        return self.label_statistic(y if y.shape[1:] == h.shape else y.reshape(h.shape))

    def valid_targets(self, h: Tensor, y: Tensor) -> Tensor:
        if y.numel() != h.numel() or y.ndim == 0 or y.shape[0] != h.shape[0]:
            raise ValueError(
                f"targets has shape {tuple(y.shape)}, which does not fit {h.shape[0]} inputs x {h.shape[1]} outputs; "
                "pass one label per output"
            )
        if y.is_complex():
            raise ValueError(f"targets has type {y.dtype}; {self} takes real labels")
        if not torch.isfinite(y.to(h.dtype)).all():
            raise ValueError("targets contains NaN or infinite values; remove these inputs first")
        return y.reshape(h.shape)

    def covariance_diagonal(self, h: Tensor) -> Tensor:
        return self.second_cumulant(h)

    def apply_factor(self, h: Tensor, v: Tensor) -> Tensor:
        return self.second_cumulant(h).sqrt() * v

    def covariance_spectrum(self, h: Tensor) -> Interval:
        v = self.second_cumulant(h)
        return Interval(v.amin(-1), v.amax(-1))

    def quartic(self, h: Tensor) -> Quartic:
        # The fourth cumulant of a sum of independent terms adds up: E z^4 = sum_a u_a^4 kappa_a + 3 (u^T I u)^2.
        return Quartic(2.0, self.fourth_cumulant(h).T, unit_columns(h), shares=self.second_cumulant(h).T)

    def quartic_spectrum(self, h: Tensor, *, tight: bool = False) -> Interval:
        """Extremes of ``sum_a kappa_a w_a^2 + 2 (sum_a v_a w_a)^2`` over the simplex ``w_a = u_a^2`` [ours].

        Both summands are bounded apart, so the pair is exact for one output, for equal variances without excess
        (Gaussian, Proposition 5.1), and, above, for positive fourth cumulants (a convex form peaks at a vertex).
        The argument ``tight`` changes nothing here.
        """
        v, kappa = self.second_cumulant(h), self.fourth_cumulant(h)
        convex, concave = (kappa >= 0).all(-1), (kappa <= 0).all(-1)
        spread = 1 / kappa.reciprocal().sum(-1)  # extreme of sum kappa_a w_a^2 inside the simplex, if of one sign
        lowest = torch.where((kappa > 0).all(-1), spread, kappa.amin(-1)) + 2 * v.amin(-1).square()
        apart = torch.where((kappa < 0).all(-1), spread, kappa.amax(-1)) + 2 * v.amax(-1).square()
        vertex = (kappa + 2 * v.square()).amax(-1)
        highest = torch.where(convex & ~concave, vertex, apart)
        # Proposition 4.3; M is the covariance of an outer product, so it is never negative (Corollary 4.2).
        bound = self.radius(h) * v.amax(-1)  # not a number where that is infinity times zero
        highest = torch.where(bound < highest, bound, highest)
        return Interval(lowest.clamp_min(0), highest.clamp_min(0))


def _derivative(function: Callable[[Tensor], Tensor], order: int) -> Callable[[Tensor], Tensor]:
    """The derivative of an elementwise function, itself elementwise: the gradient of its sum."""
    for _ in range(order):
        function = torch.func.grad(_total(function))
    return function


def _total(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h: function(h).sum()
