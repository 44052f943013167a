"""Medians over seeds with intervals, performance profiles, and ranges of learning rates."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

DRAWS = 2000
"""Resamples of the seeds."""

LEVEL = 0.95
"""Of the intervals."""

FACTOR = 4.0
"""How far a performance profile goes, as in AlgoPerf: what takes longer than this many times the best is a miss."""


@dataclass(frozen=True)
class Estimate:
    """A number and how it varies with the seeds.

    Attributes:
        value: Of the seeds there are.
        draws: The same of seeds drawn from them with replacement.
        seeds: How many there are.
    """

    value: float
    draws: np.ndarray
    seeds: int

    @classmethod
    def median(cls, values: Sequence[float], key: str = "") -> Estimate:
        """The median over seeds.

        Args:
            values: One of each seed, in their order; infinite for a miss.
            key: What the seeds are of. Those of one key are drawn together, so that methods are compared on the same
                draws; those of different keys apart.
        """
        found = np.asarray(values, dtype=float)
        return cls.of(lambda rows: float(np.median(found[rows])), len(found), key)

    @classmethod
    def of(cls, statistic: Callable[[np.ndarray], float], seeds: int, key: str) -> Estimate:
        """Any statistic of seeds.

        Args:
            statistic: Takes indices of seeds, in order and with repetitions.
            seeds: How many there are.
            key: As of `median`.
        """
        distinct, which = _distinct(seeds, key)
        draws = np.array([statistic(rows) for rows in distinct])
        return cls(statistic(np.arange(seeds)), draws[which], seeds)

    @property
    def low(self) -> float:
        """Where the interval begins; never between two draws, of which one may be infinite."""
        return float(np.quantile(self.draws, (1 - LEVEL) / 2, method="lower"))

    @property
    def high(self) -> float:
        """Where the interval ends."""
        return float(np.quantile(self.draws, (1 + LEVEL) / 2, method="higher"))


def drawn(seeds: int, key: str) -> np.ndarray:
    """Which seeds each draw has."""
    generator = np.random.default_rng([zlib.crc32(key.encode()), seeds])
    return generator.integers(seeds, size=(DRAWS, seeds))


@cache
def _distinct(seeds: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The draws that differ in more than their order, few as they are, and which of them each draw is."""
    found, which = np.unique(np.sort(drawn(seeds, key), axis=1), axis=0, return_inverse=True)
    return found, which.ravel()


def combined(estimates: Sequence[Estimate], function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A function of several estimates, such as their minimum; it reduces the first dimension of an array.

    Estimates of one key vary together if they have as many seeds, else each by itself.
    """
    with np.errstate(divide="ignore"):
        value = function(np.array([e.value for e in estimates]))
        draws = function(np.stack([e.draws for e in estimates]))
    return Estimate(float(value), draws.astype(float), min(e.seeds for e in estimates))


def inverse(estimate: Estimate) -> Estimate:
    """One over it."""
    return combined([estimate], lambda x: 1 / x[0])


# --- performance profiles (Dolan and More, 2002) ---


@dataclass(frozen=True)
class Profile:
    """Of several methods on the same problems.

    Attributes:
        ratios: Method -> for each problem what it needed over what the best method needed; infinite for a miss.
        areas: Method -> the area under its profile from 1 to `FACTOR`, over that of a method that is best everywhere.
        ranks: Method -> its place by area.
    """

    ratios: dict[str, list[float]]
    areas: dict[str, Estimate]
    ranks: dict[str, Estimate]

    @classmethod
    def of(cls, needs: Mapping[str, Sequence[Estimate]]) -> Profile:
        """A profile from what each method needed on each problem."""
        methods = list(needs)
        values = np.array([[e.value for e in needs[m]] for m in methods])
        draws = np.array([[e.draws for e in needs[m]] for m in methods])
        seeds = min(e.seeds for m in methods for e in needs[m])
        areas, some = _areas(_over_best(values)), _areas(_over_best(draws))
        ranks, places = _ranks(areas), _ranks(some)
        return cls(
            {m: _over_best(values)[i].tolist() for i, m in enumerate(methods)},
            {m: Estimate(float(areas[i]), some[i], seeds) for i, m in enumerate(methods)},
            {m: Estimate(float(ranks[i]), places[i], seeds) for i, m in enumerate(methods)},
        )

    def within(self, method: str, factor: float) -> float:
        """The fraction of problems on which it needed at most ``factor`` times as much as the best."""
        return float(np.mean(np.array(self.ratios[method]) <= factor))


def _over_best(needs: np.ndarray) -> np.ndarray:
    best = needs.min(0)
    return np.where(np.isfinite(needs), needs / np.where(np.isfinite(best), best, 1.0), np.inf)


def _areas(ratios: np.ndarray) -> np.ndarray:
    # Each problem adds a step function, of height 1 from its ratio on.
    return np.clip((FACTOR - ratios) / (FACTOR - 1), 0, 1).mean(1)


def _ranks(areas: np.ndarray) -> np.ndarray:
    return 1 + (areas[None] > areas[:, None] + 1e-12).sum(1)


# --- robustness to the learning rate ---


@dataclass(frozen=True)
class Range:
    """Of learning rates that end near the best; open if it goes on where no rate was tried."""

    low: float
    high: float
    is_open: bool

    @property
    def decades(self) -> float:
        """How wide it is."""
        return math.log10(self.high / self.low)


def good_rates(metrics: Mapping[float, float], is_classification: bool) -> Range | None:
    """The learning rates around the best one that end within 1% of it.

    Within 1% is: an accuracy of 0.99 times the best, or a loss that exceeds the least by 1% of its size. Between two
    rates the metric is taken to be linear in the logarithm of the rate; next to a run that diverged, to be bad.

    Args:
        metrics: Learning rate -> final metric.
        is_classification: Whether metrics are error rates.

    Returns:
        The range, or None if all runs diverged.
    """
    rates = sorted(metrics)
    values = [metrics[rate] for rate in rates]
    best = int(np.argmin(values))
    if not math.isfinite(values[best]):
        return None
    worst = 1 - 0.99 * (1 - values[best]) if is_classification else values[best] + 0.01 * abs(values[best])
    first, last = best, best
    while first > 0 and values[first - 1] <= worst:
        first -= 1
    while last < len(rates) - 1 and values[last + 1] <= worst:
        last += 1
    low = _crossing(rates, values, first, first - 1, worst)
    high = _crossing(rates, values, last, last + 1, worst)
    return Range(low, high, first == 0 or last == len(rates) - 1)


def width(metrics: Mapping[float, Sequence[float]], is_classification: bool, key: str) -> Estimate:
    """How many decades of learning rates are good, 0 if all runs diverged.

    Args:
        metrics: Learning rate -> final metrics by seed, of which the medians count.
        is_classification: Whether metrics are error rates.
        key: As of `Estimate.median`.
    """

    def of(rows: np.ndarray) -> float:
        found = good_rates(
            {rate: float(np.median(np.array(m)[rows])) for rate, m in metrics.items()}, is_classification
        )
        return 0.0 if found is None else found.decades

    return Estimate.of(of, len(next(iter(metrics.values()))), key)


def _crossing(rates: list[float], values: list[float], inside: int, outside: int, worst: float) -> float:
    if not 0 <= outside < len(rates) or not math.isfinite(values[outside]):
        return rates[inside]
    part = (worst - values[inside]) / (values[outside] - values[inside])
    return rates[inside] * (rates[outside] / rates[inside]) ** part
