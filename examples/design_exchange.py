"""Exchange algorithms for D-optimal designs: which of many candidates to take, and how often.

A design gives each candidate x a share w_x of the subjects; information adds up over subjects, M = sum_x w_x I(x).
Optimal is the w with the largest det M. The sensitivity function is the derivative of log det M towards a candidate,

    phi(x) = tr(I(x) M^-1) = p + d/da log det((1 - a) M + a I(x)) at a = 0,    p the number of parameters,

and w is optimal if and only if phi(x) <= p for all x, with equality where w_x > 0: the equivalence theorem of Kiefer &
Wolfowitz (1960), for information of more than one observation Fedorov & Hackl, Model-Oriented Design of Experiments
(1997). Whatever w is, no design has more than max phi / p times its D-efficiency.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from population_fisher import Linearised
from scipy.optimize import brentq
from torch import Tensor

MOST = 5_000
"""Exchanges after which a search gives up."""


@dataclass(frozen=True)
class Design:
    """Shares of the subjects for K candidates.

    Attributes:
        weights: They sum to 1: ``[K]``.
        sensitivity: phi of each candidate: ``[K]``.
        information: M, of one subject on average: ``[p, p]``.
        exchanges: Steps that were taken.
    """

    weights: Tensor
    sensitivity: Tensor
    information: Tensor
    exchanges: int


def sensitivity(information: Tensor, matrix: Tensor) -> Tensor:
    """phi of candidates with information ``[K, p, p]`` under a design with information ``[p, p]``: ``[K]``."""
    return information.flatten(1) @ torch.linalg.inv(matrix).flatten()


def exchange(information: Tensor, weights: Tensor) -> Design:
    """D-optimal weights by first-order exchanges, from any start whose information is regular.

    Ends when no sensitivity is above ``p (1 + 1e-9)``, rounding leaves nothing to gain, or after `MOST` exchanges: the
    sensitivity tells.

    Args:
        information: Of one subject under each candidate: ``[K, p, p]``.
        weights: To start from: ``[K]``, of sum 1.

    Raises:
        ValueError: If the start's information is singular.
    """
    flat, p, weights = information.flatten(1), information.shape[1], weights.clone()
    for exchanges in range(MOST + 1):
        matrix = (weights @ flat).reshape(p, p)
        if exchanges == 0 and torch.linalg.cholesky_ex(matrix).info:
            raise ValueError(f"weights={weights}: their information is singular; start from more candidates")
        phi = sensitivity(information, matrix)
        best, used = phi.argmax(), weights.nonzero()[:, 0]
        if phi[best] <= p * (1 + 1e-9) or exchanges == MOST:
            break
        worst = used[phi[used].argmin()]
        moved = best_move(matrix, information[best] - information[worst], float(weights[worst]))
        if moved == 0:
            break
        weights[best] += moved
        weights[worst] -= moved  # exactly zero where all of it goes
    return Design(weights, phi, matrix, exchanges)


def best_move(matrix: Tensor, change: Tensor, limit: float) -> float:
    """The a in ``[0, limit]`` with the largest ``log det(matrix + a change)``, concave in a."""
    factor = torch.linalg.cholesky(matrix)
    half = torch.linalg.solve_triangular(factor, change, upper=False)
    values = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.T, upper=False))

    def slope(a: float) -> float:
        return float((values / (1 + a * values)).sum())

    lowest = float(values.min())
    end = min(limit, (1 - 1e-9) / -lowest) if lowest < 0 else limit  # short of a singular matrix
    if slope(0.0) <= 0:
        return 0.0
    return end if slope(end) >= 0 else float(brentq(slope, 0, end, xtol=1e-15))


def exchange_times(linear: Linearised, start: Tensor) -> Tensor:
    """One set of times for all subjects: the best swap of one time for another, until none gains. ``[n]`` indices."""
    current, everything = start.sort().values, torch.arange(len(linear.covariance))
    while True:
        others = everything[~torch.isin(everything, current)]
        swapped = current.repeat(len(current), len(others), 1)
        for place in range(len(current)):
            swapped[place, :, place] = others
        sets = torch.cat([current[None], swapped.flatten(0, 1)])
        values = log_determinants(linear.information(sets))
        if values.max() <= values[0] + 1e-12:  # what is less is rounding
            return current
        current = sets[values.argmax()].sort().values


def log_determinants(information: Tensor) -> Tensor:
    """Of each candidate, minus infinity where rounding made it negative: ``[K]``."""
    return information.logdet().nan_to_num(nan=-math.inf)


def efficiency(information: Tensor, reference: Tensor) -> float:
    """D-efficiency ``(det information / det reference)^(1/p)``: the share of the subjects that would do as well."""
    return float(((information.logdet() - reference.logdet()) / len(reference)).exp())


@dataclass(frozen=True)
class Search:
    """A design of sampling times, and what it was found from.

    Attributes:
        linear: Moments and derivatives on the grid.
        sets: The candidates, all sets of so many of its times: ``[K, n]`` indices.
        information: Of one subject under each: ``[K, p, p]``.
        design: The D-optimal shares.
    """

    linear: Linearised
    sets: Tensor
    information: Tensor
    design: Design

    @property
    def used(self) -> Tensor:
        """The sets that some of the subjects get, the most frequent first: indices."""
        order = self.design.weights.argsort(descending=True)
        return order[self.design.weights[order] > 0]

    @property
    def best(self) -> int:
        """The best set, were there one for all, by brute force."""
        return int(log_determinants(self.information).argmax())


def search(linear: Linearised, samples: int, start: Tensor | None = None) -> Search:
    """The D-optimal design, each subject being sampled at so many times of the grid.

    Args:
        linear: Moments and derivatives on the grid.
        samples: Times per subject.
        start: The set, of that size, to start from; from all of them alike if None.

    Raises:
        ValueError: If the grid has fewer times than a set.
    """
    count = len(linear.covariance)
    if not 1 <= samples <= count:
        raise ValueError(f"samples={samples}: pass a number from 1 to {count}, the times of the grid")
    sets = torch.tensor(list(itertools.combinations(range(count), samples)))
    information = linear.information(sets)
    chosen = (sets == start.sort().values).all(1) if start is not None else torch.ones(len(sets), dtype=torch.bool)
    return Search(linear, sets, information, exchange(information, chosen.to(information) / chosen.sum()))
