"""How methods look, the same in every picture: ours thick, colours apart for the colour-blind (Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.methods import METHODS

COLOURS = {
    "FisherAdam": "#0072b2",
    "FisherAdam schedule-free": "#56b4e9",
    "DiagonalNGD": "#009e73",
    "DiagonalNGD auto": "#e69f00",
    "AdamW": "#000000",
    "Schedule-Free AdamW": "#d55e00",
    "Muon": "#cc79a7",
    "SOAP": "#882255",
    "Sophia-H": "#999933",
    "AdaHessian": "#aa8844",
    "IVON": "#332288",
}
"""The others are grey, told apart by their lines."""

GREY = "#999999"
DASHES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (6, 3)), (0, (3, 1, 1, 1))]
MARKERS = "osD^vP*X<>hp"


def line(method: str) -> dict[str, Any]:
    """The arguments of a line."""
    ours = METHODS[method].is_ours
    return {
        "color": colour(method),
        "linestyle": "-" if ours or method in {"AdamW", "Schedule-Free AdamW"} else DASHES[1 + _place(method) % 7],
        "linewidth": 2.4 if ours else 1.4,
        "zorder": 4 if ours else 3,
    }


def marker(method: str) -> str:
    """The shape of a point."""
    return MARKERS[list(METHODS).index(method) % len(MARKERS)]


def colour(method: str) -> str:
    """The colour of a method."""
    return COLOURS.get(method, GREY)


def _place(method: str) -> int:
    return [name for name in METHODS if not METHODS[name].is_ours].index(method)


def plain(axis: Any) -> None:
    """Numbers as they are spoken on a logarithmic axis, with some between powers of ten where it spans few."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if high / low > 200:
        axis.set_minor_formatter(NullFormatter())
        return
    digits = (1, 2, 5) if high / low > 4 else range(10)
    axis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if _first_digit(v) in digits else ""))
    axis.axes.tick_params(axis=axis.axis_name, which="both", labelsize=8)


def _first_digit(value: float) -> int:
    return round(value / 10 ** np.floor(np.log10(value)))


def legend(figure: Figure, methods: Sequence[str], extra: Sequence[Line2D] = (), *, points: bool = False) -> None:
    handles = [Line2D([], [], label=m, marker=marker(m) if points else "", **line(m)) for m in methods]
    figure.legend(handles=[*handles, *extra], loc="outside right upper", frameon=False, fontsize=9)


def grid(count: int, width: float, height: float, columns: int = 4, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 2, height * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]
