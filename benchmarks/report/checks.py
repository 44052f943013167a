"""A target that was set in advance, what was measured, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.report.statistics import DRAWS, Estimate, combined
from benchmarks.report.tables import Strong, Table, number


@dataclass(frozen=True)
class Check:
    """One target for one method.

    Attributes:
        target: In words.
        method: Whose.
        value: What was measured, None if nothing was.
        bar: What it must reach.
        at_least: Whether it must be that or more, or else that or less.
        remark: What else to know, such as the problem that is worst.
        tried: The number of problems measured.
        of: The number of problems that it is about.
        needs_all: Whether each further problem could only make it worse; else, only better.
        is_drawn: Whether the value varies with the seeds drawn, and so has an interval.
    """

    target: str
    method: str = "-"
    value: Estimate | None = None
    bar: float = 0.0
    at_least: bool = True
    remark: str = ""
    tried: int = 0
    of: int = 0
    needs_all: bool = True
    is_drawn: bool = True

    @property
    def verdict(self) -> str:
        """Met, within noise or beyond; missed; incomplete where problems that could turn it have not run; or n/a."""
        if self.value is None:
            return "n/a"
        ok, to_go = self._holds(self.value.value), self.of - self.tried
        if to_go and (ok if self.needs_all else not ok and self._holds(self.value.value + to_go)):
            return "incomplete"
        if not ok:
            return "missed"
        is_certain = self.value.seeds > 1 and self._holds(self.value.low) and self._holds(self.value.high)
        return "met" if is_certain or not self.is_drawn else "met, within noise"

    def _holds(self, value: float) -> bool:
        return value >= self.bar if self.at_least else value <= self.bar

    @property
    def order(self) -> tuple[Any, ...]:
        """The better, the less; what has not run everywhere after what has, unless it is met as it is."""
        is_partial = self.verdict == "missed" and self.tried < self.of
        verdicts = ("met", "met, within noise", "missed", "incomplete", "missed so far", "n/a")
        value = 0.0 if self.value is None else self.value.value
        place = verdicts.index("missed so far" if is_partial else self.verdict)
        return place, -value if self.at_least else value

    def row(self) -> list[str]:
        """Of a table."""
        if self.value is None:
            return [self.target, self.method, "-", "-", self.verdict]
        interval = f"{number(self.value.low)} to {number(self.value.high)}" if self.is_drawn else "-"
        if self.value.seeds == 1:
            interval = "one seed somewhere" if self.of > 1 else "one seed"
        verdict = self.verdict if self.verdict in {"incomplete", "n/a"} else Strong(self.verdict)
        return [self.target, self.method, number(self.value.value) + self.remark, interval, verdict]


COLUMNS = ["target", "method", "measured", "95% interval", "verdict"]


def all_of(checks: Sequence[Check], seeds: str) -> Table:
    """Every check, the best method of each target first."""
    rows = [check.row() for group in _by_target(checks) for check in group]
    note = f"Of each target the best method comes first. {seeds}"
    return Table("The targets, for each of our methods", COLUMNS, rows, note)


def best_of(checks: Sequence[Check], seeds: str) -> Table:
    """Of each target, the method that does best."""
    rows = [group[0].row() for group in _by_target(checks)]
    return Table("The targets, by the best of our methods", COLUMNS, rows, seeds)


def _by_target(checks: Sequence[Check]) -> list[list[Check]]:
    targets = dict.fromkeys(check.target for check in checks)
    return [sorted((c for c in checks if c.target == target), key=lambda c: c.order) for target in targets]


@dataclass(frozen=True)
class Over:
    """Estimates of several problems, to be checked at once.

    Attributes:
        found: Problem -> estimate, None where there is nothing to compare, such as where both methods missed.
        of: How many problems there are.
    """

    found: dict[str, Estimate | None]
    of: int

    @property
    def known(self) -> dict[str, Estimate]:
        """Those with a number."""
        return {problem: estimate for problem, estimate in self.found.items() if estimate is not None}

    def count(self, check: Check, passes: Callable[[np.ndarray], np.ndarray]) -> Check:
        """On how many problems something holds."""
        if not self.known:
            return check
        value = combined(list(self.known.values()), lambda x: passes(x).sum(0))
        remark = f" of {self.of} problems"
        return replace(check, value=value, remark=remark, tried=len(self.found), of=self.of, needs_all=False)

    def worst(self, check: Check) -> Check:
        """The value on the problem where it is worst."""
        if not self.known:
            return check
        extreme = np.min if check.at_least else np.max
        value = combined(list(self.known.values()), lambda x: extreme(x, axis=0))
        where = next(problem for problem, estimate in self.known.items() if estimate.value == value.value)
        unknown = [problem for problem in self.found if problem not in self.known]
        remark = f" on {where}" + (f"; neither arrives on {', '.join(unknown)}" if unknown else "")
        return replace(check, value=value, remark=remark, tried=len(self.found), of=self.of)


def constant(value: float, seeds: int) -> Estimate:
    """A number that is not drawn again."""
    return Estimate(value, np.full(DRAWS, value), seeds)
