"""Which of the inputs that were trained on a refresh looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from fishopt.batch import Batch, NonFiniteError, in_full_precision
from fishopt.likelihoods import Likelihood
from fishopt.optim.record import Record
from fishopt.passes import Arguments, Shadow

INPUTS, FEWEST, LABELS = 16, 4, 256
"""Inputs of a refresh unless the user says otherwise: with one label each, at the least, and the labels that are enough
with several. An input of many takes nearly as long as so many inputs and tells less: its labels are not independent."""


def enough(labels: Tensor | None) -> int:
    """The inputs that a refresh looks at by itself, by how many of each one's labels count; None for one each."""
    if labels is None:
        return INPUTS
    each = float(labels.sum() / (labels > 0).sum())
    return min(INPUTS, max(FEWEST, round(LABELS / each)))


@dataclass(frozen=True)
class SubBatch:
    """Some of the inputs.

    Attributes:
        shadow: The network.
        likelihood: The family behind its loss.
        inputs: All of the inputs.
        rows: Which of them.
        counted: Which of their labels count, a row for each input, where some may not.
        is_whole: Whether the network runs on no fewer.
    """

    shadow: Shadow
    likelihood: Likelihood
    inputs: Arguments
    rows: Tensor
    counted: Tensor | None
    is_whole: bool = False

    @classmethod
    def drawn(
        cls, shadow: Shadow, likelihood: Likelihood, record: Record, most: int | None, generator: torch.Generator
    ) -> Self:
        """At most so many of what was trained on, or `enough`; all of the last forward if the network runs on no fewer.

        Drawn, not the first ones: a full batch comes in the same order each step.

        Raises:
            ValueError: If no argument has a row for each input.
            NonFiniteError: If none of the labels counts.
        """
        if not record.inputs.count:
            raise ValueError(
                "model was called without a tensor that has a row for each input; call optimizer.refresh(*inputs) "
                "with such tensors before step()"
            )
        inputs, recent, counted = record.inputs, record.inputs.count - record.recent, record.mask
        if shadow.structure(in_full_precision(inputs.take(slice(recent, None)))).needs_all:
            return cls(
                shadow, likelihood, inputs, torch.arange(recent, inputs.count, device="cpu"), counted, is_whole=True
            )
        rows = torch.randperm(inputs.count, generator=generator, device=generator.device)
        labels = None if counted is None else counted.reshape(inputs.count, -1).sum(1).to(rows.device)
        if labels is not None:
            rows = rows[labels[rows] > 0]
        if not len(rows):
            raise NonFiniteError("no label of the batch counts")
        return cls(shadow, likelihood, inputs, rows[: most or enough(labels)], counted)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def may_shrink(self) -> bool:
        """Whether fewer of them would do."""
        return len(self) > 1 and not self.is_whole

    def first(self, most: int) -> Self:
        """At most so many of them, or all if the network runs on no fewer."""
        return self if self.is_whole else replace(self, rows=self.rows[:most])

    def of(self, values: Tensor | None) -> Tensor | None:
        """What belongs to them."""
        return None if values is None else values[self.rows.to(values.device)]

    def batch(self) -> Batch:
        """A batch of them."""
        return Batch(self.shadow, self.inputs.take(self.rows), self.likelihood, self.of(self.counted))
