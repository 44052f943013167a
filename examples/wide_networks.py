"""The spectrum of the Fisher matrix of wide random networks, against the mean-field theory of `mean_field`.

Measured over width, depth and number of inputs, by the Gram form of `fishopt.spectrum`. What there is to expect:

- The largest eigenvalue is C-fold in the limit. A finite width splits it: the largest of the C is above the limit by
  something in 1/sqrt(M), while their mean, as the other statistics, is off by something in 1/M. So these are fitted
  by a line in 1/M, whose end at 0 is held against theory, and the excess of the largest over that mean by a power of M.
- The tolerance on what is measured is what chance explains: the 99.9 % interval of Student's t from the spread over
  the networks that were drawn; for a difference from the reference together with that of its five networks.
- The reference theory, of another program, comes out to its last digit with 60 nodes of Gauss-Hermite quadrature, so
  with these it is compared. They leave 1 % on the ReLU's kink and 0.2 % on tanh, against the closed form and 400 nodes.
- With softmax outputs the largest eigenvalue depends on the network's own outputs. Theory is taken once with these,
  and once with outputs drawn from the limiting Gaussian process.

Gradient descent on both sides of the rate 2/lambda_max is that of `wide_descent`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import Check, show
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from mean_field import (
    RELU,
    STATISTICS,
    TANH,
    Ensemble,
    Sizes,
    limiting_outputs,
    network,
    order_parameters,
    quadrature,
    softmax_eigenvalues,
    statistics,
)
from scipy.stats import t as student
from tqdm import tqdm
from wide_descent import Descent, descend, descent_checks, draw_descent

import fishopt
from fishopt.spectrum import fisher_gram, spectrum

ENSEMBLES = {TANH: "#4c72b0", RELU: "#c44e52"}
REFERENCE = {
    TANH: ((".00318", ".2355", "192.5"), (0.00321, 0.245, 198.6)),
    RELU: ((".00525", "1.120", "556.6"), (0.00519, 1.090, 560.8)),
}
"""`STATISTICS` at the default sizes: theory as it was printed, and the mean over `REFERENCE_NETWORKS`."""
REFERENCE_NODES, REFERENCE_NETWORKS = 60, 5
LEVEL = 0.999
GAUSSIAN, CATEGORICAL = fishopt.Gaussian(variance=1.0), fishopt.Categorical()
CLASSES = 10


@dataclass(frozen=True)
class Plan:
    """What is measured: sizes around ``base`` in each direction, ``networks`` at each; ``draws`` of the process."""

    base: Sizes
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    inputs: tuple[int, ...]
    networks: int
    draws: int

    def sweeps(self) -> dict[str, list[Sizes]]:
        """The sizes of each direction."""
        values = {"width": self.widths, "depth": self.depths, "inputs": self.inputs}
        wide = replace(self.base, width=self.widths[-1])
        start = {"width": wide, "depth": self.base, "inputs": self.base}
        return {key: [replace(start[key], **{key: value}) for value in found] for key, found in values.items()}


FULL = Plan(Sizes(width=300), (75, 150, 300, 600), (2, 3, 4, 6, 8), (5, 10, 20, 40, 80), networks=40, draws=200)
QUICK = Plan(Sizes(width=60), (25, 60, 150), (2, 3), (5, 20), networks=12, draws=40)


@dataclass(frozen=True)
class Measured:
    """One kind of network.

    Attributes:
        linear: For each size `STATISTICS` and the mean of the C largest eigenvalues, ``[networks, 4]``.
        softmax: For each size the largest eigenvalue and its limit with the same outputs, ``[networks, 2]``.
        process: That limit over alpha M, with outputs of the Gaussian process: ``[draws]``.
        example: All eigenvalues of the last of the softmax networks, and their limit: ``[2, N C]``.
    """

    linear: dict[Sizes, Any]
    softmax: dict[Sizes, Any]
    process: Any
    example: Any


def linear_statistics(ensemble: Ensemble, sizes: Sizes, generator: torch.Generator) -> list[float]:
    """`STATISTICS` and the mean of the C largest eigenvalues of one network; what its spectrum leaves out is zero."""
    found = spectrum(*network(ensemble, sizes, generator), GAUSSIAN)
    moments = found.trace / found.parameters, float(found.eigenvalues.square().sum()) / found.parameters
    return [*moments, found.largest, float(found.eigenvalues[: sizes.outputs].mean())]


def softmax_pair(ensemble: Ensemble, sizes: Sizes, generator: torch.Generator) -> Any:
    """One network's eigenvalues with softmax outputs, descending, zeros too, and their limit: ``[2, N C]``."""
    model, x = network(ensemble, sizes, generator)
    with torch.no_grad():
        limit = softmax_eigenvalues(order_parameters(ensemble, sizes.depth), sizes, model(x))
    return torch.stack([torch.linalg.eigvalsh(fisher_gram(model, x, CATEGORICAL)).flip(0), limit]).numpy()


def measure(ensemble: Ensemble, plan: Plan, generator: torch.Generator) -> Measured:
    """Everything about one kind of network but its training."""
    linear, softmax = {}, {}
    example = None
    sizes_of = [sizes for row in plan.sweeps().values() for sizes in row]
    for sizes in tqdm(dict.fromkeys(sizes_of), desc=ensemble.name, unit="size"):
        linear[sizes] = np.array([linear_statistics(ensemble, sizes, generator) for _ in range(plan.networks)])
    for row in tqdm(plan.sweeps()["width"], desc=f"{ensemble.name}, softmax", unit="size"):
        sizes = replace(row, outputs=CLASSES)
        pairs = [softmax_pair(ensemble, sizes, generator) for _ in range(plan.networks)]
        softmax[sizes], example = np.array([pair[:, 0] for pair in pairs]), pairs[-1]
    order = order_parameters(ensemble, sizes.depth)
    draws = [limiting_outputs(order, sizes, generator) for _ in range(plan.draws)]
    process = [float(softmax_eigenvalues(order, sizes, outputs)[0]) / sizes.scale for outputs in draws]
    return Measured(linear, softmax, np.array(process), example)


def quantile(count: int) -> float:
    """Half the `LEVEL` interval of a mean of ``count`` values, in standard errors."""
    return float(student.ppf((1 + LEVEL) / 2, count - 1))


def chance(values: Any, others: float = math.inf) -> float:
    """Half the interval of a mean's difference: from a constant, or from a mean of ``others`` such values."""
    return float(quantile(len(values)) * values.std(ddof=1) * math.sqrt(1 / len(values) + 1 / others))


def line(x: Any, values: Any, logarithm: bool = False) -> tuple[Any, Any]:
    """The line through means of ``[points, networks]``, or their logarithms: slope and intercept, and half intervals.

    Points weigh by their standard errors, from the spread of each.
    """
    count = values.shape[1]
    mean, error = values.mean(1), values.std(1, ddof=1) / math.sqrt(count)
    y, weights = (np.log(mean), mean / error) if logarithm else (mean, 1 / error)
    found, covariance = np.polyfit(x, y, 1, w=weights, cov="unscaled")
    return found, quantile(count) * np.sqrt(covariance.diagonal())


def theory_checks(ensemble: Ensemble) -> list[Check]:
    """The reference's theory by its own quadrature, to half a unit of its last digit."""
    crude = order_parameters(ensemble, Sizes().depth, quadrature(ensemble.phi, ensemble.derivative, REFERENCE_NODES))
    found = []
    for name, text, got in zip(STATISTICS, REFERENCE[ensemble][0], statistics(crude, Sizes()), strict=True):
        half = 0.5 * 10.0 ** int(Decimal(text).as_tuple().exponent)
        found.append(Check(f"{ensemble.name}: {name}, theory by 60 nodes", float(text), got, half / float(text)))
    return found


def linear_checks(ensemble: Ensemble, found: Measured, row: Sequence[Sizes]) -> list[Check]:
    """Linear outputs: over theory, for M -> infinity; and at the reference's sizes against its measurement."""
    widths = np.array([sizes.width for sizes in row])
    values = np.array([found.linear[sizes] for sizes in row])  # [widths, networks, 4]
    order = order_parameters(ensemble, row[0].depth)
    theory = np.array([statistics(order, sizes) for sizes in row])[:, None]
    ratios = {name: values[:, :, j] / theory[:, :, j] for j, name in enumerate(STATISTICS[:2])}
    ratios["mean of C largest"] = values[:, :, 3] / theory[:, :, 2]
    checks = []
    for name, ratio in ratios.items():
        fitted, half = line(1 / widths, ratio)
        checks.append(Check(f"{ensemble.name}: {name} over theory, 1/M -> 0", 1.0, fitted[1], half[1]))
    excess, half = line(np.log(widths), values[:, :, 2] / values[:, :, 3] - 1, logarithm=True)
    checks.append(Check(f"{ensemble.name}: power of M in the excess", -0.5, excess[0], half[0] / 0.5))
    if row[-1] == Sizes():
        for name, known, value in zip(STATISTICS, REFERENCE[ensemble][1], values[-1].T[:3], strict=True):
            tolerance = chance(value, REFERENCE_NETWORKS) / known
            checks.append(Check(f"{ensemble.name}: {name}, the reference's networks", known, value.mean(), tolerance))
    return checks


def softmax_checks(ensemble: Ensemble, found: Measured) -> list[Check]:
    """The largest eigenvalue with softmax outputs, for M -> infinity."""
    scale = np.array([sizes.scale for sizes in found.softmax])[:, None]
    inverse = np.array([1 / sizes.width for sizes in found.softmax])
    values = np.array(list(found.softmax.values()))  # [widths, networks, 2]
    given, half_given = line(inverse, values[:, :, 0] / values[:, :, 1])
    drawn, half_drawn = line(inverse, values[:, :, 0] / scale)
    expected = found.process.mean()
    # The process's mean is itself of a sample; both spreads count.
    tolerance = math.hypot(half_drawn[1], chance(found.process)) / expected
    start = f"{ensemble.name}: softmax, C = {CLASSES}: largest"
    return [
        Check(f"{start} over its limit, same outputs, 1/M -> 0", 1.0, given[1], half_given[1]),
        Check(f"{start} / (alpha M), 1/M -> 0, by the process", expected, drawn[1], tolerance),
    ]


def draw(found: dict[Ensemble, Measured], descents: dict[Ensemble, Descent], plan: Plan, path: Path) -> None:
    """Statistics over sizes in three rows; below them softmax outputs and descent."""
    figure = Figure(figsize=(12, 13), layout="constrained")
    axes = figure.subplots(4, 3)
    for column, (key, row) in enumerate(plan.sweeps().items()):
        for j, name in enumerate(STATISTICS):
            draw_sweep(axes[j, column], j, key, row, {e: m.linear for e, m in found.items()})
            axes[j, column].set_ylabel(name if column == 0 else "")
    draw_softmax(axes[3, 0], found)
    draw_example(axes[3, 1], found)
    draw_descent(axes[3, 2], TANH, descents[TANH])
    axes[0, 0].legend(frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3, linewidth=0.5)
    figure.suptitle("Fisher matrices of random networks: lines are the limit of infinite width, dots are means with SD")
    figure.savefig(path, dpi=85)


def draw_sweep(axis: Any, j: int, key: str, row: Sequence[Sizes], found: dict[Ensemble, dict[Sizes, Any]]) -> None:
    """One statistic in one direction."""
    x = [getattr(sizes, key) for sizes in row]
    fine = np.unique(np.geomspace(x[0], x[-1], 60).round().astype(int)).tolist()
    for ensemble, colour in ENSEMBLES.items():
        limit = [replace(row[0], **{key: value}) for value in fine]
        theory = [statistics(order_parameters(ensemble, sizes.depth), sizes)[j] for sizes in limit]
        axis.plot(fine, theory, color=colour, linewidth=1.2)
        values = np.array([found[ensemble][sizes][:, j] for sizes in row])
        style = {"color": colour, "fmt": "o", "markersize": 4, "capsize": 2, "label": ensemble.name}
        axis.errorbar(x, values.mean(1), values.std(1, ddof=1), **style)
    fixed = {"width": "M", "depth": "L", "inputs": "N"}
    label = ", ".join(f"{letter} = {getattr(row[0], other)}" for other, letter in fixed.items() if other != key)
    axis.set(xscale="linear" if key == "depth" else "log", yscale="log")
    axis.set_xlabel(f"{key} {fixed[key]}  ({label}, C = {row[0].outputs})")
    axis.set_xticks(x, labels=[str(value) for value in x])
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def draw_softmax(axis: Any, found: dict[Ensemble, Measured]) -> None:
    """The largest eigenvalue with softmax outputs over the width, and the middle nine tenths of the process's."""
    for ensemble, measured in found.items():
        colour = ENSEMBLES[ensemble]
        widths = [sizes.width for sizes in measured.softmax]
        scaled = np.array([values[:, 0] / sizes.scale for sizes, values in measured.softmax.items()])
        axis.errorbar(widths, scaled.mean(1), scaled.std(1, ddof=1), color=colour, fmt="o", markersize=4, capsize=2)
        axis.axhline(measured.process.mean(), color=colour, linewidth=1.2)
        axis.axhspan(*np.quantile(measured.process, (0.05, 0.95)), color=colour, alpha=0.12, linewidth=0)
    axis.set(xscale="log", xlabel="width M", ylabel="largest eigenvalue / ($\\alpha$ M)", ylim=(0, None))
    axis.set_xticks(widths, labels=[str(width) for width in widths])
    axis.minorticks_off()
    axis.set_title(f"softmax, C = {CLASSES}\n(band: 90 % of the limiting process)")


def draw_example(axis: Any, found: dict[Ensemble, Measured]) -> None:
    """All eigenvalues of one softmax network, and their limit."""
    for ensemble, measured in found.items():
        values, limit = measured.example
        rank = np.arange(1, len(values) + 1)
        # One eigenvalue for each input is zero: its outputs add to one.
        kept = limit > 1e-9 * limit[0]
        axis.plot(rank[kept], limit[kept], color=ENSEMBLES[ensemble], linewidth=1.2, label=ensemble.name)
        axis.plot(rank[kept], values[kept], ".", color=ENSEMBLES[ensemble], markersize=4)
    axis.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue")
    axis.set_title("softmax, one network of each kind\n(limit with the network's outputs)")
    axis.legend(frameon=False)


def report(ensemble: Ensemble, found: Measured, descent: Descent, row: Sequence[Sizes]) -> None:
    """What no check is about: the largest eigenvalue's excess, and where descent beyond the bound ends."""
    theory = statistics(order_parameters(ensemble, row[-1].depth), row[-1])[2]
    ratio = found.linear[row[-1]][:, 2] / theory
    error = ratio.std(ddof=1) / math.sqrt(len(ratio))
    print(f"{ensemble.name}: largest eigenvalue over theory at M = {row[-1].width}: {ratio.mean():.3f} +- {error:.3f}")
    for multiple, curve in descent.far.items():
        print(
            f"  independent start, rate {multiple} x 2/lambda_max: loss {curve[0]:.2g}, at most {max(curve):.2g}, "
            f"at last {curve[-1]:.1e}, where lambda_max is {descent.settled[multiple]:.2f} x 2/rate"
        )


def main(arguments: list[str] | None = None) -> None:
    """Measures, checks, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="narrow networks, few of them")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else FULL
    options.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(options.seed)
    found = {ensemble: measure(ensemble, plan, generator) for ensemble in ENSEMBLES}
    descents = {ensemble: descend(ensemble, plan.base, generator) for ensemble in ENSEMBLES}
    row = plan.sweeps()["width"]
    show("Reference theory", [check for ensemble in ENSEMBLES for check in theory_checks(ensemble)])
    show("Linear outputs", [check for e, m in found.items() for check in linear_checks(e, m, row)])
    show("Softmax outputs", [check for e, m in found.items() for check in softmax_checks(e, m)])
    show("Learning rate", [check for e, d in descents.items() for check in descent_checks(e, d)])
    for ensemble in ENSEMBLES:
        report(ensemble, found[ensemble], descents[ensemble], row)
    path = options.out / "wide_networks.png"
    draw(found, descents, plan, path)
    print(f"picture: {path.resolve()}")


if __name__ == "__main__":
    main()
