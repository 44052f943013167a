"""fishopt: optimizers that choose an estimator of the Fisher diagonal for each layer, from its variance."""

from fishopt import diagnostics as diagnostics  # namespaces
from fishopt import spectrum as spectrum
from fishopt.empirical import empirical_error
from fishopt.estimators import fisher_diagonal
from fishopt.likelihoods import Bernoulli, Categorical, Gaussian, Independent, Likelihood, Poisson, from_loss
from fishopt.optim import DiagonalNGD, FisherAdam
from fishopt.penalty import fisher_penalty
from fishopt.selection import Choice, select_estimators
from fishopt.traces import trace_bound
from fishopt.variance import fisher_bound, input_variance_bound, joint_variance, label_variance, variance_bound

__all__ = [
    "Bernoulli",
    "Categorical",
    "Choice",
    "DiagonalNGD",
    "FisherAdam",
    "Gaussian",
    "Independent",
    "Likelihood",
    "Poisson",
    "empirical_error",
    "fisher_bound",
    "fisher_diagonal",
    "fisher_penalty",
    "from_loss",
    "input_variance_bound",
    "joint_variance",
    "label_variance",
    "select_estimators",
    "trace_bound",
    "variance_bound",
]
