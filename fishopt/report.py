"""What an optimizer tells about its curvature: a table, a dict, and a picture."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fishopt.passes import WAYS
from fishopt.selection import Choice

_FIXED = {
    "I1": "set by the user: squared scores at sampled labels",
    "I2": "set by the user: negative Hessian at sampled labels",
    "exact": "set by the user: no label is sampled",
    "hutchinson": "set by the user: random signs",
    "empirical": "set by the user: squared scores at the data's labels (biased)",
    "auto": "not chosen yet: the first step chooses",
}


@dataclass(frozen=True)
class Row:
    """One unit of choice.

    Attributes:
        group: Its name.
        parameters: How many numbers it holds.
        estimator: The estimator in use.
        bounds: Candidate -> mean bound on its label variance, or that variance, as in `Choice`.
        reason: Why this estimator.
        refreshes: Estimates taken so far.
        ways: Parameter -> the way by which its derivatives are found, a key of `fishopt.passes.WAYS`.
    """

    group: str
    parameters: int
    estimator: str
    bounds: dict[str, float]
    reason: str
    refreshes: int
    ways: dict[str, str]

    @classmethod
    def of(
        cls,
        group: str,
        wanted: str,
        choice: Choice | None,
        *,
        parameters: int,
        refreshes: int,
        ways: dict[str, str],
    ) -> Self:
        """A row from what was asked for and what was chosen."""
        if wanted == "auto" and choice is not None:
            return cls(group, parameters, choice.estimator, dict(choice.bounds), choice.reason, refreshes, ways)
        return cls(group, parameters, wanted, {}, _FIXED.get(wanted, "set by the user"), refreshes, ways)

    @property
    def shown_ways(self) -> str:
        """The ways of its parameters, best first."""
        return ", ".join(way for way in WAYS if way in self.ways.values()) or "-"


@dataclass(frozen=True)
class Report:
    """The state of an optimizer's curvature; ``print`` shows it as a table.

    Attributes:
        optimizer: The optimizer's class.
        criterion: How ``"auto"`` chooses.
        rows: One `Row` for each unit of choice.
        steps: Steps taken.
        failures: Refreshes that failed, or came out NaN or infinite, and were passed over.
        skipped: Steps that were not made, because gradients were NaN or infinite.
        curvature_seconds: Time spent on curvature.
        curvature_share: The same over all time from the first step to the last.
        history: For each selection its step and its choices, as dicts.
    """

    optimizer: str
    criterion: str
    rows: list[Row]
    steps: int
    failures: int
    skipped: int
    curvature_seconds: float
    curvature_share: float
    history: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts and lists, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        table = Table(title=f"{self.optimizer}, criterion {self.criterion!r}, after {self.steps:,} steps")
        for heading in ("group", "parameters", "estimator", "V of I1", "V of I2", "refreshes", "way", "reason"):
            numeric = heading in ("parameters", "V of I1", "V of I2", "refreshes")
            # The reason wraps; nothing else may, whatever the width.
            table.add_column(heading, justify="right" if numeric else "left", no_wrap=heading != "reason")
        for row in self.rows:
            bounds = [f"{row.bounds[name]:.1e}" if name in row.bounds else "-" for name in ("I1", "I2")]
            cells = (escape(row.group), f"{row.parameters:,}", row.estimator, *bounds, f"{row.refreshes:,}")
            table.add_row(*cells, row.shown_ways, escape(row.reason))
        text = StringIO()
        console = Console(file=text, width=max(100, shutil.get_terminal_size(fallback=(140, 24)).columns))
        failed = f"failed refreshes: {self.failures}; steps skipped for their gradients: {self.skipped}"
        console.print(table, f"curvature: {self.curvature_share:.1%} of the time; {failed}")
        if any(row.bounds for row in self.rows):
            console.print("V: an entry's label variance, or the bound on it that was compared; the mean over the group")
        taken = {way for row in self.rows for way in row.ways.values()}
        for way in (way for way in WAYS if way in taken):
            console.print(f"way {way!r}: by {WAYS[way]}")
        return text.getvalue()

    def plot(self, path: str | Path) -> Path:
        """Draws the choices and the bounds on the variances over training; needs matplotlib.

        Args:
            path: Where to save the picture (PNG by its ending).

        Returns:
            The path.

        Raises:
            ValueError: If nothing was chosen yet, or no group is set to ``"auto"``.
            ImportError: If matplotlib is not installed.
        """
        if not self.history:
            raise ValueError("history is empty: there is a choice to draw once a step was taken with estimator='auto'")
        try:
            from fishopt.plotting import plot_choices  # matplotlib is an extra
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install '.[plot]' from fishopt's source") from error
        return plot_choices(self.history, Path(path))
