"""Assertions on diagonals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Diagonal = dict[str, Tensor]


def assert_close(actual: Diagonal, expected: Diagonal, *, rtol: float = 1e-8, atol: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_at_most(lower: Diagonal, upper: Diagonal, *, rtol: float = 1e-10) -> None:
    """``lower <= upper`` for every entry, up to rounding."""
    for name, value in lower.items():
        slack = upper[name] * (1 + rtol) + 1e-14 - value
        assert slack.min() >= 0, f"{name}: violated by {-slack.min():.3e}"


def z_scores(estimate: Diagonal, expected: Diagonal, variance: Diagonal) -> Tensor:
    """Standardised errors of all entries whose variance is not zero; the others must be exact."""
    scores = []
    for name, value in estimate.items():
        error, v = value - expected[name], variance[name]
        random = v > 1e-20 * expected[name].square() + 1e-30
        torch.testing.assert_close(error[~random], torch.zeros_like(error[~random]), rtol=0, atol=1e-10)
        scores.append((error / v.sqrt())[random])
    return torch.cat([s.flatten() for s in scores])


def assert_unbiased(scores: Tensor) -> None:
    """Scores of many runs ``[R, ...]`` are standard normal: the largest mean and the spread say so.

    The runs' mean has standard deviation 1/sqrt(R), so a bias of a few percent of a standard deviation shows.
    """
    runs = len(scores)
    means = scores.mean(0) * math.sqrt(runs)
    # Bonferroni over all entries, at a level of 1e-6 in total.
    limit = float(
        torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 5e-7 / means.numel(), dtype=torch.float64))
    )
    assert means.abs().max() < limit, f"bias: |z| = {means.abs().max():.2f} over {means.numel()} entries"
    spread = scores.square().mean()
    assert 0.8 < spread < 1.25, f"spread: mean square of z is {spread:.3f}"
