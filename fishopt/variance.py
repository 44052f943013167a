"""Label variance in closed form (Lemma 3.1), its bounds (Theorem 4.1), and the joint variance (Theorem 4.7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishopt.batch import Batch, apart
from fishopt.checks import check_flag, checked_option, checked_samples
from fishopt.likelihoods import Interval, Likelihood, Quartic, unit_columns
from fishopt.passes import Diagonal, Pass, Sketch, add

SAMPLED = ("I1", "I2", "hutchinson", "exact")
"""Estimators with labels from the model, whose label variance has a closed form."""

SIDES = ("lower", "upper")


def fisher_per_input(through: Pass, likelihood: Likelihood, h: Tensor) -> Diagonal:
    """I(theta_i | x), Eq. 4: ``[N, *shape]``."""
    return through.squared_vjp(likelihood.factor(h), per_input=True)


def squared_norm_per_input(through: Pass, h: Tensor) -> Diagonal:
    """``|d_i h|^2``: ``[N, *shape]``."""
    return through.squared_vjp(unit_columns(h), per_input=True)


# --- sums over inputs of one value per input ---


def _v1(through: Pass, likelihood: Likelihood, h: Tensor, sketch: Sketch | None) -> Diagonal:
    squares = _fisher_squared(through, likelihood.factor(h))
    return _score_variance(through, likelihood, h, likelihood.quartic(h), squares)


def _score_variance(through: Pass, likelihood: Likelihood, h: Tensor, quartic: Quartic, squares: Diagonal) -> Diagonal:
    """Eq. 5: ``d_i h`` four times into M = K - I (x) I; ``squares`` are those of I."""
    total = {name: quartic.multiple * value for name, value in squares.items()}
    if quartic.within:  # the columns of the factor come position by position
        blocks = likelihood.factor(h).unflatten(0, (likelihood.positions, -1))
        add(total, through.fourth_vjp(blocks, h.new_full((likelihood.positions, len(h)), quartic.within)))
    if quartic.weights.any():
        add(total, through.fourth_vjp(quartic.columns[:, None], quartic.weights))
    # A variance: what rounding leaves below zero where it cancels is rounding.
    return {name: value.clamp_min(0) for name, value in total.items()}


def _v2(through: Pass, likelihood: Likelihood, h: Tensor, sketch: Sketch | None) -> Diagonal:
    """Eq. 6: the sum over the columns of S of r^2."""
    columns = likelihood.factor(h)
    return through.hessian_square(columns, torch.ones_like(columns[..., 0]), sketch=sketch)


def _hutchinson(through: Pass, likelihood: Likelihood, h: Tensor, sketch: Sketch | None) -> Diagonal:
    columns = likelihood.factor(h)
    return _sign_variance(through, columns, _fisher_squared(through, columns))


def _sign_variance(through: Pass, columns: Tensor, squares: Diagonal) -> Diagonal:
    """``2 (|u|^4 - sum_a u_a^4)``, ``u = S^T d_i h``: the variance of (u^T eps)^2 over random signs."""
    fourth = through.fourth_vjp(columns[:, None], torch.ones_like(columns[..., 0]))
    return {name: 2 * (value - fourth[name]).clamp_min(0) for name, value in squares.items()}


def _fisher_squared(through: Pass, columns: Tensor) -> Diagonal:
    """``I(theta_i | x)^2``, from the columns of the factor."""
    return through.fourth_vjp(columns[None], torch.ones_like(columns[:1, :, 0]))


def first_order_sums(through: Pass, likelihood: Likelihood, h: Tensor) -> dict[str, Diagonal]:
    """Of I (``"fisher"``), its square (``"squares"``), and the label variances of I1 and hutchinson."""
    quartic = likelihood.quartic(h)
    if quartic.shares is not None:
        found = through.quartic_sums(quartic.columns, quartic.shares, quartic.weights)
        fisher, squares, signs, scores = ({name: value[i] for name, value in found.items()} for i in range(4))
        return {
            "fisher": fisher,
            "squares": squares,
            "I1": {name: (quartic.multiple * squares[name] + scores[name]).clamp_min(0) for name in found},
            "hutchinson": {name: 2 * (squares[name] - signs[name]).clamp_min(0) for name in found},
        }
    columns = likelihood.factor(h)
    squares = _fisher_squared(through, columns)
    return {
        "fisher": through.squared_vjp(columns),
        "squares": squares,
        "I1": _score_variance(through, likelihood, h, quartic, squares),
        "hutchinson": _sign_variance(through, columns, squares),
    }


_LABEL_VARIANCE: dict[str, Callable[[Pass, Likelihood, Tensor, Sketch | None], Diagonal]] = {
    "I1": _v1,
    "I2": _v2,
    "hutchinson": _hutchinson,
}


# --- averages over the batch ---


@apart()
def label_variance(model: nn.Module, inputs: Any, likelihood: Any, *, estimator: str) -> Diagonal:
    """The variance of an estimator given the inputs, in closed form: ``(1/N_x) sum_n V_j(theta_i|x_n)``, one label.

    Divide by the number of labels per input for the mean over several (Lemma 3.1, Eq. 5 and 6). Where labels have
    positions an input's variance is that of the sum over these, and like all averages here this one is over the
    batch's O observations, ``(1/O) sum_n``: over O again, it is the variance of `fisher_diagonal`. I2's is that of the
    exact Hessian diagonal; where this takes more than 256 backward passes `fisher_diagonal` sketches it, which adds to
    the variance what `select_estimators` takes into account.

    Args:
        model: The network.
        inputs: A tensor, or a tuple of tensors, with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        estimator: ``"I1"``, ``"I2"``, ``"hutchinson"`` or ``"exact"`` (zero).

    Returns:
        Name of each trainable parameter -> tensor of its shape.

    Raises:
        ValueError: If an argument does not fit.
        TypeError: If ``model``, ``inputs`` or ``likelihood`` is of the wrong kind.
    """
    checked_option("estimator", estimator, SAMPLED)
    return mean_label_variance(Batch.of(model, inputs, likelihood), estimator)


def mean_label_variance(
    batch: Batch, estimator: str, names: Sequence[str] | None = None, sketch: Sketch | None = None
) -> Diagonal:
    """`label_variance` of a checked batch, for some of its parameters; with a sketch, its own variance included."""
    names = batch.names if names is None else names
    total = batch.zeros(names)
    some = with_label_variance(batch, estimator, names)  # none for "exact"
    for through, likelihood, h, _ in batch.chunks(some, per_input=True, columns=True):
        add(total, _LABEL_VARIANCE[estimator](through, likelihood, h, sketch))
    return {name: value / batch.observations for name, value in total.items()}


def with_label_variance(batch: Batch, estimator: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of ``names`` whose estimate depends on the labels: not where V2 = 0 by structure (Remark 4.4)."""
    if estimator == "exact":
        return ()
    return tuple(name for name in names if estimator != "I2" or name not in batch.structure.piecewise)


@apart()
def variance_bound(
    model: nn.Module,
    inputs: Any,
    likelihood: Any,
    *,
    estimator: str,
    side: str = "upper",
    tight: bool = False,
) -> Diagonal:
    """The bound of Theorem 4.1 on `label_variance` (Eq. 8 and 9), averaged over the batch.

    The eigenvalues are those of Theorem 5.2 (Categorical: ``2 m(x)`` and ``m(x)``) and Proposition 5.1 (Gaussian, where
    the bounds are equalities). For ``"hutchinson"`` the bound is ``2 (1 - 1/T) |d_i h|^4 lambda_max(I)^2`` [ours].

    Args:
        model: The network.
        inputs: A tensor, or a tuple of tensors, with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        estimator: ``"I1"``, ``"I2"``, ``"hutchinson"`` or ``"exact"`` (zero).
        side: ``"upper"`` or ``"lower"``.
        tight: Use the exact eigenvalues of I(h|x) and ``B m(x)`` for M [ours], dearer and closer.

    Returns:
        Name of each trainable parameter -> tensor of its shape.

    Raises:
        ValueError: If an argument does not fit.
        TypeError: If ``model``, ``inputs`` or ``likelihood`` is of the wrong kind.
    """
    checked_option("estimator", estimator, SAMPLED)
    checked_option("side", side, SIDES)
    check_flag("tight", tight)
    batch = Batch.of(model, inputs, likelihood)
    total = batch.zeros(batch.names)
    some = with_label_variance(batch, estimator, batch.names)
    for through, likelihood, h, _ in batch.chunks(some, per_input=True, columns=True):
        value = bound_factor(likelihood, h, estimator, side, tight=tight)
        add(total, weighed_norms(through, unit_columns(h), value, estimator))
    return {name: value / batch.observations for name, value in total.items()}


def weighed_norms(
    through: Pass, units: Tensor, weights: Tensor, estimator: str, sketch: Sketch | None = None
) -> Diagonal:
    """The sum over inputs of ``|d_i h|^4`` (I1, hutchinson) or ``|d_i^2 h|^2`` (I2), times ``weights`` ``[N]``."""
    if estimator == "I2":
        return through.hessian_square(units, weights.expand(len(units), -1), sketch=sketch)
    return through.fourth_vjp(units[None], weights[None])


def bound_factor(likelihood: Likelihood, h: Tensor, estimator: str, side: str = "upper", *, tight: bool) -> Tensor:
    """What multiplies ``|d_i h|^4`` (I1, hutchinson) or ``|d_i^2 h|^2`` (I2) in the bound, per input: ``[N]``."""
    if estimator == "I1":
        return _side(likelihood.quartic_spectrum(h, tight=tight), side)
    largest = largest_eigenvalue(likelihood, h, tight=tight)
    if estimator == "I2":
        return largest if side == "upper" else likelihood.covariance_spectrum(h).lower
    return hutchinson_factor(h.shape[1]) * largest.square() * (side == "upper")


def hutchinson_factor(outputs: int) -> float:
    """The bound on hutchinson's label variance over Lemma 4.8's on the variance over inputs [ours]."""
    return 2 * (1 - 1 / outputs)


def largest_eigenvalue(likelihood: Likelihood, h: Tensor, *, tight: bool) -> Tensor:
    """lambda_max(I(h|x)), or with ``tight`` false its cheap bound m(x): ``[N]``."""
    return likelihood.covariance_spectrum(h).upper if tight else likelihood.covariance_bound(h)


@apart()
def fisher_bound(
    model: nn.Module, inputs: Any, likelihood: Any, *, side: str = "upper", tight: bool = False
) -> Diagonal:
    """Bounds on the Fisher diagonal itself, ``|d_i h|^2`` times an extreme eigenvalue of I(h|x) (Eq. 7), averaged.

    Args, returns and errors are those of `variance_bound`.
    """
    checked_option("side", side, SIDES)
    check_flag("tight", tight)
    batch = Batch.of(model, inputs, likelihood)
    total = batch.zeros(batch.names)
    for through, likelihood, h, _ in batch.chunks(batch.names, columns=True):
        upper = side == "upper"
        value = largest_eigenvalue(likelihood, h, tight=tight) if upper else likelihood.covariance_spectrum(h).lower
        # A weight per input goes into the cotangents, as its root.
        add(total, through.squared_vjp(unit_columns(h) * value.clamp_min(0).sqrt()[:, None]))
    return {name: value / batch.observations for name, value in total.items()}


@apart()
def input_variance_bound(model: nn.Module, inputs: Any, likelihood: Any, *, tight: bool = False) -> Diagonal:
    """Lemma 4.8: ``Var_x(I(theta_i|x)) <= E_x[ |d_i h|^4 lambda_max(I)^2 ]``, averaged over the batch.

    With positions over its O observations, as in `label_variance`: over O again, it bounds `JointVariance.input`.

    Args, returns and errors are those of `variance_bound`.
    """
    check_flag("tight", tight)
    batch = Batch.of(model, inputs, likelihood)
    total = batch.zeros(batch.names)
    for through, likelihood, h, _ in batch.chunks(batch.names, per_input=True, columns=True):
        value = largest_eigenvalue(likelihood, h, tight=tight).square()
        add(total, through.fourth_vjp(unit_columns(h)[None], value[None]))
    return {name: value / batch.observations for name, value in total.items()}


class JointVariance(NamedTuple):
    """The variance of an estimate over inputs and labels (Theorem 4.7), parameter name -> tensor of its shape.

    Attributes:
        total: The sum of the two parts.
        input: ``Var_x(I(theta_i|x)) / N_x``, the same for every estimator; with P positions, of ``I / P``.
        label: ``E_x[V_j(theta_i|x)] / (N_x N)``, which the choice of an estimator rests on; with positions likewise.
    """

    total: Diagonal
    input: Diagonal
    label: Diagonal


@apart()
def joint_variance(
    model: nn.Module, inputs: Any, likelihood: Any, *, estimator: str, samples: int = 1
) -> JointVariance:
    """The variance of `fisher_diagonal` when its N_x inputs are drawn, with replacement, from the given ones.

    Args:
        model: The network.
        inputs: A tensor, or a tuple of tensors, with one row per input: the distribution of x, and N_x its size.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        estimator: ``"I1"``, ``"I2"``, ``"hutchinson"`` or ``"exact"``.
        samples: Labels per input, N.

    Returns:
        The total and its split into an input and a label part (Theorem 4.7).

    Raises:
        ValueError: If an argument does not fit.
        TypeError: If ``model``, ``inputs`` or ``likelihood`` is of the wrong kind.
    """
    checked_option("estimator", estimator, SAMPLED)
    checked_samples(samples)
    batch = Batch.of(model, inputs, likelihood)
    mean = mean_label_variance(batch, estimator)
    n, observations = len(batch), batch.observations
    label = {name: v / (observations * samples) for name, v in mean.items()}
    over_inputs = {
        name: v * (n / observations**2) for name, v in _variance_over_inputs(batch, fisher_per_input).items()
    }
    total = {name: over_inputs[name] + label[name] for name in batch.names}
    return JointVariance(total, over_inputs, label)


def _variance_over_inputs(batch: Batch, per_input: Callable[[Pass, Likelihood, Tensor], Diagonal]) -> Diagonal:
    """The population variance over the batch, by parts (Chan et al.), so that no digits cancel."""
    count, mean, spread = 0, batch.zeros(batch.names), batch.zeros(batch.names)
    for through, likelihood, h, _ in batch.chunks(batch.names, per_input=True, columns=True):
        new = count + len(h)
        for name, value in per_input(through, likelihood, h).items():
            center = value.mean(0)
            gap = center - mean[name]
            spread[name] += (value - center).square().sum(0) + gap.square() * (count * len(h) / new)
            mean[name] += gap * (len(h) / new)
        count = new
    return {name: value / count for name, value in spread.items()}


def _side(interval: Interval, side: str) -> Tensor:
    return interval.upper if side == "upper" else interval.lower
