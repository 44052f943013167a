"""A table, once, for HTML, Markdown and the console; and how numbers look in it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import rich.table
from rich.markup import escape

from benchmarks.report.statistics import Estimate


class Strong(str):
    """A cell that stands out."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """Rows of texts.

    Attributes:
        title: Above it.
        columns: Their heads; the first one's cells name the rows.
        rows: Texts, `Strong` where they stand out.
        note: Below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """As in a README."""
        return f"### {self.title}\n\n{self.body()}" + (f"\n{self.note}\n" if self.note else "")

    def body(self) -> str:
        """The same without title and note."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "".join(f"{_line(cells)}\n" for cells in lines)

    def rich(self) -> rich.table.Table:
        """For the console."""
        table = rich.table.Table(title=self.title, caption=self.note or None, caption_justify="left")
        for column in self.columns:
            table.add_column(column)
        for row in self.rows:
            table.add_row(*(f"[bold]{escape(c)}[/bold]" if isinstance(c, Strong) else escape(c) for c in row))
        return table


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(cell: str) -> str:
    text = cell.replace("|", "\\|")
    return f"**{text}**" if isinstance(cell, Strong) else text


def number(value: float, digits: int = 3) -> str:
    """A few digits."""
    if math.isinf(value):
        return "∞"
    if math.isnan(value):
        return "nan"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def spread(estimate: Estimate | None, digits: int = 3) -> str:
    """A median and its interval."""
    if estimate is None:
        return "-"
    if estimate.seeds == 1 or estimate.low == estimate.high:
        return number(estimate.value, digits)
    value, low, high = (number(v, digits) for v in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def percent(estimate: Estimate | None) -> str:
    """The same, of a rate, in percent."""
    if estimate is None:
        return "-"
    values = [estimate.value, estimate.low, estimate.high]
    value, low, high = ("∞" if math.isinf(v) else f"{100 * v:.2f}" for v in values)
    return f"{value}%" if estimate.seeds == 1 or low == high else f"{value}% [{low}, {high}]"


def counted(seeds: Iterable[int]) -> str:
    """How many seeds, in words; the numbers found in several places."""
    found = sorted(set(seeds))
    if not found:
        return "no seeds"
    if found == [1]:
        return "one seed"
    return f"{found[0]} seeds" if len(found) == 1 else f"{found[0]} to {found[-1]} seeds"
