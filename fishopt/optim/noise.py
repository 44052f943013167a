"""The labels' variance in training, relative to the one that the likelihood assumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fishopt.batch import NonFiniteError
from fishopt.checks import checked_option
from fishopt.likelihoods import Gaussian, Likelihood, as_likelihood
from fishopt.optim.record import Record
from fishopt.optim.subbatch import SubBatch

SCALES = ("auto", "likelihood", "dispersion", "gradient")
"""Where the size of F is from, see `fishopt.FisherAdam`."""

NOISE_DECAY = 0.9
"""Decay rate, per refresh, of the moving average."""


class Noise(NamedTuple):
    """A moving average over refreshes of ``sum |c|^2 / sum tr I(h)``, ``c = eta - t(y)`` at the data's labels.

    For a Gaussian that is the variance of the residuals over the assumed one. For the others it is a ratio of sums, not
    Pearson's mean of ``c^T I(h)^-1 c``, whose tails are as heavy as ``1 / I(h)`` is where predictions are certain.

    Attributes:
        value: The average, not corrected for its start at zero.
        weight: What corrects it.
    """

    value: float = 0.0
    weight: float = 0.0

    def after(self, total: float, expected: float) -> Self:
        """The average after residuals whose squares sum to ``total``, where the model expects ``expected``."""
        if not expected:
            return self
        new = total / expected
        return type(self)(*(NOISE_DECAY * old + (1 - NOISE_DECAY) * x for old, x in zip(self, (new, 1.0), strict=True)))

    @property
    def dispersion(self) -> float:
        """The average.

        Raises:
            ValueError: If residuals were never seen.
        """
        if not self.weight:
            raise ValueError(
                "the variance of the labels cannot be estimated: no backward from the output with a known scale, other "
                "than zero, was seen (scaler.unscale_ hides it); pass likelihood=fishopt.Gaussian(variance=<number>)"
            )
        return self.value / self.weight


def residuals_of(
    gradients: Sequence[Tensor] | None, record: Record, likelihood: Likelihood, wide: torch.dtype
) -> Tensor | None:
    """The cotangents eta - t(y) at the data's labels, ``[N, T]``: what backward sent to the output.

    Args:
        gradients: What it sent, of each forward; None if that is not known.
        record: Which labels of these counted.
        likelihood: The family behind the loss.
        wide: The type that they are to have.

    Raises:
        NonFiniteError: If they are NaN or infinite.
    """
    if gradients is None:
        return None
    masks = [None] * len(gradients) if (mask := record.mask) is None else record.split(mask)
    parts = []
    for gradient, counted in zip(gradients, masks, strict=True):
        own, c = likelihood.at(gradient.to(wide))
        # Each forward's loss is a mean of its own.
        observations = len(c) * own.positions if counted is None else max(1, int(counted.sum()))
        parts.append(c * (observations / likelihood.gradient_scale(observations, c.shape[1] // own.positions)))
    found = torch.cat(parts)
    if not found.isfinite().all():
        raise NonFiniteError("the gradient at the model's output is NaN or infinite")
    return found


def squares(some: SubBatch, residuals: Tensor | None) -> tuple[float, float]:
    """The sum of ``|c|^2`` over a batch's residuals, and what the model expects of it, the sum of ``tr I(h)``.

    At the network that F is of, in eval mode; so not at the outputs that were trained on.
    """
    if residuals is None:
        return 0.0, 0.0
    likelihood, h = some.likelihood, residuals
    if not isinstance(likelihood, Gaussian):  # whose I(h) is the same for any h, so that takes all residuals
        likelihood, h = likelihood.at(some.shadow.run(some.batch().inputs), some.of(some.counted))
        residuals = residuals[some.rows.to(residuals.device)]
    return float(residuals.square().sum()), float(likelihood.covariance_diagonal(h).sum())


def training_likelihood(likelihood: Likelihood | nn.Module | str, scale: str = "auto") -> tuple[Likelihood, bool]:
    """The family in training, and whether the labels' variance is to be estimated, relative to the family's.

    For squared loss it is unless ``scale`` says otherwise, since the loss does not tell it: with a fixed one F would
    not shrink with the residuals, and an Adam-like step would stall.

    Raises:
        ValueError: If the scale or the likelihood is unknown.
        TypeError: If the likelihood is of the wrong kind.
    """
    checked_option("scale", scale, SCALES)
    family = as_likelihood(likelihood)
    if isinstance(family, Gaussian) and family.variance == "estimated":
        return family.with_variance(1.0), True
    return family, scale == "dispersion" or (scale == "auto" and isinstance(likelihood, nn.MSELoss))
