"""Measures of one step: how well conditioned its gradients are, how large, how noisy.

After Liao, Drummond, Reid & Carneiro (2020), "Approximate Fisher Information Matrix to Characterise the Training of
Deep Neural Networks" (arXiv 1810.06767), with the variances of Soen & Sun (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fishopt.batch import Batch
from fishopt.passes import Diagonal, add
from fishopt.variance import mean_label_variance


@dataclass(frozen=True)
class Measurement:
    """One step, before it was made. With J the ``B x P`` rows whose mean is the training gradient.

    Attributes:
        step: The optimizer's step, from 0.
        lr: Learning rate of the first parameter group.
        batch_size: Inputs that were trained on since the last step, B.
        condition: ``C_k``: the largest singular value of J over the smallest that is not zero.
        gradient_norm: ``|J|_F``, or that over the root of B if normalised.
        gradient_square: ``|g|^2``, g the mean of the rows.
        gradient_variance: The trace of the covariance of the rows, at the data's labels: over inputs and
            labels, without bias (``B - 1``).
        trace: Of the Fisher matrix at the model's labels, per input; NaN if there are too many outputs.
        label_variance: ``sum_i E_x[V1(theta_i|x)]``: of its diagonal's estimator I1, one label (Lemma 3.1).
        input_variance: ``sum_i Var_x(I(theta_i|x))``, which every estimator has (Theorem 4.7).
    """

    step: int
    lr: float
    batch_size: int
    condition: float
    gradient_norm: float
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

    Rows of J may differ in length by orders of magnitude, and short ones are still known to as many digits. So
    whether a singular value is zero is told from the rows' cosines, not from their products: as many are zero as
    eigenvalues of the cosines are lost in rounding (the scaling of Demmel & Veselic, 1992).

    Args:
        gram: ``[N, N]``.

    Returns:
        At least 1; NaN where all rows are zero.
    """
    norms = gram.diagonal().double().clamp_min(0).sqrt()
    kept = norms > 0
    if not kept.any():
        return math.nan
    products, norms = gram.double()[kept][:, kept], norms[kept]
    floor = 4 * len(norms) * torch.finfo(gram.dtype).eps
    rank = int((torch.linalg.eigvalsh(products / norms / norms[:, None]) > floor).sum())
    values = torch.linalg.eigvalsh(products)
    return float((values[-1] / values[-rank].clamp_min(0)).sqrt())


def gradient_moments(gram: Tensor, batch_size: int) -> tuple[float, float]:
    """``|g|^2`` and the trace of the covariance of J's rows, g their mean, from ``J J^T``; for one row NaN."""
    count, wide = len(gram), gram.double()
    square = float(wide.mean())
    if count == 1:
        return square, math.nan
    variance = max(float(wide.trace()) - count * square, 0.0) / (count - 1)
    # Of some rows of a larger batch: the mean of all of them has less noise in it.
    return max(square + variance * (1 / batch_size - 1 / count), 0.0), variance


def fisher_moments(batch: Batch, names: list[str]) -> tuple[float, float, float]:
    """Trace of the Fisher matrix per observation, and the label and input variance of I1, summed over parameters."""
    first: Diagonal = {}
    second: Diagonal = {}
    for through, likelihood, h, _ in batch.chunks(names, per_input=True):
        columns = likelihood.factor(h)
        add(first, through.squared_vjp(columns, names=names))
        add(second, through.fourth_vjp(columns[None], torch.ones_like(columns[:1, :, 0]), names=names))
    count, observations = len(batch), batch.observations
    label = mean_label_variance(batch, "I1", names)
    spread = {name: second[name] / count - (first[name] / count).square() for name in names}
    return (
        sum(float(value.sum()) for value in first.values()) / observations,
        sum(float(value.sum()) for value in label.values()),
        sum(float(value.clamp_min(0).sum()) for value in spread.values()),
    )
