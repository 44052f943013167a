"""What the empirical Fisher costs: its bias and variance, given the data's labels (Section 6)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishopt.batch import Batch, apart, checked_inputs
from fishopt.checks import checked_targets
from fishopt.likelihoods import unit_columns
from fishopt.passes import Diagonal, add


class EmpiricalError(NamedTuple):
    """How far the empirical Fisher diagonal is from the Fisher diagonal; each name -> tensor of the parameter's shape.

    Attributes:
        bias: Empirical minus exact diagonal over the batch (Lemma 6.1), of any sign.
        bias_bound: At least ``|bias|``: ``|d_i h|^2 s_max(c c^T - I(h|x))``, averaged (Corollary G.1), with
            ``c = eta - t(y)`` at the data's label.
        variance: ``Var(q(c)) / N_x`` over the batch's (input, label) pairs, the form of V1 with the data's moments of
            ``t(y) - eta``, not central ones. Given the pairs themselves nothing is random.
        variance_bound: At least ``variance``: ``|d_i h|^4 |c|^4 / N_x``, averaged (Corollary G.2).
    """

    bias: Diagonal
    bias_bound: Diagonal
    variance: Diagonal
    variance_bound: Diagonal


@apart()
def empirical_error(model: nn.Module, inputs: Any, likelihood: Any, targets: Tensor) -> EmpiricalError:
    """The empirical Fisher's bias and variance on a batch, with their bounds (Lemma 6.1, Corollaries G.1 and G.2).

    Args:
        model: The network.
        inputs: A tensor, or a tuple of tensors, with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        targets: The data's labels, one row per input.

    Raises:
        ValueError: If an argument does not fit.
        TypeError: If ``model``, ``inputs`` or ``likelihood`` is of the wrong kind.
    """
    batch = Batch.of(model, inputs, likelihood, checked_targets(targets, checked_inputs(inputs).count))
    exact, first, second, bias_bound, fourth = (batch.zeros(batch.names) for _ in range(5))
    for through, family, h, rows in batch.chunks(batch.names, per_input=True, columns=True):
        c = family.residual(h, family.valid_targets(h, targets[rows]))
        units, ones = unit_columns(h), torch.ones_like(h.mT[:1])
        add(first, through.squared_vjp(c[None]))
        add(second, through.fourth_vjp(c[None, None], ones))
        add(exact, through.squared_vjp(family.factor(h)))
        gap = torch.linalg.eigvalsh(c[:, :, None] * c[:, None, :] - family.covariance(h)).abs().amax(-1)
        add(bias_bound, through.squared_vjp(units * gap.sqrt()[:, None]))
        add(fourth, through.fourth_vjp(units[None], c.square().sum(-1).square()[None]))
    n, o = len(batch), batch.observations
    return EmpiricalError(
        bias={name: (first[name] - exact[name]) / o for name in batch.names},
        bias_bound={name: bias_bound[name] / o for name in batch.names},
        variance={name: (second[name] - first[name].square() / n).clamp_min(0) / o**2 for name in batch.names},
        variance_bound={name: fourth[name] / o**2 for name in batch.names},
    )
