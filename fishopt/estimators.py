"""Estimators of the Fisher diagonal: each says which cotangents to send through the network.

A new estimator is one function with the `estimator` decorator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishopt.batch import Batch, apart
from fishopt.checks import checked_generator, checked_option, checked_samples
from fishopt.likelihoods import Likelihood, uniform
from fishopt.passes import Coverage, Diagonal, Sketch, Structure, add

EXACT_UP_TO = 256
"""Backward passes that I2's exact Hessian diagonal may take: networks of a hundred smooth units or so."""


@dataclass(frozen=True)
class Draw:
    """Where labels come from.

    Attributes:
        samples: Labels (or sign vectors) per input.
        generator: The source of randomness; torch's global one if None.
        targets: Labels from the data, for the empirical Fisher.
        residuals: Cotangents eta - t(y) at labels from the data, where these are known instead: ``[N, T]``.
        exact_up_to: Backward passes that an exact Hessian diagonal may take before it is sketched.
    """

    samples: int = 1
    generator: torch.Generator | None = None
    targets: Tensor | None = None
    residuals: Tensor | None = None
    exact_up_to: int = EXACT_UP_TO

    @property
    def sketch(self) -> Sketch:
        """What I2 may do where its Hessian diagonal is dear."""
        return Sketch(self.generator, self.exact_up_to)

    def rows(self, rows: slice) -> Draw:
        """The same for some of the inputs."""
        return replace(
            self,
            targets=None if self.targets is None else self.targets[rows],
            residuals=None if self.residuals is None else self.residuals[rows],
        )


class Cotangents(NamedTuple):
    """What an estimator sends through the network.

    Attributes:
        squared: ``[K, N, T]``, for the sum over K of squared VJPs, or None.
        hessian: ``[N, T]``, for the Hessian diagonal to add, or None.
    """

    squared: Tensor | None = None
    hessian: Tensor | None = None


Estimator = Callable[[Likelihood, Tensor, Draw], Cotangents]
ESTIMATORS: dict[str, Estimator] = {}


def estimator(name: str) -> Callable[[Estimator], Estimator]:
    """Registers an estimator under the name that users pass.

    Its columns c satisfy ``E[sum_k c_k c_k^T] = I(h|x)`` for each input. Where networks couple the inputs of a batch
    they have to have mean zero, and be independent between inputs, as well. It serves `fisher_diagonal` and the
    optimizers by name; to have a variance, and to be chosen, it needs one in `fishopt.variance`.
    """

    def register(function: Estimator) -> Estimator:
        ESTIMATORS[name] = function
        return function

    return register


@estimator("I1")
def squared_score(likelihood: Likelihood, h: Tensor, draw: Draw) -> Cotangents:
    """Eq. 3, left: the mean of squared scores at labels sampled from the model."""
    return Cotangents(sampled_residual(likelihood, h, draw) / draw.samples**0.5)


@estimator("I2")
def negative_hessian(likelihood: Likelihood, h: Tensor, draw: Draw) -> Cotangents:
    """Eq. 3, right, in the form of Remark H.1: the exact value plus the residual's Hessian, which has mean zero."""
    return Cotangents(likelihood.factor(h), hessian=residual_hessian(likelihood, h, draw).hessian)


@estimator("exact")
def exact(likelihood: Likelihood, h: Tensor, draw: Draw) -> Cotangents:
    """Eq. 4, no sampling: one column for each natural parameter."""
    return Cotangents(likelihood.factor(h))


@estimator("hutchinson")
def random_signs(likelihood: Likelihood, h: Tensor, draw: Draw) -> Cotangents:
    """``S eps`` with random signs: unbiased, since E[eps eps^T] is the identity, and lighter-tailed than labels."""
    signs = 2.0 * (uniform((draw.samples, *h.shape), h, draw.generator) < 0.5).to(h.dtype) - 1.0
    return Cotangents(likelihood.apply_factor(h, signs) / draw.samples**0.5)


@estimator("empirical")
def squared_gradient(likelihood: Likelihood, h: Tensor, draw: Draw) -> Cotangents:
    """Section 6: squared scores at the data's labels. Biased unless the model is right.

    Raises:
        ValueError: If there are no labels, or they do not fit.
    """
    if draw.residuals is not None:
        return Cotangents(draw.residuals[None])
    if draw.targets is None:
        raise ValueError("targets=None: estimator='empirical' needs the data's labels")
    return Cotangents(likelihood.residual(h, likelihood.valid_targets(h, draw.targets))[None])


def exact_separable(likelihood: Likelihood, h: Tensor, draw: Draw) -> Cotangents:
    """The exact value where each parameter moves one output only: off-diagonal entries of I(h|x) never meet."""
    return Cotangents(likelihood.covariance_diagonal(h).sqrt()[None])


def residual_hessian(likelihood: Likelihood, h: Tensor, draw: Draw) -> Cotangents:
    """What I2 adds to the exact value (Remark H.1)."""
    return Cotangents(hessian=sampled_residual(likelihood, h, draw).mean(0))


def sampled_residual(likelihood: Likelihood, h: Tensor, draw: Draw) -> Tensor:
    """``eta - t(y)`` at labels drawn from the model, ``[M, N, T]``.

    Raises:
        ValueError: If the likelihood does not draw labels of that shape.
    """
    labels = likelihood.sample(h, draw.samples, draw.generator)
    if labels.shape[:2] != (draw.samples, len(h)):
        raise ValueError(
            f"{likelihood}.sample returned labels of shape {tuple(labels.shape)}; return {draw.samples} for each of "
            f"{len(h)} inputs, [{draw.samples}, {len(h)}, ...]"
        )
    return likelihood.residual(h, labels)


Plan = dict[Estimator, tuple[str, ...]]
"""Which cotangents for which parameters; where a parameter is under several, their values add up."""


def by_structure(wanted: Mapping[str, Sequence[str]], structure: Structure, coverage: Coverage) -> Plan:
    """The cheapest cotangents that give estimators their parameters.

    In a last linear layer the exact value takes one column; where h is affine in each weight I2 is exact; elsewhere
    I2 shares the columns of the exact value.

    Args:
        wanted: Estimator -> parameters.
        structure: How the output depends on them.
        coverage: By which way their derivatives are found: where only the batch's squared gradient is to be had, that
            takes cotangents of mean zero, which are I1's.
    """
    parts: dict[Estimator, list[str]] = defaultdict(list)
    for name, members in wanted.items():
        if name not in ("exact", "I2"):
            parts[ESTIMATORS[name]].extend(members)
            continue
        parts[squared_score].extend(n for n in members if coverage.is_pooled(n))
        names = [n for n in members if not coverage.is_pooled(n)]
        others = [n for n in names if n not in structure.separable]
        parts[exact_separable].extend(n for n in names if n in structure.separable)
        parts[exact].extend(others)
        if name == "I2":
            parts[residual_hessian].extend(n for n in others if n not in structure.piecewise)
    return {rule: tuple(part) for rule, part in parts.items() if part}


def estimate(batch: Batch, plan: Plan, draw: Draw) -> Diagonal:
    """The mean over the batch's observations of the estimates that ``plan`` names, all from one forward."""
    names = tuple(dict.fromkeys(name for part in plan.values() for name in part))
    total: Diagonal = {}
    for through, likelihood, h, rows in batch.chunks(names, columns=exact in plan):
        some, count, coverage = draw.rows(rows), batch.observations, batch.coverage
        for rule, part in plan.items():
            # The mean is taken at the output, where there are fewer numbers than in the parameters.
            squared, hessian = rule(likelihood, h, some)
            if squared is not None:
                pooled = tuple(name for name in part if coverage.is_pooled(name))
                rest = tuple(name for name in part if name not in pooled)
                # Where inputs are squared together their columns have to be independent, which eigenvectors are not.
                for columns, own in ((fewest_columns(squared), rest), (squared, pooled)):
                    if own:
                        add(total, through.squared_vjp(columns / count**0.5, names=own))
            if hessian is not None:
                add(total, through.hessian_diagonal(hessian / count, names=part, sketch=some.sketch))
    # In the model's order, not the plan's: an optimizer's state is laid out in it.
    return {name: total[name] for name in batch.names if name in total}


def fewest_columns(columns: Tensor) -> Tensor:
    """At most T columns with the same ``sum_k c_k c_k^T`` for every input, which is all that a sum of q depends on."""
    if len(columns) <= columns.shape[-1]:
        return columns
    gram = torch.einsum("kna,knb->nab", columns, columns)
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()[:, None, :]).permute(2, 0, 1)


def request(
    model: nn.Module,
    inputs: Any,
    likelihood: Any,
    estimator: str,
    options: Sequence[str],
    samples: int,
    targets: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Batch, Draw]:
    """The checked arguments of a call that estimates something from one batch.

    Raises:
        ValueError: If an argument does not fit, or ``estimator`` is none of ``options``.
        TypeError: If one is of the wrong kind.
    """
    checked_option("estimator", estimator, options)
    checked_samples(samples)
    checked_generator(generator)
    batch = Batch.of(model, inputs, likelihood, targets)
    if targets is not None and estimator != "empirical" and not batch.may_mask:
        raise ValueError(
            "targets is for estimator='empirical', and where positions or inputs are to be ignored; "
            f"estimator={estimator!r} draws labels itself"
        )
    return batch, Draw(samples, generator, targets)


@apart()
def fisher_diagonal(
    model: nn.Module,
    inputs: Any,
    likelihood: Any,
    *,
    estimator: str = "I1",
    samples: int = 1,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Diagonal:
    """Estimates the diagonal of the Fisher information matrix, ``(1/N_x) sum_n I(theta_i | x_n)``.

    All estimators are on this one scale: per input, averaged over the batch (Eq. 3 and 4 of Soen & Sun 2024). The
    network is used in eval mode and left untouched.

    Where a categorical likelihood has a label at each position ``p`` of an input, independent given the input,
    ``p(y | x_n) = prod_p p(y_p | h_np)``, the scale is per observation, as a mean loss has it: the O positions of the
    batch that are not ignored, ``(1/O) sum_n sum_p I(theta_i | x_n, p)``.

    Args:
        model: The network; its output is the natural parameters, ``[N_x, ...]``.
        inputs: A tensor, or a tuple of the network's positional arguments, with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        estimator: ``"I1"``, ``"I2"``, ``"exact"``, ``"hutchinson"`` or ``"empirical"``. I2 may be negative.
        samples: Labels drawn from the model for each input; irrelevant to ``"exact"`` and ``"empirical"``.
        targets: The data's labels: for ``"empirical"`` what it takes, for the others they tell what is ignored.
        generator: Makes the labels reproducible; torch's global generator if None.

    Returns:
        Name of each trainable parameter -> tensor of its shape.

    Raises:
        ValueError: If an argument does not fit: unknown estimator or likelihood, outputs of another shape, no inputs.
        TypeError: If ``model``, ``inputs`` or ``likelihood`` is of the wrong kind.
    """
    batch, draw = request(model, inputs, likelihood, estimator, tuple(ESTIMATORS), samples, targets, generator)
    if estimator == "empirical" and (pooled := [name for name in batch.names if batch.coverage.is_pooled(name)]):
        raise ValueError(
            f"estimator='empirical': of {pooled[0]!r} there are no gradients of single inputs, as the model couples "
            "the inputs of a batch, and the square of their sum is not the sum of their squares; pass another estimator"
        )
    found = estimate(batch, by_structure({estimator: batch.names}, batch.structure, batch.coverage), draw)
    return {name: found[name] for name in batch.names}
