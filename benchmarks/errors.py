"""The total error of estimates of the Fisher diagonal, per unit of compute: ``python -m benchmarks.errors``.

On MLPs that FisherAdam trains on MNIST (scikit-learn's digits without --data-dir), early in training and late: F, the
exact diagonal over the whole training set, against estimates from a few inputs drawn from it, one label each, over many
repetitions. The error of a layer and the compute of an estimate are

    error = sum_i (Fhat_i - F_i)^2 / sum_i F_i^2 ,    compute = inputs x backward passes.

Of an unbiased estimator the error is A / inputs on average, with A the variance over inputs and labels (Theorem 4.7),
here in closed form over the whole training set (of I2 below a sigmoid, where it is sketched, as measured). So at equal
compute what counts is A x passes. "auto" is what the optimizers' default criterion, "efficiency", picks from 8 inputs,
in many draws: its error at equal compute over the best unbiased estimator's says what the rule loses. Beside it what
the bounds on the same variances (Lemma 4.8, Theorem 4.1) would pick. Writes errors.json and errors.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import fishopt
from benchmarks.data import SOURCES
from benchmarks.models import mlp
from fishopt.likelihoods import unit_columns
from fishopt.passes import Diagonal
from fishopt.plotting import COLOURS as CHOICE_COLOURS

UNBIASED = ("I1", "I2", "exact", "hutchinson")
ESTIMATORS = (*UNBIASED, "empirical")
CANDIDATES = ("I1", "I2", "hutchinson", "exact")
"""What the optimizers choose from by the efficiency rule."""
SELECTION_INPUTS = 8
"""From how many inputs they choose."""
SKETCH = 4
"""Backward passes of a Hessian diagonal, in closed form or sketched."""
ACTIVATIONS = {"ReLU": nn.ReLU, "sigmoid": nn.Sigmoid}
SIZES = (4, 16, 64, 256)
BATCH = 128
LOSS = nn.CrossEntropyLoss()
COLOURS = {**CHOICE_COLOURS, "empirical": "0.6"}
Result = dict[str, Any]
Costs = dict[str, list[int]]
"""Estimator -> backward passes per input, for each layer."""


def measure(data_dir: Path | None, *, seed: int = 0, quick: bool = False) -> Result:
    """Trains both networks, and measures all estimators in each layer at two moments.

    Returns:
        ``networks -> activation -> moment -> layer``, and the settings.
    """
    train = SOURCES["mnist" if data_dir else "digits"](data_dir).train
    widths = (train.inputs.shape[1], *((16, 16, 8) if quick else (256, 256, 128)), 10)
    repetitions = 3 if quick else 30
    moments = {"early": 10, "late": 60} if quick else {"early": 50, "late": 4 * len(train) // BATCH}
    networks: Result = {name: {} for name in ACTIVATIONS}
    with tqdm(total=len(ACTIVATIONS) * len(moments) * repetitions * len(SIZES), unit="estimates") as bar:
        for name, activation in ACTIVATIONS.items():
            torch.manual_seed(seed)
            model = mlp(widths, activation)
            steps = training(model, train.inputs, train.targets)
            done = 0
            for moment, step in moments.items():
                done += sum(1 for _ in itertools.islice(steps, step - done))
                draws = torch.Generator().manual_seed(seed)
                networks[name][moment] = at_moment(model, train.inputs, train.targets, repetitions, draws, bar.update)
    settings = {"data": "mnist" if data_dir else "digits", "widths": widths, "seed": seed, "sizes": SIZES}
    return {"settings": {**settings, "repetitions": repetitions, "steps": moments}, "networks": networks}


def training(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[None]:
    """Trains by FisherAdam at its defaults, a step at a time, without end."""
    optimizer = fishopt.FisherAdam(model, LOSS)
    while True:
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            LOSS(model(x[rows]), y[rows]).backward()
            optimizer.step()
            yield


def at_moment(
    model: nn.Module, x: Tensor, y: Tensor, repetitions: int, draws: torch.Generator, tick: Callable[[], Any]
) -> Result:
    """All estimators' errors, and what "auto" picks, for each layer."""
    exact = by_layer(fishopt.fisher_diagonal(model, x, LOSS, estimator="exact"))
    errors: dict[str, Tensor] = {name: torch.zeros(len(SIZES), repetitions, len(exact)) for name in ESTIMATORS}
    costs = {name: passes(model, name, len(exact), model(x[:1]).shape[1]) for name in ESTIMATORS}
    picks: dict[str, list[list[str]]] = {rule: [] for rule in RULES}
    for repetition in range(repetitions):
        for i, size in enumerate(SIZES):
            rows = torch.randint(len(x), (size,), generator=draws)
            for name in ESTIMATORS:
                targets = y[rows] if name == "empirical" else None
                drawn = fishopt.fisher_diagonal(model, x[rows], LOSS, estimator=name, targets=targets, generator=draws)
                errors[name][i, repetition] = relative_errors(by_layer(drawn), exact)
            tick()
        some = x[torch.randint(len(x), (SELECTION_INPUTS,), generator=draws)]
        for rule, choose in RULES.items():
            picks[rule].append(choose(model, some, costs))
    variances = relative_variances(model, x, exact)
    return {
        layer: summary(
            {name: found[..., j] for name, found in errors.items()},
            {name: float(found[j]) for name, found in variances.items()},
            {name: cost[j] for name, cost in costs.items()},
            {rule: Counter(pick[j] for pick in found) for rule, found in picks.items()},
        )
        for j, layer in enumerate(exact)
    }


def relative_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """Of each layer."""
    return torch.stack([(found[k] - exact[k]).square().sum() / exact[k].square().sum() for k in exact])


def relative_variances(model: nn.Module, x: Tensor, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """A of each layer, over the sum of ``F_i^2``; of I2 where it is the exact value in all layers."""
    squares = torch.stack([value.double().square().sum() for value in exact.values()])
    found = {name: (value - squares) / squares for name, value in second_moments(model, x).items()}
    return found if is_smooth(model) else {**found, "I2": found["exact"]}


def second_moments(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``E_x sum_i E[Ihat_i^2 | x]`` of each layer of a chain, by hand: a layer's sums take no gradient per weight.

    With ``a`` a layer's inputs and ``g`` the derivative of ``<c, h>`` by its outputs, ``q(c)`` is ``g^2 a^2``, and of
    biases ``g^2``, so the sum of its squares over the layer is ``sum g^4 (1 + sum a^4)``.
    """
    linear = [module for module in model if isinstance(module, nn.Linear)]
    total = {name: torch.zeros(len(linear), dtype=torch.float64) for name in ("I1", "exact", "hutchinson")}
    for part in x.split(1000):
        inputs, outputs, h = [], [], part
        for module in model:
            if isinstance(module, nn.Linear):
                inputs.append(h.detach())
            h = module(h)
            if isinstance(module, nn.Linear):
                outputs.append(h)
        units = unit_columns(h.detach())
        each = [torch.autograd.grad(h, outputs, unit, retain_graph=True) for unit in units]
        likelihood, p = fishopt.Categorical(), h.detach().softmax(1)
        columns, scores = likelihood.factor(h.detach()), p - units
        for j, a in enumerate(inputs):
            g = torch.stack([found[j] for found in each])
            weight = 1 + a.double().pow(4).sum(1)
            along, sampled = (torch.einsum("knt,tnd->knd", c, g).double().square() for c in (columns, scores))
            whole, parts = along.sum(0).square().sum(1), along.square().sum((0, 2))
            total["exact"][j] += (whole * weight).sum()
            total["hutchinson"][j] += ((3 * whole - 2 * parts) * weight).sum()
            total["I1"][j] += ((p.T * sampled.square().sum(2)).sum(0) * weight).sum()
    return {name: value / len(x) for name, value in total.items()}


def is_smooth(model: nn.Module) -> bool:
    """Whether I2 differs from the exact value in hidden layers."""
    return any(isinstance(module, nn.Sigmoid) for module in model)


def by_layer(diagonal: Diagonal) -> dict[str, Tensor]:
    """Layer -> its weights and biases as one vector."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in diagonal)
    return {k: torch.cat([v.flatten() for n, v in diagonal.items() if n.rpartition(".")[0] == k]) for k in layers}


def by_variances(model: nn.Module, x: Tensor, costs: Costs) -> list[str]:
    """The optimizers' default choice, layer by layer."""
    found = fishopt.select_estimators(model, x, LOSS, criterion="efficiency", candidates=CANDIDATES)
    return [choice.estimator for choice in found]


def by_bounds(model: nn.Module, x: Tensor, costs: Costs) -> list[str]:
    """The least bound on the variance x passes, I2 left out: where it is good it is the exact value."""
    inputs = by_layer(fishopt.input_variance_bound(model, x, LOSS, tight=True))
    scores: dict[str, list[float]] = {}
    for name in ("exact", "hutchinson", "I1"):
        labels = by_layer(fishopt.variance_bound(model, x, LOSS, estimator=name, tight=True))
        each = [float(inputs[k].sum() + labels[k].sum()) for k in inputs]
        scores[name] = [value * cost for value, cost in zip(each, costs[name], strict=True)]
    return [min(scores, key=lambda name: scores[name][j]) for j in range(len(costs["exact"]))]


RULES = {"auto": by_variances, "by bounds": by_bounds}


def passes(model: nn.Module, estimator: str, layers: int, outputs: int) -> list[int]:
    """Backward passes per input for each layer's estimate, as the efficiency rule counts them."""
    if estimator not in {"I2", "exact"}:
        return [1] * layers
    below = outputs + (SKETCH if is_smooth(model) and estimator == "I2" else 0)
    return [below] * (layers - 1) + [1]


def summary(
    errors: dict[str, Tensor], variances: dict[str, float], costs: dict[str, int], picks: dict[str, Counter[str]]
) -> Result:
    """One layer: errors with standard errors by size, A x passes, and what the rules make of it.

    Args:
        errors: Estimator -> ``[sizes, repetitions]``.
        variances: Estimator -> A, where it is known.
        costs: Estimator -> backward passes.
        picks: Rule -> how often it took which.
    """
    sizes = torch.tensor(SIZES, dtype=torch.float32)
    found: Result = {}
    for name, values in errors.items():
        measured = float((values.mean(1) * sizes.square()).sum() / sizes.sum())  # each input counts alike
        found[name] = {
            "passes": costs[name],
            "error": [float(f"{v:.4g}") for v in values.mean(1)],
            "standard_error": [float(f"{v:.2g}") for v in values.std(1) / values.shape[1] ** 0.5],
            "error_x_compute": variances.get(name, measured) * costs[name],
        }
    if costs["I2"] == 1:
        found["I2"]["error_x_compute"] = found["exact"]["error_x_compute"]
    efficiency = {name: found[name]["error_x_compute"] for name in UNBIASED}
    best = min(efficiency, key=lambda name: efficiency[name])
    rules = {}
    for rule, counts in picks.items():
        product = sum(count * efficiency[name] for name, count in counts.items()) / counts.total()
        rules[rule] = {
            "picks": {name: count / counts.total() for name, count in counts.most_common()},
            "error_x_compute": product,
            "ratio_to_best": product / efficiency[best],
        }
    return {"estimators": found, "best": best, "rules": rules}


def spoken(rule: Result) -> str:
    """A rule's picks in words."""
    return ", ".join(name if share == 1 else f"{name} {share:.0%}" for name, share in rule["picks"].items())


def panels(result: Result) -> Iterator[tuple[str, str, dict[str, Result]]]:
    """Network, moment, and what was found in its layers."""
    for network, moments in result["networks"].items():
        for moment, layers in moments.items():
            yield network, moment, layers


def draw(result: Result, path: Path) -> None:
    """A row for each network and moment, a column for each layer: errors over compute, dashed what auto picks."""
    found = list(panels(result))
    columns = len(found[0][2])
    figure = Figure(figsize=(3.5 * columns, 2.9 * len(found) + 0.6), layout="constrained")
    for axes, (network, moment, layers) in zip(figure.subplots(len(found), columns, sharex=True), found, strict=True):
        for place, (axis, layer) in enumerate(zip(axes, layers.values(), strict=True), start=1):
            panel(axis, layer, result["settings"]["sizes"])
            auto = layer["rules"]["auto"]
            title = f"layer {place}, auto: {spoken(auto)}\n{auto['ratio_to_best']:.2g}x the best, {layer['best']}"
            axis.set_title(title, fontsize=9)
        axes[0].set_ylabel(f"{network}, {moment}\nrelative squared error")
    handles = [Line2D([], [], color=COLOURS[name], marker="o", markersize=4, label=name) for name in ESTIMATORS]
    handles.append(Line2D([], [], color="0.1", linestyle="--", label="auto"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel("compute: inputs x backward passes (points: measured, lines: Theorem 4.7 in closed form)")
    figure.savefig(path, dpi=110)


def panel(axis: Any, layer: Result, sizes: tuple[int, ...]) -> None:
    """One layer's curves."""
    for name, values in layer["estimators"].items():
        compute = compute_of(sizes, values["passes"])
        style = {"color": COLOURS[name], "marker": "o", "markersize": 3.5}
        axis.errorbar(compute, values["error"], values["standard_error"], **style, linestyle="")
        line = values["error_x_compute"] / compute if name in UNBIASED else values["error"]
        axis.plot(compute, line, color=COLOURS[name], linewidth=1, linestyle="-" if name in UNBIASED else ":")
    # As far as what it picks has been measured.
    auto = layer["rules"]["auto"]
    ends = compute_of(sizes, max(layer["estimators"][name]["passes"] for name in auto["picks"]))
    axis.plot(ends, auto["error_x_compute"] / ends, "--", color="0.1", linewidth=1.8, zorder=5)
    axis.set(xscale="log", yscale="log")
    axis.grid(alpha=0.3, linewidth=0.5)


def compute_of(sizes: tuple[int, ...], passes: int) -> Tensor:
    """Inputs x backward passes, by size."""
    return torch.tensor(sizes, dtype=torch.float64) * passes


def table(result: Result) -> Table:
    """Error x compute over the best's, for each layer."""
    found = Table(title="error at equal compute, over the best unbiased estimator's")
    for heading in ("network", "layer", *UNBIASED, *itertools.chain(*((rule, "picks") for rule in RULES))):
        found.add_column(heading)
    for network, moment, layers in panels(result):
        for place, layer in enumerate(layers.values(), start=1):
            estimators = layer["estimators"]
            best = estimators[layer["best"]]["error_x_compute"]
            cells = [f"{estimators[name]['error_x_compute'] / best:.3g}" for name in UNBIASED]
            for rule in layer["rules"].values():
                cells += [f"{rule['ratio_to_best']:.3g}", spoken(rule)]
            found.add_row(f"{network}, {moment}", str(place), *cells)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST/raw/*.gz; without it, scikit-learn's digits")
    parser.add_argument("--quick", action="store_true", help="tiny networks, five repetitions")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for errors.json and errors.png")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the same to the bit everywhere
    result = measure(options.data_dir, seed=options.seed, quick=options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "errors.json").write_text(json.dumps(result) + "\n")
    draw(result, options.out / "errors.png")
    Console(width=150).print(table(result))
    print(f"picture and numbers: {options.out.resolve()}")


if __name__ == "__main__":
    main()
