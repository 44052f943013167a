"""Damping by the standard error of the estimate: does it help? ``python -m benchmarks.caution --data-dir DIR``.

`Cautious` knows how uncertain a layer's averaged Fisher diagonal is, from how far each new estimate is from the
average: inputs, labels and sketches all show in that. With estimates of variance ``s^2`` the average of n of them, of
decay b, has the variance ``r s^2``, ``r = (1 - b) / (1 + b) * (1 + b^n) / (1 - b^n)``, and the next one is
``(1 + r) s^2`` away from it in mean square. It then either adds that error to F (``caution``), or moves F towards the
layer's mean by the share of the entries' variance that is noise (``shrink``, James and Stein's), so that both fade as
the average sharpens.

Final training losses on MNIST, by damping, inputs per refresh, activation and learning rate, beside neither.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fishopt
from benchmarks.defaults import MNIST, load
from fishopt.groups import by_layer
from fishopt.optim.averages import Average
from fishopt.optim.estimate import Estimate, Moment

FORMS: dict[str, dict[str, Any]] = {"neither": {}, "caution 1": {"caution": 1.0}, "shrink": {"shrink": True}}
ACTIVATIONS = {"ReLU": nn.ReLU, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh}
DAMPINGS = (0.1, 0.3, 1.0)
REFRESH_INPUTS = (4, 16, 64)
RATES = (3e-3, 1e-2, 3e-2)


class Cautious(fishopt.FisherAdam):
    """`fishopt.FisherAdam` whose preconditioner allows for the standard error of what it is made of.

    Args:
        *args: As FisherAdam's.
        caution: Standard errors, root mean squares over the layer, that are added to each entry of F.
        shrink: Whether to move each entry towards the layer's mean.
        **options: As FisherAdam's.
    """

    def __init__(self, *args: Any, caution: float = 0.0, shrink: bool = False, **options: Any) -> None:
        self._caution, self._shrink = caution, shrink
        super().__init__(*args, **options)

    def _take(self, estimate: Estimate, *, trained: bool) -> None:
        parameters = {name: p for p, name in self._name_of.items()}
        decay = self._decay(self.param_groups[0])
        for names in by_layer(estimate.diagonal).values():
            size = sum(parameters[name].numel() for name in names)
            total = sum(spread(estimate.diagonal[name], self.state[parameters[name]], decay) for name in names)
            for name in names:
                self.state[parameters[name]]["error"] = (total / size) ** 0.5
        super()._take(estimate, trained=trained)

    def _preconditioner(self, fisher: Average, group: dict[str, Any], state: dict[str, Any], moment: Moment) -> Tensor:
        values = fisher.values.mul_(fisher.correction)
        if self._caution:
            values.add_(self._caution * state["error"])
        if self._shrink:
            scatter = float((values - fisher.layer).square().mean())
            signal = max(0.0, 1 - state["error"] ** 2 / scatter) if scatter else 0.0
            values.sub_(fisher.layer).mul_(signal).add_(fisher.layer)
        return super()._preconditioner(fisher._replace(correction=1.0), group, state, moment)


def spread(new: Tensor, state: dict[str, Any], decay: float) -> float:
    """The variance of a parameter's averaged estimate once ``new`` is in it, summed over entries.

    It is itself an average, kept in the state, of the same decay; zero before there is a second estimate.
    """
    count = state.get("refreshes", 0)
    if count:
        average = state["fisher"] / (1 - decay**count)
        single = float((new - average).square().sum()) / (1 + _share(decay, count))
        state["single"] = decay * state.get("single", 0.0) + (1 - decay) * single
    weight = 1 - decay**count
    return state["single"] / weight * _share(decay, count + 1) if count else 0.0


def _share(decay: float, count: int) -> float:
    """The variance of an average of so many estimates over that of one."""
    return (1 - decay) / (1 + decay) * (1 + decay**count) / (1 - decay**count)


def train(data: tuple[Tensor, Tensor], widths: tuple[int, ...], steps: int, config: dict[str, Any]) -> float:
    """The training loss on the first 4096 inputs after so many steps of batch 128."""
    x, y = data
    torch.manual_seed(config["seed"])
    pairs = itertools.pairwise(widths)
    layers = [m for a, b in pairs for m in (nn.Linear(a, b), ACTIVATIONS[config["activation"]]())]
    model, loss_fn = nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss()
    options = {key: config[key] for key in ("lr", "damping", "refresh_inputs")}
    optimizer = Cautious(model, loss_fn, **options, **FORMS[config["form"]])
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        loss_fn(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss_fn(model(x[:4096]), y[:4096]))


def configs(seeds: int) -> Iterator[dict[str, Any]]:
    """All that is trained, what is compared next to each other."""
    keys = ("seed", "activation", "refresh_inputs", "damping", "lr", "form")
    for values in itertools.product(range(seeds), ACTIVATIONS, REFRESH_INPUTS, DAMPINGS, RATES, FORMS):
        yield dict(zip(keys, values, strict=True))


def show(results: list[dict[str, Any]]) -> Table:
    """Of each form the mean loss over seeds at its best learning rate, which is in brackets."""
    table = Table(title="final training loss at the best learning rate")
    for heading in ("activation", "refresh_inputs", "damping", *FORMS):
        table.add_column(heading, justify="right")
    settings = [(r["activation"], r["refresh_inputs"], r["damping"]) for r in results]
    for setting in dict.fromkeys(settings):
        cells = []
        for form in FORMS:
            losses: dict[float, list[float]] = {}
            for own, r in zip(settings, results, strict=True):
                if own == setting and r["form"] == form:
                    losses.setdefault(r["lr"], []).append(r["loss"])
            means = {lr: sum(listed) / len(listed) for lr, listed in losses.items()}
            best = min(means, key=means.__getitem__)
            cells.append(f"{means[best]:.3f} ({best:g})")
        table.add_row(*map(str, setting), *cells)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Trains all, writes the losses as JSON, and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with MNIST/raw/*.gz")
    parser.add_argument(
        "--small", action="store_true", help="images of 14 x 14 and 196-64-64-32-10, not 784-256-256-128-10"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=469)
    parser.add_argument("--out", type=Path, default=Path("out/caution.json"))
    options = parser.parse_args(arguments)
    x, y, _, _ = load(MNIST[0], 0, options.data_dir)
    widths = (784, 256, 256, 128, 10)
    if options.small:
        x, widths = nn.functional.avg_pool2d(x.view(-1, 1, 28, 28), 2).flatten(1), (196, 64, 64, 32, 10)
    results = [{**c, "loss": train((x, y), widths, options.steps, c)} for c in track(list(configs(options.seeds)))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(map(json.dumps, results))
    options.out.write_text(f"[\n{lines}\n]\n")
    Console(width=120).print(show(results))


if __name__ == "__main__":
    main()
