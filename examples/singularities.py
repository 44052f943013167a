"""Singular models: where gradient descent stalls, what the natural gradient does there, and what its diagonal does.

After Amari, Park & Ozeki, "Singularities affect dynamics of learning in neuromanifolds", Neural Computation 18 (2006);
the settings are ours. Two models with a truth inside them, population losses, no noise. Network: inputs x ~ N(0, I) and

    y = w_1 g(J_1 x) + w_2 g(J_2 x) + N(0, 1),   g(a) = erf(a / sqrt 2),
    K(theta, theta') = E[f f'] = sum_ij w_i w_j' (2/pi) asin( J_i J_j' / sqrt((1 + |J_i|^2) (1 + |J_j'|^2)) ),
    F = d_theta d_theta' K at theta' = theta,   loss = (K(theta, theta) - 2 K(theta, truth) + K(truth, truth)) / 2.

Mixture: p(y) = v N(y; mu_1, 1) + (1 - v) N(y; mu_2, 1) in theta = (logit v, mu_1, mu_2), loss = KL(truth || p), both
it and F by the trapezoidal rule, exact to rounding here.

Let u be the difference of the units or means, c = v (1 - v); for the network, w = w_1 + w_2, v = w_1 / w. For small u

    f = w [ g(Jx) + c/2 g''(Jx) (ux)^2 + c (1 - 2v)/6 g'''(Jx) (ux)^3 + ... ],   J = v J_1 + (1 - v) J_2, u = J_1 - J_2,

and p likewise, with derivatives of the normal density. The derivative by u is O(|u|): as many eigenvalues of F as u has
entries fall as |u|^2. The derivative by v is O(|u|^2), but to that order it is one by u as well; O(|u|^3) is left: the
smallest eigenvalue falls as |u|^6. For the mixture, det F -> c^4 u^8 / 12. With w_2 -> 0 the eigenvalues fall as w_2^2.

Starts are near the plateau, the best single unit or normal density: u (or w_2) is small, of random direction, v random.
At equal units or means the gradient vanishes with u, wherever v is. The plateau's height is the loss there; it has been
left once the loss is below a tenth of that and stays there to the end of the run. It is a saddle for v in (0, 1). Where
w_2 < 0 it can attract: near a zero output weight single starts may stay for ever, under the full method too.
Steps are

    theta <- theta - lr g,   theta - lr g / (diag F + damping),   theta - lr (F + damping)^-1 g.

Where units or means are equal, no diagonal entry of F for J_i or mu_i is small: the diagonal in theta does not see the
singularity. It does in centred coordinates, (w, 2v - 1, J, u) and (logit v, mean, u), so the diagonal, and for fairness
the gradient, are run in these too. Each method has the best step size of one grid: the least mean number of steps over
the starts, never leaving counted as all of them. Medians are lower medians. Writes out/singularities.png.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checks import Check, show
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from singular_models import EQUAL, MIXTURE, PROBLEMS, Problem, eigenvalues, model_checks, plateau, starts
from torch import Tensor
from torch.func import grad_and_value, jacfwd, vmap
from tqdm import tqdm

LRS = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
DAMPINGS = torch.tensor([1e-6, 1e-4, 1e-2, 1e-1], dtype=torch.float64)
COMPARED = 2
"""Which of the dampings is in the comparison and the pictures."""
FAR = 1e3
"""A run with a parameter of this size is lost."""
DISTANCE = 0.01
"""Of the starts from the singular set."""
METHODS = {
    "gradient": ("gradient", False),
    "gradient, centred": ("gradient", True),
    "diagonal": ("diagonal", False),
    "diagonal, centred": ("diagonal", True),
    "full": ("full", False),
}
COLOURS = dict(zip(METHODS, ("#8c8c8c", "#c9b27c", "#4c72b0", "#55a868", "#c44e52"), strict=True))
FACTOR = 2.0
"""By which the full natural gradient is to leave sooner than the gradient, in the median."""
SHOWN = ("gradient", "diagonal", "diagonal, centred", "full")


Found = dict[str, dict[str, Tensor]]
"""Problem -> method -> steps to leave ``[D, L, R]``: dampings, step sizes, starts."""


Traces = dict[str, tuple[Tensor, Tensor]]
"""Method -> theta and loss at each step: ``[S + 1, R, P]``, ``[S + 1, R]``."""


@dataclass(frozen=True)
class Settings:
    """How much is run: seed, starts, steps at most, and steps in the pictures."""

    seed: int
    starts: int
    steps: int
    shown: int


def steps_of(problem: Problem, method: str, point: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Directions and losses at N points in the method's coordinates, ``[N, P]`` and ``[N]``; damping ``[N]``."""
    rule, centred = METHODS[method]

    def loss(x: Tensor) -> Tensor:
        return problem.loss(problem.centred(x) if centred else x)

    def metric(x: Tensor) -> Tensor:
        if not centred:
            return problem.metric(x)
        jacobian = jacfwd(problem.centred)(x)
        return jacobian.T @ problem.metric(problem.centred(x)) @ jacobian

    gradient, value = vmap(grad_and_value(loss))(point)
    if rule == "gradient":
        return gradient, value
    fisher = vmap(metric)(point)
    if rule == "diagonal":
        return gradient / (fisher.diagonal(dim1=1, dim2=2) + damping[:, None]), value
    damped = fisher + damping[:, None, None] * torch.eye(point.shape[1], dtype=point.dtype)
    # No error where that is singular: such a run is lost, and counted so.
    return torch.linalg.solve_ex(damped, gradient)[0], value


def in_coordinates(problem: Problem, method: str, start: Tensor) -> Tensor:
    """The starts in the coordinates in which the method works."""
    return start if METHODS[method][1] else vmap(problem.centred)(start)


def leave(problem: Problem, method: str, start: Tensor, lr: Tensor, damping: Tensor, steps: int) -> Tensor:
    """Steps until the plateau is left for good, for N starts: ``[N]``, infinite where that never is."""
    point, active, below = in_coordinates(problem, method, start), torch.arange(len(start)), plateau(problem)[1] / 10
    found = torch.zeros(len(start), dtype=torch.float64)
    for step in range(steps + 1):
        direction, loss = steps_of(problem, method, point, damping[active])
        found[active[~(loss < below)]] = step + 1
        point = point - lr[active, None] * direction
        # What is far away does not come back.
        going = loss.isfinite() & (point.abs() < FAR).all(1)
        found[active[~going]] = math.inf
        point, active = point[going], active[going]
        if not len(active):
            break
    return found.masked_fill(found > steps, math.inf)


def sweep(problem: Problem, method: str, start: Tensor, steps: int) -> Tensor:
    """Steps to leave for each damping, step size and start: ``[D, L, R]``; one damping, idle, for the gradient."""
    dampings = DAMPINGS[:1] if METHODS[method][0] == "gradient" else DAMPINGS
    index = [torch.arange(n) for n in (len(dampings), len(LRS), len(start))]
    d, size, s = (i.flatten() for i in torch.meshgrid(*index, indexing="ij"))
    found = leave(problem, method, start[s], LRS[size], dampings[d], steps)
    return found.reshape(len(dampings), len(LRS), len(start))


def best(found: Tensor, steps: int) -> Tensor:
    """For each damping the step size of the least mean, never leaving counted as all steps: index ``[D]``."""
    return found.clamp_max(steps).mean(2).argmin(1)


def trace(problem: Problem, method: str, start: Tensor, lr: float, steps: int) -> tuple[Tensor, Tensor]:
    """theta and the loss at each step, with the compared damping: ``[S + 1, R, P]`` and ``[S + 1, R]``."""
    point, points, losses = in_coordinates(problem, method, start), [], []
    damping = DAMPINGS[COMPARED].expand(len(start))
    for _ in range(steps + 1):
        direction, loss = steps_of(problem, method, point, damping)
        points.append(vmap(problem.centred)(point) if METHODS[method][1] else point)
        losses.append(loss)
        point = point - lr * direction
    return torch.stack(points), torch.stack(losses)


def leaving_checks(found: Found, steps: int) -> list[Check]:
    """That the full natural gradient leaves saddles, and how much sooner than the gradient it leaves all plateaus."""
    checks = []
    for problem in PROBLEMS:
        gradient, full = (chosen(found[problem.name][name], steps)[1] for name in ("gradient", "full"))
        ratio = float(gradient.clamp_max(steps).median() / full.clamp_max(steps).median())
        checks.append(Check(f"{problem.name}: median steps, gradient over full", FACTOR, ratio, 0, ">="))
        if problem.saddle:
            left = int(full.isfinite().sum())
            checks.append(Check(f"{problem.name}: starts that the full natural gradient leaves", len(full), left))
    return checks


def chosen(found: Tensor, steps: int) -> tuple[float, Tensor]:
    """At the compared damping the best step size, and its steps for each start ``[R]``."""
    row = COMPARED if len(found) > 1 else 0
    index = int(best(found, steps)[row])
    return float(LRS[index]), found[row, index]


def tabled(found: Found, steps: int) -> Table:
    """The whole grid: mean steps for each step size, and what the best one does."""
    table = Table(title=f"Mean steps to leave the plateau, by step size; {steps} = never", row_styles=["", "dim"])
    for heading in ("start", "method", "damping", *(f"lr {lr:g}" for lr in LRS), "best", "median", "slowest", "left"):
        table.add_column(heading, justify="left" if heading in ("start", "method") else "right")
    for problem, methods in found.items():
        for name, tensor in methods.items():
            for rows, damping, index in zip(tensor, DAMPINGS.tolist(), best(tensor, steps).tolist(), strict=False):
                means = [f"{mean:.0f}" for mean in rows.clamp_max(steps).mean(1)]
                one = rows[index]
                left = f"{int(one.isfinite().sum())}/{len(one)}"
                summary = [f"lr {LRS[index]:g}", f"{one.median():.0f}", f"{one.max():.0f}", left]
                table.add_row(problem, name, "" if len(tensor) == 1 else f"{damping:g}", *means, *summary)
        table.add_section()
    return table


def draw(found: Found, options: Settings, path: Path) -> None:
    """Losses by step, eigenvalues, ways through the parameters, and steps by the start's distance."""
    figure = Figure(figsize=(17, 8), layout="constrained")
    (*losses, by_distance), (units, means, smallest, falling) = figure.subplots(2, 4)
    traces: dict[str, Traces] = {}
    for axis, problem in zip(losses, PROBLEMS, strict=True):
        start = starts(problem, options.seed, options.starts, DISTANCE)
        sizes = {name: chosen(found[problem.name][name], options.steps)[0] for name in SHOWN}
        traces[problem.name] = {name: trace(problem, name, start, lr, options.shown) for name, lr in sizes.items()}
        draw_losses(axis, problem, found[problem.name], traces[problem.name], options)
    draw_distances(by_distance, found[EQUAL.name], options)
    draw_way(units, EQUAL, traces[EQUAL.name], ("v = w1 / (w1 + w2)", "|J1 - J2|"))
    draw_way(means, MIXTURE, traces[MIXTURE.name], ("v", "|mu1 - mu2|"))
    draw_eigenvalue(smallest, EQUAL, traces[EQUAL.name])
    draw_powers(falling, options.seed)
    for axis in figure.axes:
        axis.grid(alpha=0.3, linewidth=0.5)
    figure.suptitle(
        f"Near singular sets: each method at its best step size; damping {DAMPINGS[COMPARED]:g}; "
        f"starts at distance {DISTANCE:g}"
    )
    figure.savefig(path, dpi=72)


def draw_losses(axis: Any, problem: Problem, found: dict[str, Tensor], traces: Traces, options: Settings) -> None:
    """All starts, the one of median steps in bold."""
    floor = plateau(problem)[1]
    for name in SHOWN:
        lr, steps = chosen(found[name], options.steps)
        scaled = traces[name][1] / floor
        middle = int(steps.argsort()[(len(steps) - 1) // 2])
        axis.plot(scaled, color=COLOURS[name], linewidth=0.5, alpha=0.4)
        label = f"{name}, lr {lr:g}: {steps.median():.0f} steps"
        axis.plot(scaled[:, middle], color=COLOURS[name], linewidth=2, label=label)
    axis.axhline(0.1, color="0.2", linewidth=0.8, linestyle=":")
    axis.set(yscale="log", ylim=(1e-3, 3e4), xlim=(1, options.shown), xscale="log", title=f"near {problem.name}")
    axis.set(xlabel="step", ylabel="loss / plateau height")
    axis.legend(frameon=False, fontsize=8, loc="upper right")


def draw_way(axis: Any, problem: Problem, traces: Traces, labels: tuple[str, str]) -> None:
    """Of a few starts, until they are out."""
    for name in SHOWN:
        points = traces[name][0]
        for start in range(3):
            way = vmap(problem.plane)(points[:, start])
            axis.plot(*way.T, color=COLOURS[name], linewidth=1, marker=".", markersize=3, alpha=0.8)
        axis.plot([], [], color=COLOURS[name], label=name)
    axis.plot(*problem.plane(problem.truth), marker="*", color="0.1", markersize=11, linestyle="", label="truth")
    axis.set(
        yscale="log",
        xlim=(0.2, 0.9),
        xlabel=labels[0],
        ylabel=labels[1],
        title=f"near {problem.name}: paths of 3 starts",
    )
    axis.legend(frameon=False, fontsize=8)


def draw_eigenvalue(axis: Any, problem: Problem, traces: Traces) -> None:
    """The smallest eigenvalue of F along the way, median over starts."""
    for name in SHOWN:
        points = traces[name][0]
        smallest = torch.linalg.eigvalsh(vmap(vmap(problem.metric))(points))[..., 0]
        # Below this they are rounding.
        axis.plot(smallest.median(1).values.clamp_min(1e-15), color=COLOURS[name], label=name)
    axis.set(xscale="log", yscale="log", xlim=(1, len(points) - 1), xlabel="step")
    axis.set(ylabel="smallest eigenvalue of F", title=f"near {problem.name}: median of starts")
    axis.legend(frameon=False, fontsize=8)


def draw_powers(axis: Any, seed: int) -> None:
    """The smallest eigenvalue against the distance from the singular set."""
    distances = torch.logspace(-1.7, 0, 18, dtype=torch.float64)
    for problem, colour in zip(PROBLEMS, ("#4c72b0", "#dd8452", "#55a868"), strict=True):
        smallest = eigenvalues(problem, seed, distances)[:, 0]
        label = f"{problem.name}: power {problem.power}"
        axis.plot(distances, smallest, color=colour, marker=".", label=label)
        axis.plot(distances, smallest[0] * (distances / distances[0]) ** problem.power, color=colour, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="distance from the singular set")
    axis.set(ylabel="smallest eigenvalue of F", title="how F degenerates; dotted: power law")
    axis.legend(frameon=False, fontsize=8)


def draw_distances(axis: Any, found: dict[str, Tensor], options: Settings) -> None:
    """Median steps to leave, by the distance of the starts, the step size as it is."""
    distances = (1e-4, 1e-3, 1e-2, 1e-1)
    points = torch.cat([starts(EQUAL, options.seed, options.starts, d) for d in distances])
    for name in SHOWN:
        lr, damping = torch.full((len(points),), chosen(found[name], options.steps)[0]), DAMPINGS[COMPARED]
        steps = leave(EQUAL, name, points, lr, damping.expand(len(points)), options.steps)
        axis.plot(distances, steps.reshape(len(distances), -1).median(1).values, ".-", color=COLOURS[name], label=name)
    axis.set(xscale="log", xlabel="|J1 - J2| of the starts", ylabel="steps to leave, median of starts")
    axis.set(title=f"near {EQUAL.name}", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)


def main(arguments: list[str] | None = None) -> None:
    """Runs, checks, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="3 starts, 30 steps")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    options = Settings(given.seed, 3, 30, 15) if given.quick else Settings(given.seed, 8, 300, 300)
    torch.set_num_threads(1)  # the matrices are tiny

    found: Found = {problem.name: {} for problem in PROBLEMS}
    with tqdm(total=len(PROBLEMS) * len(METHODS), unit="sweep") as bar:
        for problem in PROBLEMS:
            start = starts(problem, options.seed, options.starts, DISTANCE)
            for name in METHODS:
                found[problem.name][name] = sweep(problem, name, start, options.steps)
                bar.update()
    Console(width=150).print(tabled(found, options.steps))
    checks = model_checks(options.seed, 20 if given.quick else 100)
    show("Singular models", [*checks, *leaving_checks(found, options.steps)])
    path = given.out / "singularities.png"
    draw(found, options, path)
    print(f"picture: {path.resolve()}")


if __name__ == "__main__":
    main()
