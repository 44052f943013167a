"""Which estimator for which group of parameters, and why.

Given the inputs, an estimate's error is its label variance, and that alone differs between estimators (Theorem 4.7).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishopt.batch import Batch, apart
from fishopt.checks import checked_option
from fishopt.estimators import EXACT_UP_TO
from fishopt.groups import Groups, UserGroups, layers, named_groups
from fishopt.likelihoods import unit_columns
from fishopt.likelihoods.base import COLUMN_LIMIT
from fishopt.passes import (
    WAYS,
    Coverage,
    Diagonal,
    NoSecondDerivativesError,
    Sketch,
    Structure,
    add,
    signs,
)
from fishopt.variance import (
    SAMPLED,
    bound_factor,
    hutchinson_factor,
    largest_eigenvalue,
    mean_label_variance,
    weighed_norms,
)

CRITERIA = ("bound", "exact", "efficiency")

PAPER = ("I1", "I2")
"""The two estimators that the paper compares."""

MAX_COLUMNS = 64
"""Up to so many outputs, bounds are tight and take a column for each. Above, random signs estimate ``|d_i h|^2``, and
eigenvalues are bounded, not computed: a choice needs no more digits."""

PROBES = 16
"""Random sign vectors per input, above so many outputs."""


@dataclass(frozen=True)
class Choice:
    """The estimator chosen for one group.

    Attributes:
        group: The group's name.
        estimator: The winner's name.
        scores: Candidate -> score, the smaller the better: the mean over the group's parameters of the variance or
            bound, for ``"efficiency"`` times its cost. Where a candidate loses by its cost alone, a lower bound, or
            infinity.
        reason: In words and numbers.
        bounds: Candidate -> mean bound on its label variance, where it was computed.
    """

    group: str
    estimator: str
    scores: dict[str, float]
    reason: str
    bounds: dict[str, float] = field(default_factory=dict)


@apart()
def select_estimators(
    model: nn.Module,
    inputs: Any,
    likelihood: Any,
    *,
    groups: UserGroups | None = None,
    criterion: str = "bound",
    candidates: Sequence[str] = PAPER,
) -> list[Choice]:
    """Chooses an estimator of the Fisher diagonal for each group of parameters.

    Args:
        model: The network.
        inputs: A few inputs, as a tensor or a tuple of tensors with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        groups: Name -> parameters or their names, or a list of such; one group for each module that owns parameters if
            None.
        criterion: ``"bound"``, the upper bound on the label variance (Theorem 4.1); ``"exact"``, that variance itself
            (Lemma 3.1); ``"efficiency"``, the bound on the whole variance (Lemma 4.8 and Theorem 4.1) times the
            number of backward passes, since an estimate that costs as many passes less can use more inputs.
        candidates: Estimators to choose from: ``"I1"``, ``"I2"``, ``"hutchinson"``, ``"exact"``. Ties go to the first.
            I2 and exact are passed over, by any criterion, where they would take over 4,096 columns.

    Returns:
        One `Choice` for each group, in the order of the groups.

    Raises:
        ValueError: If an argument does not fit.
        TypeError: If ``model``, ``inputs``, ``likelihood`` or ``groups`` is of the wrong kind.
    """
    checked_option("criterion", criterion, CRITERIA)
    batch = Batch.of(model, inputs, likelihood)
    members = layers(model) if groups is None else named_groups(model, groups)
    return choose(batch, members, criterion, checked_candidates(candidates))


def checked_candidates(candidates: Any) -> tuple[str, ...]:
    """The candidates as a tuple.

    Raises:
        ValueError: If there are none, or one is unknown or biased.
        TypeError: If it is not a sequence of names.
    """
    if not isinstance(candidates, str | tuple | list):
        raise TypeError(f"candidates={candidates!r}: pass a tuple of estimators, some of {SAMPLED}")
    listed = (candidates,) if isinstance(candidates, str) else tuple(candidates)
    if not listed:
        raise ValueError(f"candidates={candidates!r} is empty; pass some of {SAMPLED}")
    for name in listed:
        checked_option("candidates", name, SAMPLED)
    return listed


def choose(
    batch: Batch, groups: Groups, criterion: str, candidates: Sequence[str], *, exact_up_to: int = EXACT_UP_TO
) -> list[Choice]:
    """`select_estimators` for a checked batch; I2 sketches what takes more than ``exact_up_to`` backward passes."""
    followed = {group: [n for n in names if batch.coverage.is_per_input(n)] for group, names in groups.items()}
    names = tuple(name for members in followed.values() for name in members)
    judge = _CRITERIA[criterion](batch, names, exact_up_to) if names else None
    return [
        _choice(group, followed[group], judge, candidates)
        if judge is not None and followed[group]
        else _unjudged(group, names, batch.coverage)
        for group, names in groups.items()
    ]


def _unjudged(group: str, names: Sequence[str], coverage: Coverage) -> Choice:
    """The choice where there are no derivatives per input that a variance could be computed from."""
    ways = " and ".join(dict.fromkeys(WAYS[coverage.ways[name]] for name in names))
    return Choice(group, "I1", {}, f"no choice: {ways}")


def _choice(group: str, names: Sequence[str], judge: _Judge, candidates: Sequence[str]) -> Choice:
    scores: dict[str, float] = {}
    bounds: dict[str, float] = {}
    notes = []
    for name in sorted(candidates, key=lambda name: judge.is_dear(name, names)):
        if judge.is_impossible(name, names):
            scores[name] = float("inf")
            notes.append(f"{name} is passed over, a column for each of {judge.outputs:,} outputs")
        # First whether what is cheap to know decides: a candidate may lose by its cost alone.
        elif scores and judge.is_dear(name, names) and (floor := judge.floor(name, names)) >= min(scores.values()):
            scores[name] = floor
            notes.append(f"{name} loses by its cost alone, about {judge.cost(name, names):,} backward passes")
        else:
            try:
                scores[name], bounds[name] = judge.score(name, names), judge.bound(name, names)
            except NoSecondDerivativesError:
                scores[name] = float("inf")
                notes.append(f"{name} is passed over, an operation has no second derivative")
    winner = min(candidates, key=lambda name: scores[name])
    return Choice(group, winner, {c: scores[c] for c in candidates}, judge.reason(winner, scores, names, notes), bounds)


class _Judge(ABC):
    """Scores by one criterion. Each quantity is computed once, for all groups, when first asked for."""

    what = ""

    def __init__(self, batch: Batch, names: tuple[str, ...], exact_up_to: int) -> None:
        self._batch = batch
        self._names = names
        self._structure: Structure = batch.structure
        self._variances: dict[tuple[str, tuple[str, ...]], Diagonal] = {}
        self._curvature: dict[tuple[str, ...], Diagonal] = {}
        self._sketch = Sketch(torch.Generator().manual_seed(0), exact_up_to)
        self._first = _first_derivatives(batch, names, self._sketch)

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

    def bound(self, name: str, names: Sequence[str]) -> float:
        """The mean over the group of the bound on the label variance, Theorem 4.1."""
        if name == "exact":
            return 0.0
        if name != "I2":
            return _mean(self._first.bounds[name], names)
        key = tuple(n for n in names if n not in self._structure.piecewise)
        if key not in self._curvature:
            self._curvature[key] = _curvature_bound(self._batch, key, self._sketch)
        return _mean(self._curvature[key], names, size_of=self._first.bounds["I1"])

    def reason(self, winner: str, scores: dict[str, float], names: Sequence[str], notes: list[str]) -> str:
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


class _ByBound(_Judge):
    what = "bound on E[V]:"

    def score(self, name: str, names: Sequence[str]) -> float:
        return self.bound(name, names)


class _ByVariance(_Judge):
    what = "E[V]:"

    def score(self, name: str, names: Sequence[str]) -> float:
        # Second derivatives are dear, so only of the group; the rest in one go.
        key = tuple(names) if self.is_dear(name, names) else self._names
        if (name, key) not in self._variances:
            self._variances[name, key] = mean_label_variance(self._batch, name, key, self._sketch)
        return _mean(self._variances[name, key], names)


class _ByEfficiency(_Judge):
    what = "bound on the variance x backward passes:"

    def score(self, name: str, names: Sequence[str]) -> float:
        return self.floor(name, names) + self.bound(name, names) * self.cost(name, names)

    def floor(self, name: str, names: Sequence[str]) -> float:
        return _mean(self._first.over_inputs, names) * self.cost(name, names)


_CRITERIA: dict[str, type[_Judge]] = {"bound": _ByBound, "exact": _ByVariance, "efficiency": _ByEfficiency}


class _FirstDerivatives(NamedTuple):
    """What one pass tells, all averages over the batch.

    Attributes:
        outputs: T.
        costs: Backward passes of each parameter's Hessian diagonal.
        over_inputs: Lemma 4.8's bound.
        bounds: Those on the label variance of I1 and hutchinson.
    """

    outputs: int
    costs: dict[str, int]
    over_inputs: Diagonal
    bounds: dict[str, Diagonal]


def _first_derivatives(batch: Batch, names: tuple[str, ...], sketch: Sketch) -> _FirstDerivatives:
    outputs, costs = 0, dict.fromkeys(names, 0)
    totals: dict[str, Diagonal] = {name: batch.zeros(names) for name in ("I1", "inputs")}
    for through, likelihood, h, _ in batch.chunks(names, per_input=True):
        outputs, costs = h.shape[1], {name: through.hessian_cost(name, sketch) for name in names}
        factors = {
            "I1": bound_factor(likelihood, h, "I1", tight=_is_small(h)),
            "inputs": largest_eigenvalue(likelihood, h, tight=_is_small(h)).square(),
        }
        for key, factor in factors.items():
            add(totals[key], weighed_norms(through, _directions(h), factor, "I1"))
    count = batch.observations
    squared_score, inputs = ({name: value / count for name, value in total.items()} for total in totals.values())
    hutchinson = {name: hutchinson_factor(outputs) * value for name, value in inputs.items()}
    return _FirstDerivatives(outputs, costs, inputs, {"I1": squared_score, "hutchinson": hutchinson})


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
