"""The tables that ``python -m benchmarks.cost`` prints: medians of ratios, and quartiles in brackets."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from benchmarks.cost.curvature import METHODS
from benchmarks.cost.growth import AUTO, ESTIMATORS, exponent
from benchmarks.cost.records import Measured, Row
from benchmarks.cost.training import OURS

Cell = Callable[[Row], str]


def tables(measured: Measured) -> list[Table]:
    """All tables for what was measured."""
    found = []
    if rows := measured.get("passes"):
        found.append(_grid("passes: time / time of a gradient", rows, METHODS, lambda row: str(row.ratio)))
        weighed = [row for row in rows if "memory" in row.extra and row.method != "gradient"]
        found.append(_grid("passes: peak memory / a gradient's", weighed, METHODS, _memory))
    if rows := measured.get("update"):
        found.append(_update(rows))
    if rows := measured.get("step"):
        found.append(_grid("step: time / time with AdamW fused", rows, tuple(OURS), _step))
    if rows := measured.get("growth"):
        found.append(_growth(rows))
    return found


def _memory(row: Row) -> str:
    return f"{row.extra['memory']:.1f}"


def _step(row: Row) -> str:
    return f"{row.ratio}, curvature {row.extra['share']:.0%}"


def _grid(title: str, rows: list[Row], methods: tuple[str, ...], cell: Cell) -> Table:
    """A line for each method, a column for each problem."""
    problems = list(dict.fromkeys(row.problem for row in rows))
    cells = {(row.problem, row.method): cell(row) for row in rows}
    table = Table("method", title=title, title_justify="left")
    for problem in problems:
        table.add_column(problem, justify="right", no_wrap=True)
    for method in methods:
        line = [cells.get((problem, method), "-") for problem in problems]
        if set(line) != {"-"}:
            table.add_row(method, *line)
    return table


def _update(rows: list[Row]) -> Table:
    sizes = list(dict.fromkeys(row.size for row in rows))
    cells = {(row.method, row.baseline, row.size): str(row.ratio) for row in rows}
    table = Table("optimizer", "against", title="update alone: ratio of times, by parameters", title_justify="left")
    for size in sizes:
        table.add_column(f"{size:,}", justify="right", no_wrap=True)
    for method, baseline in dict.fromkeys((row.method, row.baseline) for row in rows):
        table.add_row(method, baseline, *(cells[method, baseline, size] for size in sizes))
    return table


def _growth(rows: list[Row]) -> Table:
    table = Table("size", title="growth: time / time of a gradient; exponent of the time itself", title_justify="left")
    methods = (*ESTIMATORS, AUTO)
    for heading in ("gradient", *methods, "picked for hidden layers"):
        table.add_column(heading, justify="right")
    for what in dict.fromkeys(row.problem for row in rows):
        mine = [row for row in rows if row.problem == what]
        for size in dict.fromkeys(row.size for row in mine):
            line = {row.method: row for row in mine if row.size == size}
            ratios = [f"{line[method].ratio.median:.2f}" for method in methods]
            table.add_row(f"{what} {size:,}", "1", *ratios, ", ".join(line[AUTO].extra["hidden"]))
        exponents = [f"{exponent([r for r in mine if r.method == method]):.2f}" for method in ("gradient", *methods)]
        table.add_row(f"{what}: exponent", *exponents, "", style="bold", end_section=True)
    return table
