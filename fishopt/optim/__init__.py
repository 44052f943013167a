"""Optimizers: the only room that joins model, curvature and update."""

from fishopt.optim.adam import FisherAdam
from fishopt.optim.ngd import DiagonalNGD

__all__ = ["DiagonalNGD", "FisherAdam"]
