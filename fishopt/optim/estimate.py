"""What a refresh takes in and gives out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fishopt.passes import Diagonal

TINY = torch.finfo(torch.float32).tiny
"""The least dispersion that is divided by."""


class Moment(NamedTuple):
    """What makes a Fisher diagonal the second moment of the loss's gradient.

    Attributes:
        batch_size: Observations in the training batch: inputs, or where labels have positions those that count.
        scale: The loss's gradient as a multiple of that of the mean NLL.
        dispersion: The labels' variance over the one that the likelihood assumes, averaged; 1 unless it is estimated.
        positions: Positions of an input, that count or not, at which it has labels.
    """

    batch_size: int
    scale: float
    dispersion: float
    positions: float = 1.0


class Estimate(NamedTuple):
    """One refresh: an estimate of the Fisher diagonal per observation, and the batch's `Moment`."""

    diagonal: Diagonal
    moment: Moment


class Training(NamedTuple):
    """What a refresh may need of the backward besides the inputs.

    Attributes:
        at_outputs: The loss's gradient with respect to the model's output, of each forward that the inputs are of.
        of: Parameter's name -> its gradient.
    """

    at_outputs: list[Tensor] | None
    of: Callable[[str], Tensor | None]


class Part(NamedTuple):
    """One process's share of an estimate.

    Attributes:
        diagonal: The estimate.
        observations: What it is the mean over.
        per_input: Observations per input of the training batch.
        width: Natural parameters of one observation.
        positions: Of an input, that count or not.
    """

    diagonal: Diagonal
    observations: int
    per_input: float
    width: int
    positions: int


class Totals(NamedTuple):
    """What is known of a refresh before the estimates are, summed over the processes.

    Attributes:
        observations: Observations that the estimates are means over.
        trained_on: Observations in the training batches of the processes that have an estimate.
        width: Natural parameters of one observation.
        positions: Of an input, that count or not.
        parts: Processes that have an estimate.
        inputs: Inputs in these processes' training batches.
        everyones: Inputs in all processes' training batches.
        multiple: The training gradient as a multiple of that of the loss on all that was trained on.
        squares: The sum of squared residuals.
        expected: The same by the likelihood's variance.
    """

    observations: float
    trained_on: float
    width: float
    positions: float
    parts: float
    inputs: float
    everyones: float
    multiple: float
    squares: float
    expected: float

    @classmethod
    def of(cls, part: Part | None, inputs: int, multiple: float, residuals: tuple[float, float]) -> Self:
        """This process's share of the sums."""
        if part is None:
            return cls(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, float(inputs), multiple, *residuals)
        trained_on = inputs * part.per_input
        return cls(part.observations, trained_on, part.width, part.positions, 1.0, inputs, inputs, multiple, *residuals)

    @property
    def batch_size(self) -> int:
        """Observations trained on; a process without an estimate is taken to have as many per input as the others."""
        return round(self.trained_on * self.everyones / self.inputs)
