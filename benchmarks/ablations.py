"""Ablations: what each choice behind the defaults is worth. A new one is an entry of `ABLATIONS`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.methods import Config
from benchmarks.problems import PROBLEMS
from benchmarks.runs import Spec

SMALL = ("digits_mlp", "mnist_relu", "mnist_sigmoid", "mnist_autoencoder", "poisson_regression", "fit_surface")
"""Problems of different kinds, quick enough to be run many times."""

RULES = ("FisherAdam", "DiagonalNGD")
"""The update rules: F to the power 1/2, and to the power 1."""


@dataclass(frozen=True)
class Ablation:
    """Variants to compare.

    Attributes:
        about: The question.
        variants: Methods with their arguments.
        problems: Where.
    """

    about: str
    variants: Sequence[tuple[str, Config]]
    problems: tuple[str, ...] = SMALL


def grid(methods: Iterable[str], **values: Sequence[Any]) -> list[tuple[str, Config]]:
    """Every combination."""
    return [
        (method, dict(zip(values, chosen, strict=True)))
        for method in methods
        for chosen in itertools.product(*values.values())
    ]


ESTIMATORS = ("auto", "I1", "I2", "hutchinson", "exact", "empirical")

ABLATIONS: Mapping[str, Ablation] = {
    "estimator": Ablation("which estimator, for either exponent of F", grid(RULES, estimator=ESTIMATORS)),
    "refresh": Ablation(
        "how often to refresh, and from how many inputs",
        grid(RULES, refresh_every=(1, 10, 50, 100), refresh_inputs=(4, 16, 64)),
    ),
    "damping": Ablation(
        "how much damping, and how short a step",
        [
            *grid(["FisherAdam"], damping=(0.03, 0.1, 0.3, 1.0), clip=(0.1, 0.3, 1.0, 3.0)),
            *grid(["DiagonalNGD"], damping=(0.01, 0.03, 0.1, 0.3), kl_radius=(1e-7, 1e-6, 1e-5)),
        ],
    ),
    "scale": Ablation(
        "where the size of F is from, and how wide a range of learning rates stands it",
        [
            *grid(["FisherAdam"], scale=("auto", "dispersion", "gradient"), lr=(1e-3, 3e-3, 1e-2, 3e-2)),
            *grid(["FisherAdam"], scale=("gradient",), damping=(0.3, 1.0), lr=(1e-3, 3e-3, 1e-2)),
            *grid(["FisherAdam schedule-free"], scale=("auto",), lr=(1.9e-3, 6e-3, 1.9e-2, 6e-2)),
            *grid(
                ["FisherAdam schedule-free"],
                scale=("gradient",),
                damping=(0.1, 0.3),
                lr=(1.9e-3, 6e-3, 1.9e-2, 6e-2),
            ),
        ],
    ),
    "positions": Ablation(
        "where the size of F is from if an input has labels at several positions, and how many inputs a refresh takes",
        [
            *grid(["FisherAdam", "FisherAdam schedule-free"], scale=("likelihood", "gradient")),
            *grid(["FisherAdam schedule-free"], refresh_inputs=(2, 4, 16)),
        ],
        ("char_transformer",),
    ),
    "averaging": Ablation(
        "schedule-free averaging, against a cosine decay and neither",
        [
            *grid(["FisherAdam"], schedule=("constant", "cosine"), lr=(1e-3, 2e-3, 4e-3)),
            *grid(["FisherAdam schedule-free"], lr=(3e-3, 6e-3, 1.2e-2), betas=((0.9, 0.95), (0.98, 0.95))),
            *grid(["FisherAdam schedule-free"], lr=(6e-3, 1.2e-2), clip=(0.3, 0.5)),
        ],
    ),
    "warmup": Ablation(
        "in how many steps the learning rate of averaged iterates rises",
        grid(["FisherAdam schedule-free"], warmup=(0, 50, 100, 200)),
        ("mnist_relu_large", "mnist_sigmoid_large", "mnist_autoencoder", "cifar_3c3d", "char_transformer"),
    ),
    "caution": Ablation(
        "damping by the standard error of the estimate, or shrinking it to the mean, against neither",
        [
            (method, {**config, **form})
            for method, config in grid(
                ["FisherAdam cautious"], damping=(0.03, 0.1, 0.3, 1.0), lr=(1e-3, 3e-3, 1e-2, 3e-2)
            )
            for form in ({}, {"caution": 1.0}, {"shrink": True})
        ],
        ("digits_mlp", "mnist_relu", "mnist_sigmoid", "poisson_regression"),
    ),
}


STUDIES = {"errors": "benchmarks.errors", "blend": "benchmarks.blend"}
"""Studies of estimates, not of training: modules whose `main` takes ``--data-dir`` and the folder ``--out``."""


def specs(name: str, problems: Iterable[str], seeds: Iterable[int]) -> list[Spec]:
    """The runs of an ablation."""
    return [
        Spec(f"ablate-{name}", problem, method, config, seed, PROBLEMS[problem].steps)
        for problem in problems
        for seed in seeds
        for method, config in ABLATIONS[name].variants
    ]
