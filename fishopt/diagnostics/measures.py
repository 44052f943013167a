"""Measures of one step: how well conditioned its gradients are, how large, how noisy.

After Liao, Drummond, Reid & Carneiro (2020), "Approximate Fisher Information Matrix to Characterise the Training of
Deep Neural Networks" (arXiv 1810.06767), with the variances of Soen & Sun (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fishopt.batch import Batch
from fishopt.eigenvalues import nonzero_eigenvalues
from fishopt.passes import Diagonal, add, trace
from fishopt.variance import first_order_sums


@dataclass(frozen=True)
class Measurement:
    """One step, before it was made. With J the ``B x P`` rows whose mean is the training gradient.

    Attributes:
        step: The optimizer's step, from 0.
        lr: Learning rate of the first parameter group.
        batch_size: Inputs that were trained on since the last step, B.
        condition: ``C_k``: the largest singular value of J over the smallest that is not zero.
        jacobian_norm: ``|J|_F``, or that over the root of B if normalised.
        gradient_square: ``|g|^2``, g the mean of the rows.
        gradient_variance: The trace of the covariance of the rows, at the data's labels: over inputs and
            labels, without bias (``B - 1``).
        trace: Of the Fisher matrix at the model's labels, per observation; NaN if there are too many outputs.
        label_variance: ``sum_i E_x[V1(theta_i|x)]``: of its diagonal's estimator I1, one label (Lemma 3.1).
        input_variance: ``sum_i Var_x(I(theta_i|x))``, which every estimator has (Theorem 4.7), without bias; NaN for
            one input. Both parts over the number of observations are the variance of an estimate from so many.
    """

    step: int
    lr: float
    batch_size: int
    condition: float
    jacobian_norm: float
    gradient_square: float
    gradient_variance: float
    trace: float
    label_variance: float
    input_variance: float

    @property
    def noise_scale(self) -> float:
        """The gradient's variance over its square; over B, what the norm test of Byrd et al. (2012) is about."""
        return self.gradient_variance / self.gradient_square if self.gradient_square else math.inf


def condition_number(gram: Tensor) -> float:
    """The largest over the smallest singular value of J that is not zero, from ``J J^T``.

    Of J: that of the matrix ``J^T J``, as `fishopt.spectrum.Spectrum` has it, is its square.

    Args:
        gram: ``[N, N]``.

    Returns:
        At least 1; NaN where all rows are zero.
    """
    values = nonzero_eigenvalues(gram)
    return float((values[0] / values[-1]).sqrt()) if len(values) else math.nan


def gradient_moments(gram: Tensor, batch_size: int) -> tuple[float, float]:
    """``|g|^2`` and the trace of the covariance of J's rows, g their mean; NaN where one row cannot tell.

    Args:
        gram: ``J J^T`` of the rows that were seen.
        batch_size: How many there are.
    """
    count, wide = len(gram), gram.double()
    square = float(wide.mean())
    if count == 1:
        return square if batch_size == 1 else math.nan, math.nan
    variance = max(float(wide.trace()) - count * square, 0.0) / (count - 1)
    # Of some rows of a larger batch: the mean of all of them has less noise in it.
    return max(square + variance * (1 / batch_size - 1 / count), 0.0), variance


def fisher_moments(batch: Batch, names: list[str]) -> tuple[float, float, float]:
    """Trace of the Fisher matrix per observation, and the label and input variance of I1, summed over parameters."""
    sums: dict[str, Diagonal] = {}
    for through, likelihood, h, _ in batch.chunks(names, per_input=True):
        for key, found in first_order_sums(through, likelihood, h).items():
            add(sums.setdefault(key, {}), found)
    count, observations = len(batch), batch.observations
    mean = {name: value.double() / count for name, value in sums["fisher"].items()}
    # Values per input would have more digits, and take ten times as long.
    spread = {name: (sums["squares"][name] / count - m.square()).clamp_min(0) for name, m in mean.items()}
    unbiased = count / observations * count / (count - 1) if count > 1 else math.nan
    return trace(sums["fisher"]) / observations, trace(sums["I1"]) / observations, unbiased * trace(spread)
