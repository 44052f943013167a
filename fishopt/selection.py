"""Which estimator for which group of parameters, and why.

Given the inputs, an estimate's error is its label variance, and that alone differs between estimators (Theorem 4.7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fishopt.batch import Batch, apart
from fishopt.checks import checked_option
from fishopt.estimators import EXACT_UP_TO
from fishopt.groups import Groups, UserGroups, layers, named_groups
from fishopt.judging import JUDGES, Judge
from fishopt.passes import WAYS, Coverage, NoSecondDerivativesError
from fishopt.variance import SAMPLED

CRITERIA = tuple(JUDGES)

PAPER = ("I1", "I2")
"""The two estimators that the paper compares."""


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
        bounds: Candidate -> mean bound on its label variance, where it was computed; where ``"efficiency"`` compares
            variances, that variance.
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
            (Lemma 3.1); ``"efficiency"``, the whole variance, over inputs and labels (Theorem 4.7), times the number
            of backward passes, since an estimate that costs as many passes less can use more inputs. From one input,
            which shows no variance over inputs, the square of I in its place; above 64 outputs per input, the bounds
            on both parts (Lemma 4.8 and Theorem 4.1).
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
    judge = JUDGES[criterion](batch, names, exact_up_to) if names else None
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


def _choice(group: str, names: Sequence[str], judge: Judge, candidates: Sequence[str]) -> Choice:
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
                scores[name], bounds[name] = judge.score(name, names), judge.label_term(name, names)
            except NoSecondDerivativesError:
                scores[name] = float("inf")
                notes.append(f"{name} is passed over, an operation has no second derivative")
    # What is at least as bad as another may be worse: it wins no tie.
    winner = min(candidates, key=lambda name: (scores[name], name not in bounds))
    return Choice(group, winner, {c: scores[c] for c in candidates}, judge.reason(winner, scores, names, notes), bounds)
