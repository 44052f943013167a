"""Figure 2 of the paper: the Fisher information, both estimators' label variances, and their bounds, on MNIST.

A multilayer perceptron trains for 20 epochs with dropout. Before the first epoch and after each, at random test inputs:
I(theta_i|x), sqrt(V_j(theta_i|x)) and the upper bounds on them (Theorem 4.1; the lower ones are zero here), averaged
over each layer's parameters. The paper samples N = 5000 labels; here the variances are in closed form, for one label
(Lemma 3.1): over N for the mean of N, which is checked against samples. Everything in float64, dropout switched off.

The paper's widths are not stated: here 784-256-256-128-10, one more 256 with 5 layers, Adam at 1e-3, batches of 128.
Official IDX files are read from DATA_DIR/MNIST/raw; without --data-dir scikit-learn's digits stand in. Writes
figure2_ACTIVATION_LAYERS.png, and figure2.json with all curves and the paper's claims, checked by number.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from claims import Claim, table
from figure2_drawing import draw
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fishopt

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "logsigmoid": nn.LogSigmoid}
HIDDEN = {4: (256, 256, 128), 5: (256, 256, 256, 128)}
DROPOUT, BATCH, LABELS, DRAWS = 0.1, 128, 5000, 20
QUANTITIES = ("FI", "V1", "V2")
KINDS = ("value", "paper", "tight")
"""The quantity, its bound with the paper's eigenvalue bounds (Theorem 5.2), and with the tighter ones [ours]."""
PAPERS_LOOSENESS = {"V1": 50.0, "V2": 10.0}
LOSS = nn.CrossEntropyLoss()


class Data(NamedTuple):
    """Images ``[N, pixels]`` in [0, 1], and their classes."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


class Look(NamedTuple):
    """One epoch of `Found`."""

    means: Tensor
    roots: Tensor
    violations: int
    comparisons: int


@dataclass(frozen=True)
class Found:
    """What was measured on one network; E epochs and the start, X inputs, L layers.

    Attributes:
        means: ``[E + 1, X, L, 3, 3]``, by quantity and kind: means over the layer's parameters.
        roots: The same of the square roots.
        violations: Parameters, inputs, epochs at which a quantity was above one of its bounds, or below zero.
        comparisons: How often that was looked at.
        accuracy: On the test set, for each epoch and the start.
        sampled: Of estimates from N labels at the start, ``E (F_N - F)^2 / (V / N)``, with its standard error.
    """

    means: Tensor
    roots: Tensor
    violations: int
    comparisons: int
    accuracy: list[float]
    sampled: dict[str, tuple[float, float]]


def load(data_dir: Path | None, seed: int) -> Data:
    """MNIST, or the digits that come with scikit-learn."""
    if data_dir is None:
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images / 16, labels, test_size=0.25, stratify=labels, random_state=seed)
        x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
        return Data(x.float(), y.long(), x_test.float(), y_test.long())
    found = [
        _idx(data_dir / "MNIST" / "raw" / f"{part}-{kind}-ubyte.gz")
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    return Data(*(part.flatten(1).float() / 255 if part.ndim == 3 else part.long() for part in found))


def _idx(path: Path) -> Tensor:
    with gzip.open(path) as file:
        raw = file.read()
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


def network(pixels: int, hidden: tuple[int, ...], activation: str) -> nn.Sequential:
    """Dense layers, an activation and dropout after each but the last."""
    widths = (pixels, *hidden, 10)
    layers = [(nn.Linear(a, b), ACTIVATIONS[activation](), nn.Dropout(DROPOUT)) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*layers[:-1]), layers[-1][0])


def by_layer(diagonal: dict[str, Tensor]) -> list[Tensor]:
    """Each layer's weights and biases as one vector, from the first layer to the last."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in diagonal)
    return [torch.cat([v.flatten() for n, v in diagonal.items() if n.rpartition(".")[0] == layer]) for layer in layers]


def quantities(model: nn.Module, x: Tensor) -> dict[str, list[dict[str, Tensor]]]:
    """Each quantity at one input, in the order of `KINDS`."""
    found = {
        "FI": [
            fishopt.fisher_diagonal(model, x, LOSS, estimator="exact"),
            *(fishopt.fisher_bound(model, x, LOSS, tight=tight) for tight in (False, True)),
        ]
    }
    for name, estimator in (("V1", "I1"), ("V2", "I2")):
        found[name] = [
            fishopt.label_variance(model, x, LOSS, estimator=estimator),
            *(fishopt.variance_bound(model, x, LOSS, estimator=estimator, tight=tight) for tight in (False, True)),
        ]
    return found


def look(model: nn.Module, inputs: Tensor) -> Look:
    """All quantities at all inputs."""
    double = copy.deepcopy(model).double().eval()
    means, roots, violations, comparisons = [], [], 0, 0
    for x in inputs.double().split(1):
        found = quantities(double, x)
        layers = [[by_layer(kind) for kind in found[name]] for name in QUANTITIES]  # quantity, kind, layer
        means.append([[[float(part.mean()) for part in kind] for kind in kinds] for kinds in layers])
        roots.append([[[float(part.sqrt().mean()) for part in kind] for kind in kinds] for kinds in layers])
        for value, *bounds in layers:
            for bound in bounds:
                for v, b in zip(value, bound, strict=True):
                    # A part in 10^9 is rounding: the terms of V1 cancel.
                    violations += int((~((v >= 0) & (v <= b * (1 + 1e-9)))).sum())
                    comparisons += v.numel()
    by_layers = [torch.tensor(part, dtype=torch.float64).permute(0, 3, 1, 2) for part in (means, roots)]
    return Look(by_layers[0], by_layers[1], violations, comparisons)


def sampled(model: nn.Module, inputs: Tensor, generator: torch.Generator) -> dict[str, tuple[float, float]]:
    """How far estimates from N labels are from the exact value, squared, over the closed form's V / N.

    I1 in all layers; I2 in the last but one, where it is not sketched.
    """
    double = copy.deepcopy(model).double().eval()
    ratios: dict[str, list[float]] = {"I1": [], "I2": []}
    for x in inputs.double().split(1):
        exact = by_layer(fishopt.fisher_diagonal(double, x, LOSS, estimator="exact"))
        for name, some in (("I1", slice(None)), ("I2", slice(-2, -1))):
            variance = by_layer(fishopt.label_variance(double, x, LOSS, estimator=name))[some]
            for _ in range(DRAWS):
                drawn = fishopt.fisher_diagonal(double, x, LOSS, estimator=name, samples=LABELS, generator=generator)
                errors = [(d - e).square().sum() for d, e in zip(by_layer(drawn)[some], exact[some], strict=True)]
                parts = [float(e / (v.sum() / LABELS)) for e, v in zip(errors, variance, strict=True)]
                ratios[name].append(sum(parts) / len(parts))
    return {
        name: (float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5))
        for name, values in ratios.items()
    }


def run(data: Data, activation: str, hidden: tuple[int, ...], epochs: int, inputs: int, seed: int, bar: Any) -> Found:
    """Trains one network, and looks at it before the first epoch and after each."""
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    model = network(data.x.shape[1], hidden, activation)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = data.x_test[torch.randperm(len(data.x_test), generator=draws)[:inputs]]
    looks, accuracy, labels = [look(model, x)], [accuracy_of(model, data)], sampled(model, x, draws)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(data.x)).split(BATCH):
            optimizer.zero_grad()
            LOSS(model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
        looks.append(look(model, x))
        accuracy.append(accuracy_of(model, data))
        bar.update()
    return Found(
        means=torch.stack([found.means for found in looks]),
        roots=torch.stack([found.roots for found in looks]),
        violations=sum(found.violations for found in looks),
        comparisons=sum(found.comparisons for found in looks),
        accuracy=accuracy,
        sampled=labels,
    )


def accuracy_of(model: nn.Module, data: Data) -> float:
    """The share of the test set that is classified right."""
    with torch.no_grad():
        return float((model.eval()(data.x_test).argmax(1) == data.y_test).double().mean())


def looseness(found: Found) -> Tensor:
    """Bound over value at each input, by their means over a layer: ``[E + 1, X, L, 3, 2]``; NaN where both are zero."""
    return found.means[..., 1:] / found.means[..., :1]


def geometric(values: Tensor) -> Tensor:
    """The geometric mean over the first dimension."""
    return values.log().mean(0).exp()


def check(name: str, found: Found) -> list[Claim]:
    """The paper's claims about Figure 2, those that there are about this network."""
    v1, v2 = found.roots.mean(1)[..., 0].unbind(2)[1:]  # [E + 1, L] each
    below, last = v1[:, :-1] < v2[:, :-1], v1.argmax(1) == v1.shape[1] - 1
    singly = (found.roots[:, :, :-1, 1, 0] < found.roots[:, :, :-1, 2, 0]).double().mean()
    zero, count = float(v2[:, -1].max()), f"{int(below.sum())} of {below.numel()} layers and epochs"
    claims = [
        Claim("bounds always hold", "0 above", f"{found.violations} of {found.comparisons:,}", not found.violations),
        Claim("V1 < V2 but in the last layer", "always", f"{count}; {singly:.1%} of inputs singly", bool(below.all())),
        Claim("V2 = 0 in the last layer", "0", f"{zero:g}", zero == 0),
        Claim("V1 largest in the last layer", "always", f"{int(last.sum())} of {len(last)} epochs", bool(last.all())),
    ]
    for estimator, (ratio, error) in found.sampled.items():
        got = f"{ratio:.2f} +- {error:.2f}"
        what = f"{LABELS} labels of {estimator}: squared error over V / N"
        claims.append(Claim(what, "1 +- 4 standard errors", got, abs(ratio - 1) < 4 * error))
    for quantity, expected in PAPERS_LOOSENESS.items():
        # Once training has begun: at the start all labels are about as likely, and bounds are closer.
        each = looseness(found)[1:, :, 0, QUANTITIES.index(quantity)].flatten(0, 1)
        (paper, tight), (low, _), (high, _) = (v.tolist() for v in (geometric(each), *each.aminmax(dim=0)))
        holds = expected / 2 < paper < expected * 2
        got = f"{paper:.0f}x ({low:.1f} to {high:.0f}); {tight:.0f}x with our eigenvalues"
        claims.append(Claim(f"{quantity}'s bound over it, first layer", f"{expected:g}x to a factor of 2", got, holds))
    if name.startswith("logsigmoid"):
        (after_v1, last_v1), (after_v2, last_v2) = ((v.mean(1) / v[0].mean())[[1, -1]].tolist() for v in (v1, v2))
        got = f"V1 {after_v1:.2g}, at last {last_v1:.2g}; V2 {after_v2:.2g}, at last {last_v2:.2g}"
        holds = max(after_v1, after_v2) < 0.01
        claims.append(Claim("sqrt(V) over the start's after an epoch, all layers", "under 0.01: vanishes", got, holds))
    return [replace(claim, claim=f"{name}: {claim.claim}") for claim in claims]


def numbers(found: Found) -> dict[str, Any]:
    """What of a network is kept, in three digits: means over inputs, of looseness geometric ones (1 for 0 / 0).

    ``[epoch][layer][quantity][kind]``.
    """

    def rounded(value: Any) -> Any:
        return [rounded(part) for part in value] if isinstance(value, list) else float(f"{value:.3g}")

    return {
        "quantities": QUANTITIES,
        "kinds": KINDS,
        "means": rounded(found.means.mean(1).tolist()),
        "roots": rounded(found.roots.mean(1).tolist()),
        "looseness": rounded(geometric(looseness(found).transpose(0, 1)).nan_to_num(1.0).tolist()),
        "violations": found.violations,
        "comparisons": found.comparisons,
        "accuracy": rounded(found.accuracy),
        "sampled": found.sampled,
    }


def main(arguments: list[str] | None = None) -> None:
    """Trains, measures, checks, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST/raw/*.gz; without it, scikit-learn's digits")
    parser.add_argument("--activation", nargs="+", choices=ACTIVATIONS, default=["sigmoid"])
    parser.add_argument("--layers", nargs="+", type=int, choices=HIDDEN, default=[4])
    parser.add_argument("--inputs", type=int, default=5, help="test inputs to look at")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a small network, 2 epochs, 2 inputs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for pictures and numbers")
    options = parser.parse_args(arguments)
    epochs, inputs = (2, 2) if options.quick else (options.epochs, options.inputs)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the same to the bit everywhere
    data = load(options.data_dir, options.seed)
    settings = {
        "data": "MNIST" if options.data_dir else "digits",
        "epochs": epochs,
        "inputs": inputs,
        "seed": options.seed,
        "quick": options.quick,
    }
    claims, kept = [], {}
    variants = list(itertools.product(options.activation, options.layers))
    with tqdm(total=len(variants) * epochs, unit="epoch") as bar:
        for activation, layers in variants:
            name = f"{activation}, {layers} layers"
            hidden = tuple(size // 16 for size in HIDDEN[layers]) if options.quick else HIDDEN[layers]
            found = run(data, activation, hidden, epochs, inputs, options.seed, bar)
            claims += check(name, found)
            kept[name] = numbers(found)
            loose = geometric(looseness(found).transpose(0, 1))  # over inputs
            draw(name, found.means, found.roots, loose, options.out / f"figure2_{activation}_{layers}.png")
            content = {"settings": settings, "claims": [asdict(claim) for claim in claims], "networks": kept}
            (options.out / "figure2.json").write_text(json.dumps(content) + "\n")
    Console(width=140).print(table("Figure 2, the claims", claims))
    print(f"pictures and numbers: {options.out.resolve()}")


if __name__ == "__main__":
    main()
