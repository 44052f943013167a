"""Bounds for several parameters jointly: Corollary 4.6, in forms that hold, the full spectra of Theorem D.1, and pairs.

The paper prints the first argument of its minima with a singular value to the first power. That is not homogeneous: the
left side is of degree two in the Jacobian, so scaling the network's output up breaks it (a test shows by how much). The
forms here have its square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.batch import MAX_ELEMENTS, Batch, apart
from fishopt.checks import check_flag, checked_option
from fishopt.groups import UserGroups, layers, named_groups
from fishopt.likelihoods import Likelihood, unit_columns
from fishopt.passes import Arguments, Pass, open_pass
from fishopt.passes.functional import FunctionalPass
from fishopt.variance import SIDES, bound_factor, squared_norm_per_input

QUANTITIES = ("fisher", "I1", "I2")

DENSE_LIMIT = 2048
"""Parameters up to which there may be a number for any two of them."""


@apart()
def trace_bound(
    model: nn.Module,
    inputs: Any,
    likelihood: Any,
    *,
    quantity: str = "fisher",
    groups: UserGroups | None = None,
    side: str = "upper",
    full_spectrum: bool = False,
) -> dict[str, Tensor]:
    """Bounds the sum over a group's parameters of the Fisher diagonal or of a label variance, averaged over the batch.

    With ``J`` the T x P Jacobian of ``h`` over the group's P parameters (``D``, the second derivatives, for I2), ``s``
    its singular values and ``lambda`` the eigenvalues of I(h|x), both sorted:

    - upper: ``min(s_1^2 tr I, |J|_F^2 lambda_max)`` (Corollary 4.6, corrected), or ``sum_k s_k^2 lambda_k`` with
      ``full_spectrum`` (Theorem D.1);
    - lower: ``max(s_T^2 tr I, |J|_F^2 lambda_min)``, or the same sum with one of the two in the opposite order;
    - for I1: ``sum_i |d_i h|^4`` times the extreme of M, for either value of ``full_spectrum``.

    Args:
        model: The network.
        inputs: A tensor, or a tuple of tensors, with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        quantity: ``"fisher"`` for tr I(theta|x), ``"I1"`` or ``"I2"`` for the trace of that label variance.
        groups: Name -> parameters or their names, or a list of such; one group for each module that owns parameters if
            None.
        side: ``"upper"`` or ``"lower"``.
        full_spectrum: Use all singular values and eigenvalues: tighter, T(T + 1) backward passes.

    Returns:
        Group name -> scalar tensor.

    Raises:
        ValueError: If an argument does not fit.
        TypeError: If ``model``, ``inputs`` or ``likelihood`` is of the wrong kind.
    """
    checked_option("quantity", quantity, QUANTITIES)
    checked_option("side", side, SIDES)
    check_flag("full_spectrum", full_spectrum)
    batch = Batch.of(model, inputs, likelihood)
    members = layers(model) if groups is None else named_groups(model, groups)
    totals = {}
    for group, names in members.items():
        total = torch.zeros(())
        for through, likelihood, h, _ in batch.chunks(names, per_input=True):
            if quantity == "I1":
                value = _quartic_trace(through, likelihood, h, side)
            else:
                gram = _jacobian_gram(through, h) if quantity == "fisher" else _curvature_gram(through, h)
                value = _spectral_bound(gram, likelihood.covariance(h), side, full_spectrum=full_spectrum)
            total = total.to(value) + value.sum()
        totals[group] = total / batch.observations
    return totals


@apart()
def off_diagonal_bound(model: nn.Module, inputs: Any, likelihood: Any, *, estimator: str) -> Tensor:
    """The bound of Theorem C.1 on the label variance of any entry of an estimated matrix, averaged over the batch.

    For one label, with ``gamma`` bounding ``u^a v^b u^c v^d M_abcd`` over unit vectors u and v:

    - I1: ``|d_i h|^2 |d_j h|^2 gamma``. As K is symmetric its form is largest where u = v, so that of M is at most
      ``min(lambda(M) + lambda_max(I)^2, B lambda_max(I))``, with lambda(M) the bound of Theorem 4.1 and B that of
      Proposition 4.3 [ours]. With several outputs this may be larger than the theorem's own gamma, by at most
      ``lambda_max(I)^2``; with one it is lambda(M);
    - I2: ``|d_ij^2 h|^2 lambda_max(I)``.

    Args:
        model: The network. Freeze what is not asked for: there is a number for any two trainable parameters.
        inputs: A tensor, or a tuple of tensors, with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        estimator: ``"I1"`` or ``"I2"``.

    Returns:
        ``[P, P]`` over the P entries of the trainable parameters in a row, in the model's order.

    Raises:
        ValueError: If an argument does not fit, there are more than 2,048 entries, or the network couples its inputs.
        RuntimeError: For I2, if an operation in the network has no second derivative that torch.func knows.
        TypeError: If ``model``, ``inputs`` or ``likelihood`` is of the wrong kind.
    """
    checked_option("estimator", estimator, ("I1", "I2"))
    batch = Batch.of(model, inputs, likelihood)
    size = sum(batch.shadow.parameters[name].numel() for name in batch.names)
    if size > DENSE_LIMIT:
        raise ValueError(
            f"model has {size:,} trainable parameters, and any two of them an entry; freeze all but {DENSE_LIMIT:,}"
        )
    pairs = _score_pairs if estimator == "I1" else _hessian_pairs
    total: Tensor | float = 0.0
    for rows, part in batch.parts(max(1, MAX_ELEMENTS // max(size, 1) ** 2)):
        total = total + pairs(batch, rows, part)
    return torch.as_tensor(total / batch.observations)


def _score_pairs(batch: Batch, rows: slice, part: Arguments) -> Tensor:
    with open_pass(batch.shadow, part, batch.names) as through:
        likelihood, h = batch.bound(through.outputs, rows)
        found = squared_norm_per_input(through, h)
    norms = _flat({name: found[name] for name in batch.names})  # a pass has them by the ways through the network
    largest = likelihood.covariance_spectrum(h).upper
    gamma = likelihood.quartic_spectrum(h, tight=True).upper
    if h.shape[1] > 1:  # else u and v are the same but for their sign
        gamma, bound = gamma + largest.square(), likelihood.radius(h) * largest
        gamma = torch.where(bound < gamma, bound, gamma)  # the bound is not a number where that is infinity times zero
    return (norms * gamma[:, None]).T @ norms


def _hessian_pairs(batch: Batch, rows: slice, part: Arguments) -> Tensor:
    with open_pass(batch.shadow, part, batch.names) as ways:
        likelihood, h = batch.bound(ways.outputs, rows)
        units = unit_columns(h)
        ways.vjp(units[:1])  # which says so where there are no derivatives per input
    through = FunctionalPass(batch.shadow, part, batch.names)
    upper = likelihood.covariance_spectrum(h).upper
    total = torch.einsum("n,nij->ij", upper, through.hessians(units[0]).square_())
    for unit in units[1:]:
        total += torch.einsum("n,nij->ij", upper, through.hessians(unit).square_())
    return total


def _spectral_bound(gram: Tensor, covariance: Tensor, side: str, *, full_spectrum: bool) -> Tensor:
    """Bounds on tr(J^T I J) from the spectra of J J^T and I, per input."""
    s2 = torch.linalg.eigvalsh(gram).clamp_min(0)  # ascending, as the eigenvalues of I are
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(0)
    if full_spectrum:  # von Neumann's trace inequality
        return (s2 * (eigenvalues if side == "upper" else eigenvalues.flip(-1))).sum(-1)
    end = -1 if side == "upper" else 0
    corners = s2[:, end] * eigenvalues.sum(-1), s2.sum(-1) * eigenvalues[:, end]
    return torch.minimum(*corners) if side == "upper" else torch.maximum(*corners)


def _quartic_trace(through: Pass, likelihood: Likelihood, h: Tensor, side: str) -> Tensor:
    factor = bound_factor(likelihood, h, "I1", side, tight=True)
    norms = _flat(squared_norm_per_input(through, h))
    return norms.square().sum(1) * factor


def _jacobian_gram(through: Pass, h: Tensor) -> Tensor:
    """``J J^T`` per input, ``[N, T, T]``, by polarisation: ``4 u.v = |u + v|^2 - |u - v|^2``."""
    units = unit_columns(h)
    t = h.shape[1]
    gram = h.new_zeros(len(h), t, t)
    for a in range(t):
        for b in range(a, t):
            plus = _total(through.squared_vjp((units[a] + units[b])[None], per_input=True))
            minus = _total(through.squared_vjp((units[a] - units[b])[None], per_input=True)) if a != b else 0.0
            gram[:, a, b] = gram[:, b, a] = (plus - minus) / 4
    return gram


def _curvature_gram(through: Pass, h: Tensor) -> Tensor:
    """``D D^T`` per input, ``[N, T, T]``, with the signed second derivatives as they are."""
    rows = [_flat(through.hessian_diagonal(unit, per_input=True)) for unit in unit_columns(h)]
    d = torch.stack(rows, dim=1)
    return d @ d.mT


def _flat(per_input: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(len(value), -1) for value in per_input.values()], dim=1)


def _total(per_input: Mapping[str, Tensor]) -> Tensor:
    return _flat(per_input).sum(1)
