"""The total error of estimates of the Fisher diagonal, per unit of compute: ``python -m benchmarks.errors``.

On MLPs that FisherAdam trains on MNIST (scikit-learn's digits without --data-dir), early in training and late: F, the
exact diagonal over the whole training set, against estimates from a few inputs drawn from it, one label each, over many
repetitions. The error of a layer and the compute of an estimate are

    error = sum_i (Fhat_i - F_i)^2 / sum_i F_i^2 ,    compute = inputs x backward passes.

Of an unbiased estimator the error is A / inputs, with A the variance over inputs and labels (Theorem 4.7), so at equal
compute what counts is A x passes. "auto" is what the optimizers' default criterion, "efficiency", picks from 8 inputs,
in many draws: its error at equal compute over the best unbiased estimator's says what the rule loses. Writes
errors.json and errors.png.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import fishopt
from benchmarks.defaults import MNIST, TABLES, load
from benchmarks.networks import mlp
from fishopt.plotting import COLOURS as ESTIMATOR_COLOURS

UNBIASED = ("I1", "I2", "exact", "hutchinson")
ESTIMATORS = (*UNBIASED, "empirical")
CANDIDATES = ("I1", "I2", "hutchinson")
"""What the optimizers choose from by the efficiency rule."""
SELECTION_INPUTS = 8
"""As in the optimizers."""
COLOURS = {**ESTIMATOR_COLOURS, "empirical": "0.6"}
SIZES = (4, 16, 64, 256)
ACTIVATIONS = {"ReLU": nn.ReLU, "Sigmoid": nn.Sigmoid}
LOSS = nn.CrossEntropyLoss()
BATCH = 128
