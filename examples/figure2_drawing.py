"""The picture of figure2.py: curves by epoch, a column for each layer of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

COLOURS = {"FI": "0.2", "V1": "#c44e52", "V2": "#4c72b0"}
"""The quantities, in the order in which they are measured."""


def draw(name: str, means: Tensor, roots: Tensor, loose: Tensor, path: Path) -> None:
    """A column for each layer: the information, the roots of variances, and bounds over variances, by epoch.

    Args:
        name: The network's, for the title.
        means: ``[E + 1, X, L, 3, 3]``: epochs and the start, inputs, layers, quantities, and each with its two bounds.
        roots: The same of the square roots.
        loose: ``[E + 1, L, 3, 2]``: each bound over its quantity.
        path: The picture to write.
    """
    layers = means.shape[2]
    figure = Figure(figsize=(3.4 * layers, 8.4), layout="constrained")
    grid = figure.subplots(3, layers, sharex=True, sharey="row")
    for layer, axes in enumerate(grid.T):
        curves(axes[0], means[:, :, layer, 0], "FI")
        for row, quantity in ((1, "V1"), (2, "V2")):
            curves(axes[1], roots[:, :, layer, row], quantity)
        for row, quantity in enumerate(COLOURS):
            for kind, style in ((0, "--"), (1, ":")):
                axes[2].plot(loose[:, layer, row, kind], style, color=COLOURS[quantity])
        for axis in axes:
            axis.set_yscale("log")
            axis.grid(alpha=0.3, linewidth=0.5)
        axes[0].set_title(f"layer {layer + 1}" + (": V2 = 0" if layer == layers - 1 else ""))
    for axis, label in zip(
        grid[:, 0], ("Fisher information", "root of label variance", "bound / value (not of roots)"), strict=True
    ):
        axis.set_ylabel(label)
    grid[2, 0].set_ylim(bottom=0.8)
    handles = [Line2D([], [], color=colour, label=label) for label, colour in COLOURS.items()]
    handles.append(Line2D([], [], color="0.5", label="value"))
    handles.append(Line2D([], [], color="0.5", linestyle="--", label="the paper's bound"))
    handles.append(Line2D([], [], color="0.5", linestyle=":", label="our bound"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    for axis in grid[-1]:
        axis.set_xlabel("epoch")
    figure.suptitle(f"{name}: means over each layer's parameters and {means.shape[1]} test inputs (thin: each)")
    figure.savefig(path, dpi=110)


def curves(axis: Any, values: Tensor, quantity: str) -> None:
    """``[E + 1, X, 3]``: the value and its two bounds, means over inputs; of the value each input too."""
    if not values.any():
        return
    axis.plot(values[..., 0], color=COLOURS[quantity], linewidth=0.5, alpha=0.4)
    for kind, style in enumerate(("-", "--", ":")):
        axis.plot(values[..., kind].mean(1), style, color=COLOURS[quantity], linewidth=1.6)
