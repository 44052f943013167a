"""By what criterion one estimator is better than another, for a group of parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fishopt.batch import Batch
from fishopt.likelihoods import Likelihood, unit_columns
from fishopt.likelihoods.base import COLUMN_LIMIT
from fishopt.passes import Diagonal, Pass, Sketch, Structure, add, signs
from fishopt.variance import (
    bound_factor,
    first_order_sums,
    hutchinson_factor,
    largest_eigenvalue,
    mean_label_variance,
    weighed_norms,
    with_label_variance,
)

MAX_COLUMNS = 64
"""Up to so many outputs there is a column for each: efficiency compares variances, and bounds are tight. Above, random
signs estimate ``|d_i h|^2``, and eigenvalues are bounded, not computed."""

PROBES = 16
"""Random sign vectors per input, above so many outputs."""


class Judge(ABC):
    """Scores by one criterion. Each quantity is computed once, for all groups, when first asked for."""

    what = ""
    weighs_inputs = False

    def __init__(self, batch: Batch, names: tuple[str, ...], exact_up_to: int) -> None:
        self._batch = batch
        self._names = names
        self._structure: Structure = batch.structure
        self._variances: dict[tuple[str, tuple[str, ...]], Diagonal] = {}
        self._curvature: dict[tuple[str, ...], Diagonal] = {}
        self._sketch = Sketch(torch.Generator().manual_seed(0), exact_up_to)
        self._first = _first_derivatives(batch, names, self._sketch, exactly=self.weighs_inputs)

    @abstractmethod
    def score(self, name: str, names: Sequence[str]) -> float:
        """The smaller, the better."""

    def floor(self, name: str, names: Sequence[str]) -> float:
        """What the score is at least, without second derivatives."""
        return -float("inf")

    def is_dear(self, name: str, names: Sequence[str]) -> bool:
        """Whether scoring takes second derivatives of the network."""
        return name == "I2" and not self._structure.piecewise.issuperset(names)

    @property
    def outputs(self) -> int:
        """Of one input, at all its positions."""
        return self._first.outputs

    def is_impossible(self, name: str, names: Sequence[str]) -> bool:
        """Whether an estimate would take more columns than there may be."""
        whole = name in {"I2", "exact"} and not self._structure.separable.issuperset(names)
        return whole and self.outputs > COLUMN_LIMIT

    def cost(self, name: str, names: Sequence[str]) -> int:
        """Backward passes for one estimate, with one label per input."""
        if name in ("I1", "hutchinson"):
            return 1
        columns = 1 if self._structure.separable.issuperset(names) else self.outputs
        curved = [self._first.costs[n] for n in names if n not in self._structure.piecewise]
        return columns + (max(curved, default=0) if name == "I2" else 0)

    def label_term(self, name: str, names: Sequence[str]) -> float:
        """The mean over the group of the bound on the label variance, Theorem 4.1."""
        if name == "exact":
            return 0.0
        if name != "I2":
            return _mean(self._first.labels[name], names)
        key = tuple(n for n in names if n not in self._structure.piecewise)
        if key not in self._curvature:
            self._curvature[key] = _curvature_bound(self._batch, key, self._sketch)
        return _mean(self._curvature[key], names, size_of=self._first.over_inputs)

    def variance(self, name: str, names: Sequence[str]) -> float:
        """The mean over the group of the label variance itself, Lemma 3.1."""
        if not with_label_variance(self._batch, name, names):
            return 0.0
        # Second derivatives are dear, so only of the group; the rest in one go.
        key = tuple(names) if self.is_dear(name, names) else self._names
        if (name, key) not in self._variances:
            self._variances[name, key] = mean_label_variance(self._batch, name, key, self._sketch)
        return _mean(self._variances[name, key], names)

    def reason(self, winner: str, scores: dict[str, float], names: Sequence[str], notes: list[str]) -> str:
        """What was compared, in words and numbers."""
        structure = self._structure
        words = []
        if winner == "I2" and structure.affine.issuperset(names):
            words.append("structural: h is affine in these parameters (Remark 4.4), so V2 = 0")
        elif winner == "I2" and structure.piecewise.issuperset(names):
            words.append("structural: h is piecewise affine in each weight, so V2 = 0 almost everywhere")
        others = [c for c in scores if c != winner and scores[c] != float("inf")]
        if others:
            listed = ", ".join(f"{c} {scores[c]:.2e}" for c in others)
            words.append(f"{self.what} {winner} {scores[winner]:.2e} against {listed}")
        return "; ".join([*words, *notes]) or "the only candidate"


class _ByBound(Judge):
    what = "bound on E[V]:"

    def score(self, name: str, names: Sequence[str]) -> float:
        return self.label_term(name, names)


class _ByVariance(Judge):
    what = "E[V]:"

    def score(self, name: str, names: Sequence[str]) -> float:
        return self.variance(name, names)


class _ByEfficiency(Judge):
    weighs_inputs = True

    def __init__(self, batch: Batch, names: tuple[str, ...], exact_up_to: int) -> None:
        super().__init__(batch, names, exact_up_to)
        if not self._first.is_exact:
            self.what = "bound on the variance over inputs and labels x backward passes:"
            return
        self.what = "variance over inputs and labels x backward passes:"
        if len(batch) == 1:
            self.what = "E[I^2] of the one input, for the variance over inputs, and label variance x backward passes:"
        self._variances.update({(name, names): found for name, found in self._first.labels.items()})

    def score(self, name: str, names: Sequence[str]) -> float:
        return self.floor(name, names) + self.label_term(name, names) * self.cost(name, names)

    def floor(self, name: str, names: Sequence[str]) -> float:
        return _mean(self._first.over_inputs, names) * self.cost(name, names)

    def label_term(self, name: str, names: Sequence[str]) -> float:
        return self.variance(name, names) if self._first.is_exact else super().label_term(name, names)


JUDGES: dict[str, type[Judge]] = {"bound": _ByBound, "exact": _ByVariance, "efficiency": _ByEfficiency}


class _FirstDerivatives(NamedTuple):
    """What one pass tells, all averages over the batch.

    Attributes:
        outputs: T.
        costs: Backward passes of each parameter's Hessian diagonal.
        over_inputs: The variance over inputs, or Lemma 4.8's bound on it.
        labels: The label variances of I1 and hutchinson, or the bounds on them.
        is_exact: Whether these are the variances.
    """

    outputs: int
    costs: dict[str, int]
    over_inputs: Diagonal
    labels: dict[str, Diagonal]
    is_exact: bool


def _first_derivatives(batch: Batch, names: tuple[str, ...], sketch: Sketch, *, exactly: bool) -> _FirstDerivatives:
    """Variances where they are wanted and there may be a column for each output, else bounds."""
    outputs, costs, is_exact = 0, dict.fromkeys(names, 0), False
    totals: dict[str, Diagonal] = defaultdict(dict)
    for through, likelihood, h, _ in batch.chunks(names, per_input=True):
        outputs, costs = h.shape[1], {name: through.hessian_cost(name, sketch) for name in names}
        is_exact = exactly and _is_small(h)
        sums = first_order_sums(through, likelihood, h) if is_exact else _sums_of_bounds(through, likelihood, h)
        for key, found in sums.items():
            add(totals[key], found)
    count = batch.observations
    if is_exact:
        over_inputs = _over_inputs(totals["squares"], totals["fisher"], len(batch))
    else:
        over_inputs = totals["inputs"]
        totals["hutchinson"] = {name: hutchinson_factor(outputs) * value for name, value in over_inputs.items()}
    labels = {name: {n: value / count for n, value in totals[name].items()} for name in ("I1", "hutchinson")}
    over_inputs = {name: value / count for name, value in over_inputs.items()}
    return _FirstDerivatives(outputs, costs, over_inputs, labels, is_exact)


def _over_inputs(squares: Diagonal, fisher: Diagonal, count: int) -> Diagonal:
    """The variance of I over inputs from sums over ``count`` of them, without bias, times that number.

    Of one input the sum of squares, which is what Lemma 4.8 bounds: E[I^2] is at least the variance.
    """
    if count == 1:
        return squares
    spread = {name: (value - fisher[name].square() / count).clamp_min(0) for name, value in squares.items()}
    return {name: value * (count / (count - 1)) for name, value in spread.items()}


def _sums_of_bounds(through: Pass, likelihood: Likelihood, h: Tensor) -> dict[str, Diagonal]:
    """Those of Theorem 4.1 and Lemma 4.8."""
    factors = {
        "I1": bound_factor(likelihood, h, "I1", tight=_is_small(h)),
        "inputs": largest_eigenvalue(likelihood, h, tight=_is_small(h)).square(),
    }
    found = through.fourth_vjp(_directions(h)[None], torch.stack(list(factors.values()))[:, None])
    return {key: {name: value[i] for name, value in found.items()} for i, key in enumerate(factors)}


def _curvature_bound(batch: Batch, names: tuple[str, ...], sketch: Sketch) -> Diagonal:
    """The bound on V2, Eq. 9; of the sketch, where it is one, its own variance included."""
    total = batch.zeros(names)
    for through, likelihood, h, _ in batch.chunks(names, per_input=True):
        factor = bound_factor(likelihood, h, "I2", tight=_is_small(h))
        add(total, weighed_norms(through, _directions(h), factor, "I2", sketch))
    return {name: value / batch.observations for name, value in total.items()}


def _directions(h: Tensor) -> Tensor:
    """Vectors with ``sum_k c_k c_k^T = I``: the unit vectors, or random ones in their place."""
    return unit_columns(h) if _is_small(h) else _probes(h)


def _is_small(h: Tensor) -> bool:
    return h.shape[1] <= MAX_COLUMNS


def _probes(h: Tensor) -> Tensor:
    """Random signs, always the same: E[eps eps^T] = I makes ``sum_k q`` and ``sum_k r^2`` the sums over outputs."""
    return signs((PROBES, *h.shape), h, torch.Generator().manual_seed(0)) / PROBES**0.5


def _mean(diagonal: Diagonal, names: Sequence[str], size_of: Diagonal | None = None) -> float:
    """The mean over the entries of a group; parameters that the diagonal lacks count as zeros."""
    size = sum((size_of or diagonal)[name].numel() for name in names)
    return float(sum(diagonal[name].sum() for name in names if name in diagonal)) / max(size, 1)
