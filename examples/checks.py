"""Checks that an example prints: what is known, what came out, how close it has to be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_rel
from torch import Tensor

LEVEL = 0.05
"""Of the tests."""


@dataclass(frozen=True)
class Check:
    """A number against what is known of it.

    Attributes:
        what: In words.
        expected: The value, or the bound.
        got: What came out.
        tolerance: Relative to ``expected``.
        relation: Whether ``got`` is to equal ``expected``, or to be at most or at least that, up to the tolerance.
    """

    what: str
    expected: float
    got: float
    tolerance: float = 0.0
    relation: Literal["=", "<=", ">="] = "="

    @property
    def passes(self) -> bool:
        """Whether it holds; nothing that is not a number does."""
        slack = self.tolerance * abs(self.expected)
        return (self.relation == "<=" or self.got >= self.expected - slack) and (
            self.relation == ">=" or self.got <= self.expected + slack
        )


def better(words: str, first: Tensor, second: Tensor) -> Check:
    """Whether the first of two accuracies, both ``[seeds]``, is above the second: a paired, one-sided t-test."""
    p, gain = float(ttest_rel(first, second, alternative="greater").pvalue), 100 * float((first - second).mean())
    return Check(f"{words}, by {gain:.1f} points: p-value", LEVEL, p, relation="<=")


def show(title: str, checks: Iterable[Check]) -> bool:
    """Prints the checks as a table.

    Returns:
        Whether all of them pass.
    """
    table = Table(title=title)
    for heading in ("check", "expected", "got", "tolerance", "pass"):
        table.add_column(heading)
    listed = list(checks)
    for check in listed:
        expected = f"{check.expected:.7g}" if check.relation == "=" else f"{check.relation} {check.expected:.7g}"
        passed = "yes" if check.passes else "[bold red]NO"
        table.add_row(check.what, expected, f"{check.got:.7g}", f"{check.tolerance:.2g}", passed)
    Console(width=140).print(table)
    return all(check.passes for check in listed)
