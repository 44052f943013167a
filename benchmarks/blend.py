"""Is a weighted mean of I1 and I2 better than choosing one? ``python -m benchmarks.blend --data-dir DIR``.

Any affine combination ``(1 - w) I1 + w I2`` at one label is unbiased, and for each layer the weight that minimises the
sum of its parameters' label variances is ``w = (V1 - C) / (V1 + V2 - 2 C)``, ``C = Cov_y(I1, I2 | x)``. All three are
computed here exactly, over every label, on an MLP of sigmoids or tanhs, early and late in training.

Two things are asked of each layer: how far the blend's label variance is below the better one's, and what the whole
variance (Theorem 4.7: inputs and labels) times the backward passes is, against estimators that cost as much. ``tilted``
is I1 with ``beta r`` added, r the mean-zero part of I2: the blend without the columns of the exact value.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fishopt
from benchmarks.data import SOURCES
from benchmarks.models import mlp
from fishopt.batch import Batch
from fishopt.groups import layers
from fishopt.passes.base import SKETCH_COST

WIDTHS = (784, 256, 256, 128, 10)
STAGES = {"early": 50, "late": 1876}
"""Steps, of batch 128: within the first epoch, and after four."""


@dataclass(frozen=True)
class Moments:
    """Of one layer: sums over its parameters of means over inputs.

    Attributes:
        over_inputs: ``Var_x(I(theta_i|x))``, which all estimators have in common.
        v1: The label variance of I1.
        v2: Of I2.
        covariance: Of the two, given the input.
        hutchinson: The label variance of hutchinson.
    """

    over_inputs: float
    v1: float
    v2: float
    covariance: float
    hutchinson: float

    @property
    def weight(self) -> float:
        """Of I2 in the blend."""
        spread = self.v1 + self.v2 - 2 * self.covariance
        return (self.v1 - self.covariance) / spread if spread > 0 else 1.0

    @property
    def blend(self) -> float:
        """The label variance of ``(1 - w) I1 + w I2`` at its best weight."""
        w = self.weight
        return (1 - w) ** 2 * self.v1 + w**2 * self.v2 + 2 * w * (1 - w) * self.covariance

    @property
    def tilted(self) -> float:
        """The label variance of ``I1 + beta r`` at its best."""
        return self.v1 - (self.covariance**2 / self.v2 if self.v2 > 0 else 0.0)

    def inefficiency(self, outputs: int, *, last: bool) -> dict[str, float]:
        """The whole variance times backward passes, over that of I1.

        Args:
            outputs: Columns of the exact value.
            last: Whether it is the last layer, whose exact value takes one column, and where r is zero.
        """
        exact, second = (1, 0) if last else (outputs, SKETCH_COST)
        products = {
            "I1": self.v1 + self.over_inputs,
            "hutchinson": self.hutchinson + self.over_inputs,
            "exact": self.over_inputs * exact,
            "I2": (self.v2 + self.over_inputs) * (exact + second),
            "blend": (self.blend + self.over_inputs) * (1 + exact + second),
            "tilted": (self.tilted + self.over_inputs) * (1 + second),
        }
        return {name: value / products["I1"] for name, value in products.items()}


@dataclass(frozen=True)
class Row:
    """One layer at one stage of training."""

    activation: str
    stage: str
    layer: str
    moments: Moments
    weight: float
    gain: float
    inefficiency: dict[str, float]


def moments(model: nn.Module, x: Tensor) -> dict[str, Moments]:
    """Those of each layer of a classifier, every label enumerated; Hessian diagonals are exact."""
    batch = Batch.of(model, x, fishopt.Categorical())
    names, groups = batch.names, layers(model)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    squares, means = batch.zeros(names), batch.zeros(names)
    for through, likelihood, h, _ in batch.chunks(names, per_input=True):
        weights = h.softmax(-1)
        residuals = likelihood.residual(h, torch.arange(h.shape[1])[:, None].expand(-1, len(h)))
        units = torch.eye(h.shape[1]).to(h)[:, None].expand(-1, len(h), -1)
        # r is linear in its cotangent, so a Hessian diagonal for each output gives all labels.
        curvature = [through.hessian_diagonal(c, per_input=True) for c in units]
        scores = [through.squared_vjp(c[None], per_input=True) for c in residuals]
        for name in names:
            broadcast = (slice(None), *[None] * (scores[0][name].ndim - 1))
            p = [weights[:, y][broadcast] for y in range(h.shape[1])]
            q = [one[name] for one in scores]
            fisher = sum(pk * qk for pk, qk in zip(p, q, strict=True))
            r = [sum(c[:, a][broadcast] * curvature[a][name] for a in range(h.shape[1])) for c in residuals]
            found = sums[name]
            found["v1"] += float(sum(pk * (qk - fisher).square() for pk, qk in zip(p, q, strict=True)).sum())
            found["v2"] += float(sum(pk * rk.square() for pk, rk in zip(p, r, strict=True)).sum())
            found["c"] += float(sum(pk * qk * rk for pk, qk, rk in zip(p, q, r, strict=True)).sum())
            squares[name] += fisher.square().sum(0)
            means[name] += fisher.sum(0)
    hutchinson = fishopt.label_variance(model, x, fishopt.Categorical(), estimator="hutchinson")
    n = len(x)

    def total(members: tuple[str, ...], key: str) -> float:
        return sum(sums[name][key] for name in members) / n

    return {
        group: Moments(
            over_inputs=sum(float((squares[m] / n - (means[m] / n).square()).sum()) for m in members),
            v1=total(members, "v1"),
            v2=total(members, "v2"),
            covariance=total(members, "c"),
            hutchinson=sum(float(hutchinson[m].sum()) for m in members),
        )
        for group, members in groups.items()
    }


def rows(activation: str, stage: str, model: nn.Sequential, x: Tensor) -> list[Row]:
    """A row for each layer."""
    found = moments(model, x)
    outputs = model(x[:1]).shape[1]
    last = list(found)[-1]
    return [
        Row(
            activation,
            stage,
            layer,
            m,
            weight=m.weight,
            gain=m.blend / max(min(m.v1, m.v2), 1e-300),
            inefficiency=m.inefficiency(outputs, last=layer == last),
        )
        for layer, m in found.items()
    ]


def measure(activation: type[nn.Module], data_dir: Path, *, inputs: int, seed: int) -> list[Row]:
    """Trains one network by `fishopt.FisherAdam` at its defaults, and looks at it on the way."""
    data = SOURCES["mnist"](data_dir)
    torch.manual_seed(seed)
    model, loss_fn = mlp(WIDTHS, activation), nn.CrossEntropyLoss()
    optimizer = fishopt.FisherAdam(model, loss_fn)
    found: list[Row] = []
    names = {steps: stage for stage, steps in STAGES.items()}
    for step in track(range(1, max(names) + 1), description=activation.__name__):
        some = data.train.of(torch.randint(len(data.train), (128,)))
        optimizer.zero_grad()
        loss_fn(model(some.inputs), some.targets).backward()
        optimizer.step()
        if step in names:
            found += rows(activation.__name__, names[step], model, data.test.inputs[:inputs])
    return found


def show(found: list[Row]) -> Table:
    """The rows, for the terminal."""
    table = Table(title="blend = (1 - w) I1 + w I2: label variance, and variance x passes over I1's")
    for heading in ("network", "stage", "layer", "V2 / V1", "corr", "w", "V blend / min", *found[0].inefficiency):
        table.add_column(heading, justify="right")
    for row in found:
        m = row.moments
        correlation = m.covariance / max(m.v1 * m.v2, 1e-300) ** 0.5
        figures = (m.v2 / m.v1, correlation, row.weight, row.gain, *row.inefficiency.values())
        table.add_row(row.activation, row.stage, row.layer, *(f"{value:.3g}" for value in figures))
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes the rows as JSON, and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with MNIST/raw/*.gz")
    parser.add_argument("--inputs", type=int, default=32, help="test inputs that variances are means over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for blend.json")
    options = parser.parse_args(arguments)
    found: list[Row] = []
    for activation in (nn.Sigmoid, nn.Tanh):
        found += measure(activation, options.data_dir, inputs=options.inputs, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in found)
    (options.out / "blend.json").write_text(f"[\n{lines}\n]\n")
    Console(width=160).print(show(found))


if __name__ == "__main__":
    main()
