"""What a refresh takes in and gives out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fishopt.passes import Diagonal


class Moment(NamedTuple):
    """What makes a Fisher diagonal the second moment of the loss's gradient.

    Attributes:
        batch_size: Observations in the training batch: inputs, or where labels have positions those that count.
        scale: The loss's gradient as a multiple of that of the mean NLL.
        dispersion: The labels' variance over the one that the likelihood assumes, averaged; 1 unless it is estimated.
    """

    batch_size: int
    scale: float
    dispersion: float


class Estimate(NamedTuple):
    """One refresh: an estimate of the Fisher diagonal per observation, and the batch's `Moment`."""

    diagonal: Diagonal
    moment: Moment


class Training(NamedTuple):
    """What a refresh may need of the backward besides the inputs.

    Attributes:
        at_output: The loss's gradient with respect to the model's output.
        of: Parameter's name -> its gradient.
    """

    at_output: Tensor | None
    of: Callable[[str], Tensor | None]


class Part(NamedTuple):
    """One process's share of an estimate.

    Attributes:
        diagonal: The estimate.
        observations: What it is the mean over.
        per_input: Observations per input of the training batch.
        width: Natural parameters of one observation.
    """

    diagonal: Diagonal
    observations: int
    per_input: float
    width: int

    def numbers(self, inputs: int) -> list[float]:
        """What is summed over processes: observations used and trained on, width, and how many processes there are."""
        return [float(self.observations), inputs * self.per_input, float(self.width), 1.0]
