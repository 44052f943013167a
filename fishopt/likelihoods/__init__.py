"""Exponential families: what the labels are, given the network's output."""

from fishopt.likelihoods.base import Interval, Likelihood, Quartic, normal, uniform, unit_columns
from fishopt.likelihoods.families import Bernoulli, Categorical, Gaussian, Poisson
from fishopt.likelihoods.independent import Independent
from fishopt.likelihoods.losses import as_likelihood, from_loss

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Independent",
    "Interval",
    "Likelihood",
    "Poisson",
    "Quartic",
    "as_likelihood",
    "from_loss",
    "normal",
    "uniform",
    "unit_columns",
]
