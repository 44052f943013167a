"""Optimal design for a population PK model: when should blood be sampled?

Leonov & Aliev (Optimal design for population PK/PD models, Tatra Mt. Math. Publ. 51, 2012) describe PkStaMp, which
chooses sampling times by the Fisher information of a user-defined response; population_fisher.py has that information,
with its formulas. The model is the warfarin example of warfarin.py.

First, PopED's published numbers. The reduced information agrees with them in all printed digits. So does the full one
if it is computed as PopED does, by differences of differences with a step of 1e-5; with exact derivatives, or with the
same differences in 40 digits, it is another one from the sixth or seventh digit on: the published ones end in rounding
errors. The full information is then found once more, from simulated scores.

Second, designs. Samples of a subject are correlated, so that information adds up over subjects, not over times: a
candidate is a set of n times from a grid, a design the share of the subjects for each set. The D-optimal one is found
by Fedorov's and Wynn's first-order exchange over all sets, and certified by the sensitivity function
(design_exchange.py). Errors are proportional and additive here, as in PopED's own optimisation of this example:
proportional ones alone make vanishing concentrations as informative as any.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checks import Check, show
from design_exchange import Search, efficiency, exchange_times, search, sensitivity
from matplotlib.figure import Figure
from population_fisher import linearise, relative_errors
from rich.console import Console
from rich.table import Table
from scipy.stats import norm
from torch import Tensor
from warfarin import NAMES, SUBJECTS, TIMES, against_published, against_scores, concentration, population, vector

GRID = (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10, 12, 18, 24, 30, 36, 48, 60, 72, 96, 120)
QUICK_GRID = (0.25, 0.5, 1, 2, 4, 6, 12, 24, 36, 72, 120)
COLOURS = {"published": "#8c8c8c", "D-optimal": "#c44e52"}


@dataclass(frozen=True)
class Designs:
    """Designs on one grid, with combined errors.

    Attributes:
        grid: Times to choose from (h): ``[G]``.
        published: The published times' places in it.
        reduced: D-optimal by the reduced information, as many samples as published.
        full: The same by the full information.
        sparse: By the reduced information, three samples for each subject.
    """

    grid: Tensor
    published: Tensor
    reduced: Search
    full: Search
    sparse: Search


def designs(times: tuple[float, ...]) -> Designs:
    """All designs that are shown."""
    grid, model = vector(times), population("combined")
    published = torch.tensor([times.index(t) for t in TIMES])
    reduced, full = (linearise(model, grid, reduced=r) for r in (True, False))
    searches = (search(reduced, len(TIMES), published), search(full, len(TIMES), published), search(reduced, 3))
    return Designs(grid, published, *searches)


def certified(title: str, found: Search) -> list[Check]:
    """The equivalence theorem, and brute force over all single sets."""
    design, p = found.design, len(found.design.information)
    best = found.information[found.best]
    highest, lowest = (float(v) for v in (design.sensitivity.max(), design.sensitivity[found.used].min()))
    return [
        Check(f"{title}: largest sensitivity of {len(found.sets):,} sets", p, highest, 1e-8, "<="),
        Check(f"{title}: smallest sensitivity of sets in use", p, lowest, 1e-6, ">="),
        Check(f"{title}: D-efficiency of the best single set", 1, efficiency(best, design.information), 1e-8, "<="),
    ]


def against_brute_force(title: str, found: Search, published: Tensor) -> list[Check]:
    """One set for all by swapping times, and what the published times' own sensitivity says of their efficiency."""
    sets = torch.stack([exchange_times(found.linear, published), published])
    swapped, before = found.linear.information(sets)
    by_swaps = efficiency(swapped, found.information[found.best])
    bound = len(before) / float(sensitivity(found.information, before).max())
    got = efficiency(before, found.design.information)
    return [
        Check(f"{title}: one set by swaps of times, against the best of all", 1, by_swaps, 1e-12),
        Check(f"{title}: D-efficiency of the published times, and its bound", bound, got, 0, ">="),
    ]


def described(found: Designs) -> Table:
    """All designs, for people."""
    table = Table(title="sampling times; D-efficiency is per subject, however many samples")
    for heading in ("design", "share of subjects", "times (h)", "D-efficiency: reduced", "full"):
        table.add_column(heading)
    for name, sets, weights in rows(found):
        parts = (s.linear.information(sets) for s in (found.reduced, found.full))
        means = [torch.einsum("k,kij->ij", weights, part) for part in parts]
        best = (found.reduced.design.information, found.full.design.information)
        shares = [f"{efficiency(mean, of):.4f}" for mean, of in zip(means, best, strict=True)]
        for i, (chosen, weight) in enumerate(zip(sets, weights, strict=True)):
            times = " ".join(f"{t:g}" for t in found.grid[chosen])
            table.add_row(*([name], [""])[i > 0], f"{100 * weight:.2f}%", times, *(shares, ["", ""])[i > 0])
    return table


def rows(found: Designs) -> list[tuple[str, Tensor, Tensor]]:
    """Name, sets and their shares of each design."""
    named = {"D-optimal, reduced": found.reduced, "D-optimal, full": found.full, "3 samples, reduced": found.sparse}
    return [
        ("published", found.published[None], torch.ones(1, dtype=torch.float64)),
        *((name, s.sets[s.used], s.design.weights[s.used]) for name, s in named.items()),
    ]


def draw(found: Designs, seed: int, path: Path) -> None:
    """Response over designs on the left, sensitivity over standard errors on the right."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    (curves, certificate), (times, errors) = figure.subplots(2, 2)
    draw_response(curves, seed)
    draw_times(times, found)
    draw_sensitivity(certificate, found)
    draw_errors(errors, found)
    ticks = (0.25, 0.5, 1, 2, 4, 8, 24, 48, 120)
    for axis in (curves, times, certificate):
        axis.set(xscale="log", xlim=(0.2, 150), xlabel="time after the dose (h)")
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_xticks([], minor=True)
    places = {curves: (0.34, 0.02), certificate: "center right", errors: "upper left"}
    for axis, place in places.items():
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.legend(frameon=False, fontsize=9, loc=place)
    figure.savefig(path, dpi=110)


def draw_response(axis: Any, seed: int) -> None:
    """The typical subject, subjects drawn from the nonlinear model, and the normal model that stands for them."""
    model, generator = population("combined"), torch.Generator().manual_seed(seed)
    t = torch.logspace(math.log10(0.2), math.log10(150), 200, dtype=torch.float64)
    normal = torch.randn(4000, len(model.fixed), generator=generator, dtype=torch.float64)
    subjects = model.fixed * (normal * model.omega.sqrt()).exp()
    low, high = torch.vmap(lambda g: concentration(t, g))(subjects).quantile(vector((0.05, 0.95)), dim=0)
    mean, slope = concentration(t, model.fixed), torch.func.jacfwd(lambda b: concentration(t, model.fixed * b.exp()))
    spread = float(norm.isf(0.05)) * (slope(torch.zeros_like(model.fixed)).square() @ model.omega).sqrt()
    axis.fill_between(t, low, high, color="#4c72b0", alpha=0.2, linewidth=0, label="subjects, 5 to 95%")
    axis.plot(t, mean, color="#4c72b0", linewidth=1.8, label="typical subject")
    axis.plot(t, mean - spread, color="0.3", linewidth=0.9, linestyle="--", label="to first order, 5 and 95%")
    axis.plot(t, mean + spread, color="0.3", linewidth=0.9, linestyle="--")
    axis.set(title="Response, without errors of measurement", ylabel="concentration (mg/L)", ylim=(0, None))


def draw_times(axis: Any, found: Designs) -> None:
    """Each set of times in a row, the area of its dots in proportion to its share of the subjects."""
    labels: list[str] = []
    for name, sets, weights in rows(found):
        for chosen, weight in zip(sets, weights, strict=True):
            colour = COLOURS["published" if name == "published" else "D-optimal"]
            t, height = found.grid[chosen], torch.full(chosen.shape, -float(len(labels)))
            axis.scatter(t, height, s=8 + 90 * float(weight), color=colour, zorder=3)
            labels.append(f"{name}: {100 * weight:.1f}%")
    axis.set_yticks([-i for i in range(len(labels))], labels, fontsize=9)
    axis.set(title="Sampling times, and the share of the subjects for each set")
    axis.grid(axis="y", alpha=0.3, linewidth=0.5)


def draw_sensitivity(axis: Any, found: Designs) -> None:
    """The largest sensitivity of all sets with a time in them: at most p at all times for an optimal design."""
    chosen, grid = found.reduced, found.grid
    p, before = len(chosen.design.information), chosen.linear.information(found.published[None])[0]
    inside = (chosen.sets[:, :, None] == torch.arange(len(grid))).any(1)
    of_published = sensitivity(chosen.information, before)
    for (name, colour), values in zip(COLOURS.items(), (of_published, chosen.design.sensitivity), strict=True):
        highest = torch.where(inside, values[:, None], -math.inf).max(0).values
        axis.plot(grid, highest, marker="o", markersize=4, color=colour, linewidth=1.2, label=f"{name} times")
    used = chosen.sets[chosen.used].unique()
    axis.plot(
        grid[used], torch.full(used.shape, float(p)), "o", markersize=10, mfc="none", mec="0.2", label="times in use"
    )
    axis.axhline(p, color="0.2", linewidth=0.9, linestyle="--", label=f"bound: the {p} parameters")
    axis.set(title="Sensitivity function, by the reduced information", ylabel="largest of all sets with this time")


def draw_errors(axis: Any, found: Designs) -> None:
    """Relative standard errors under both informations, at the published and at the chosen times."""
    theta, places = population("combined").theta, torch.arange(len(NAMES))
    chosen = {"published": rows(found)[0], "D-optimal": rows(found)[1]}
    for k, (source, name) in enumerate((source, name) for source in (found.reduced, found.full) for name in chosen):
        _, sets, weights = chosen[name]
        matrix = SUBJECTS * torch.einsum("k,kij->ij", weights, source.linear.information(sets))
        kind = "reduced" if source is found.reduced else "full"
        look = {"color": COLOURS[name], "hatch": "//" if kind == "full" else None, "edgecolor": "white"}
        heights = relative_errors(matrix, theta).tolist()
        axis.bar((places + 0.2 * (k - 1.5)).tolist(), heights, 0.2, label=f"{kind}, {name} times", **look)
    greek = {"omega2": r"$\omega^2$", "sigma2": r"$\sigma^2$"}
    labels = [" ".join(greek.get(word, word) for word in name.split()) for name in NAMES]
    axis.set_xticks(places, labels)
    axis.set(title=f"Standard errors with {SUBJECTS} subjects", ylabel="relative standard error (%)")


def main(arguments: list[str] | None = None) -> None:
    """Evaluates, chooses, checks, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of simulated observations and subjects")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK_GRID)} times to choose from, fewer scores")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    show(f"{SUBJECTS} subjects at the published times, against PopED", against_published())
    show("information by simulation", against_scores(10_000 if options.quick else 100_000, options.seed))
    found = designs(QUICK_GRID if options.quick else GRID)
    eight = {"reduced": found.reduced, "full": found.full}
    checks = [
        check for name, s in {**eight, "reduced, 3 samples": found.sparse}.items() for check in certified(name, s)
    ]
    checks += [check for name, s in eight.items() for check in against_brute_force(name, s, found.published)]
    show(f"D-optimal designs, {len(found.grid)} times to choose from", checks)
    Console(width=140).print(described(found))
    draw(found, options.seed, options.out / "optimal_design.png")
    print(f"picture: {(options.out / 'optimal_design.png').resolve()}")


if __name__ == "__main__":
    main()
