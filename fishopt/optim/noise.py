"""The labels' variance in training, relative to the one that the likelihood assumes."""

from __future__ import annotations

from typing import NamedTuple, Self

from torch import Tensor, nn

from fishopt.likelihoods import Gaussian, Likelihood, as_likelihood

NOISE_DECAY = 0.9
"""Decay rate, per refresh, of the moving average."""


class Noise(NamedTuple):
    """A moving average over refreshes of the mean of ``c^T I(h)^-1 c / T``, ``c = eta - t(y)`` at the data's labels.

    For a Gaussian that is the variance of the residuals over the assumed one.

    Attributes:
        value: The average, not corrected for its start at zero.
        weight: What corrects it.
    """

    value: float = 0.0
    weight: float = 0.0

    def after(self, total: float, count: float) -> Self:
        """The average after residuals whose squares sum to ``total``; as it is if there are none."""
        if not count:
            return self
        new = total / count
        return type(self)(*(NOISE_DECAY * old + (1 - NOISE_DECAY) * x for old, x in zip(self, (new, 1.0), strict=True)))

    @property
    def dispersion(self) -> float:
        """The average.

        Raises:
            ValueError: If residuals were never seen.
        """
        if not self.weight:
            raise ValueError(
                "the variance of the labels cannot be estimated: no backward from the output with a known scale was "
                "seen (scaler.unscale_ hides it); pass likelihood=fishopt.Gaussian(variance=<number>)"
            )
        return self.value / self.weight


def squares(likelihood: Likelihood, residuals: Tensor | None) -> tuple[float, float]:
    """The sum of ``c^T I(h)^-1 c`` over a batch's residuals, and how many numbers these are."""
    if residuals is None:
        return 0.0, 0.0
    total = (residuals.square() / likelihood.covariance_diagonal(residuals)).sum()
    return float(total), float(residuals.numel())


def training_likelihood(likelihood: Likelihood | nn.Module | str) -> tuple[Likelihood, bool]:
    """The family in training, and whether the labels' variance is to be estimated, relative to the family's.

    For squared loss it is, since the loss does not tell it: with a fixed one F would not shrink with the residuals, and
    an Adam-like step would stall.
    """
    family = as_likelihood(likelihood)
    if isinstance(family, Gaussian) and family.variance == "estimated":
        return family.with_variance(1.0), True
    return family, isinstance(likelihood, nn.MSELoss)
