"""The warfarin example, evaluated: PopED's published numbers for it, and the information by simulation.

The model on which PFIM, PkStaMp, PopDes, PopED and POPT were compared (Nyberg et al., Br. J. Clin. Pharmacol. 79,
2015): one compartment, first-order absorption, a dose of 70 mg, 32 subjects, log-normal effects on CL, V and ka,

    f = D ka / (V (ka - CL/V)) (exp(-CL t/V) - exp(-ka t)).

Conventions that PopED's numbers follow: linearised at b = 0, h = f at b = 0 (no interaction), variances (not standard
deviations) as parameters; in the full information V moves with beta through L and h, in the reduced one not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal, localcontext
from typing import Any

import torch
from checks import Check
from population_fisher import Linearised, Population, by_differences, linearise, relative_errors, simulated_scores
from scipy.stats import norm
from torch import Tensor

SUBJECTS, DOSE = 32, 70
TIMES = (0.5, 1, 2, 6, 24, 36, 72, 120)
"""The published sampling times (h)."""
FIXED, OMEGA = ("0.15", "8", "1"), ("0.07", "0.02", "0.6")
SIGMA = {"proportional": ("0.01",), "combined": ("0.01", "0.25")}
NAMES = ("CL", "V", "ka", "omega2 CL", "omega2 V", "omega2 ka", "sigma2 prop", "sigma2 add")
PUBLISHED = {
    ("proportional", "reduced"): "5.996147e22 4.738266 2.756206 13.925829 25.627205 30.344316 25.777327 11.170784",
    ("proportional", "full"): "1.220371e24 3.560994 2.560413 4.811952 26.270324 30.901555 26.503936 12.409516",
    ("combined", "reduced"): (
        "1.143859e24 5.096246 3.031164 14.260384 29.761226 36.681388 26.748640 32.011719 25.637971"
    ),
}
"""PopED's determinant and relative standard errors (percent), from the documentation of evaluate.fim and ofv_fim."""


def concentration(t: Any, g: Any, exp: Any = torch.exp) -> Any:
    """Concentration (mg/L) at time ``t`` (h) for a subject's CL (L/h), V (L) and ka (1/h), in any type of number."""
    clearance, volume, absorption = g
    scale = DOSE * absorption / (volume * (absorption - clearance / volume))
    return scale * (exp(-clearance / volume * t) - exp(-absorption * t))


def vector(values: Iterable[Any]) -> Tensor:
    """Numbers of any type, in double precision."""
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def population(errors: str) -> Population:
    """The warfarin model with ``"proportional"`` errors, or ``"combined"`` with additive ones (mg/L)."""

    def error(f: Tensor) -> Tensor:
        return torch.stack([f, torch.ones_like(f)], 1) if errors == "combined" else f[:, None]

    return Population(concentration, error, vector(FIXED), vector(OMEGA), vector(SIGMA[errors]))


def numbers(linear: Linearised, theta: Tensor) -> list[float]:
    """Determinant and relative standard errors (percent) of all subjects, as PopED prints them."""
    information = SUBJECTS * linear.information()
    return [float(torch.det(information)), *relative_errors(information, theta).tolist()]


def digits(title: str, published: str, got: list[float]) -> list[Check]:
    """Against printed digits: equal up to half a unit of the last one."""
    names = ("determinant", *(f"RSE of {name}, %" for name in NAMES))[: len(got)]
    return [
        Check(f"{title}: {name}: {text}", float(text), value, float(half_unit(text) / Decimal(text)))
        for name, text, value in zip(names, published.split(), got, strict=True)
    ]


def half_unit(text: str) -> Decimal:
    """Half a unit of the last digit of a number in print."""
    return Decimal((0, (5,), int(Decimal(text).as_tuple().exponent) - 1))


def differences(number: Any, exp: Any) -> Linearised:
    """The full information with proportional errors, in PopED's way, in numbers of this type."""
    values = ([number(str(v)) for v in part] for part in (TIMES, FIXED, OMEGA, SIGMA["proportional"]))
    return by_differences(lambda t, g: concentration(t, g, exp), exp, number("1e-5"), *values)


def against_published() -> list[Check]:
    """PopED's numbers, and why the last digits of its full information are what they are."""
    times = vector(TIMES)
    checks = []
    for errors in SIGMA:
        model = population(errors)
        got = numbers(linearise(model, times, reduced=True), model.theta)
        checks += digits(f"reduced, {errors}", PUBLISHED[errors, "reduced"], got)
    text, model = PUBLISHED["proportional", "full"], population("proportional")
    exact = vector(numbers(linearise(model, times), model.theta))
    checks += digits("full, PopED's differences", text, numbers(differences(float, math.exp), model.theta))
    with localcontext(prec=40):
        long = vector(numbers(differences(Decimal, Decimal.exp), model.theta))
    printed = vector(text.split())
    # PopED's own tests of these determinants allow a relative 1e-5. In 40 digits what is left of the differences' error
    # is that of their step, of the order of (1e-5 / CL)^2 = 4e-9.
    return [
        *checks,
        Check("full, exact: largest relative difference from print", 1e-5, deviation(exact, printed), relation="<="),
        Check("full, exact: from the differences in 40 digits", 2e-8, deviation(exact, long), relation="<="),
    ]


def deviation(value: Tensor, reference: Tensor) -> float:
    """Largest relative difference."""
    return float((value / reference - 1).abs().max())


def against_scores(draws: int, seed: int) -> list[Check]:
    """The full information against outer products of scores at simulated observations, in their standard errors.

    The bound holds for all entries at once, but for one run in a thousand (Bonferroni).
    """
    model, times = population("proportional"), vector(TIMES)
    scores = simulated_scores(model, times, draws, torch.Generator().manual_seed(seed))
    rows, columns = torch.triu_indices(len(model.theta), len(model.theta)).unbind()
    products = scores[:, rows] * scores[:, columns]

    def farthest(samples: Tensor, expected: Tensor | float) -> float:
        return float(((samples.mean(0) - expected) / (samples.std(0) / draws**0.5)).abs().max())

    def bound(count: int) -> float:
        return float(norm.isf(0.0005 / count))

    full, reduced = (linearise(model, times, reduced=r).information()[rows, columns] for r in (False, True))
    most, name = bound(len(rows)), f"{draws:,} simulated scores: largest |z| of"
    return [
        Check(f"{name} their mean from 0", bound(scores.shape[1]), farthest(scores, 0.0), relation="<="),
        Check(f"{name} outer products from full", most, farthest(products, full), relation="<="),
        Check(f"{name} outer products from reduced, which has no chance", most, farthest(products, reduced), 0, ">="),
    ]
