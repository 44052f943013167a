"""Batches that grow in training, in stages or with the gradient's noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from fishopt.checks import checked_generator
from fishopt.diagnostics.measures import Measurement
from fishopt.diagnostics.monitor import TrainingMonitor
from fishopt.optim.checks import whole

WINDOW = 8
"""Measurements that a larger batch is decided on."""


class BatchSizeSchedule(Sampler[list[int]]):
    """Batches of a data set in random order, which grow in training: a ``batch_sampler`` for torch's ``DataLoader``.

    Either in stages of equal numbers of inputs, as Liao et al. (2020) run what they call dynamic sampling, or by the
    noise of the gradient as a monitor measures it. After every 8 measurements at a size B the next size B' is taken if,
    on their average,

        tr Cov / B' > |g|^2 - tr Cov / B,    g the gradient of the batch.

    The right side is an estimate of ``|E g|^2`` without bias, so B' is then below the noise scale ``tr Cov / |E g|^2``,
    up to which more inputs to a step pay (McCandlish et al., 2018). For ``B' = 2 B`` it is the norm test of Byrd et al.
    (2012) at ``theta^2 = 2 / 3``. A batch never shrinks, so each measurement counts once: a test of the last few at
    every step would sooner or later let it grow by chance. The size is asked for when a batch begins; workers that load
    ahead lag behind by that.

    The last batch of a pass takes what is left, about half to one and a half times the size: a remainder of a few
    inputs would make as long a step as a whole batch, on very noisy gradients.

    Attributes:
        size: Of the next batch.
        seen: Inputs that were handed out.

    Args:
        count: Inputs in the data set.
        sizes: Batch sizes, ascending.
        epochs: Passes over the data that the stages divide among them; None with a monitor.
        monitor: What measures the noise; None for stages.
        generator: The order's source of randomness; torch's global one if None.

    Raises:
        ValueError: If an argument does not fit, or not exactly one of ``epochs`` and ``monitor`` is given.
        TypeError: If one is of the wrong kind.
    """

    def __init__(
        self,
        count: int,
        *,
        sizes: Sequence[int] = (16, 32, 64, 128, 256),
        epochs: int | None = None,
        monitor: TrainingMonitor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        whole("count", count)
        if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
            raise ValueError(f"sizes={sizes!r}: pass a list of one batch size or more")
        for size in sizes:
            whole("sizes", size)
        if list(sizes) != sorted(sizes):
            raise ValueError(f"sizes={sizes!r} shrink; pass them in ascending order")
        if (epochs is None) == (monitor is None):
            raise ValueError(
                f"epochs={epochs!r} and monitor={monitor!r}: pass one of them, epochs for stages of equal length or a "
                "TrainingMonitor for batches that grow with the gradient's noise"
            )
        if epochs is not None:
            whole("epochs", epochs)
        if monitor is not None and not isinstance(monitor, TrainingMonitor):
            raise TypeError(f"monitor={monitor!r}: pass a fishopt.diagnostics.TrainingMonitor")
        self._count, self._sizes, self._epochs, self._monitor = count, tuple(sizes), epochs, monitor
        self._generator = checked_generator(generator)
        self.seen = self._stage = self._since = 0

    def __iter__(self) -> Iterator[list[int]]:
        """One pass over the data."""
        device = "cpu" if self._generator is None else self._generator.device
        order = torch.randperm(self._count, generator=self._generator, device=device).tolist()
        while order:
            taken = _taken(len(order), self.size)
            rows, order = order[:taken], order[taken:]
            self.seen += taken
            yield rows

    def __len__(self) -> int:
        """Batches in the next pass; with a monitor if the size stays as it is."""
        batches = start = 0
        while start < self._count:
            size = self.size if self._epochs is None else self._planned(self.seen + start)
            start += _taken(self._count - start, size)
            batches += 1
        return batches

    @property
    def size(self) -> int:
        """See above."""
        if self._monitor is None:
            return self._planned(self.seen)
        history = self._monitor.history
        if self._stage + 1 < len(self._sizes) and len(history) - self._since >= WINDOW:
            self._stage += _pays(history[self._since :], self._sizes[self._stage + 1])
            self._since = len(history)
        return self._sizes[self._stage]

    def _planned(self, seen: int) -> int:
        total = self._count * (self._epochs or 1)
        return self._sizes[min(seen * len(self._sizes) // total, len(self._sizes) - 1)]


def _pays(recent: Sequence[Measurement], size: int) -> bool:
    """Whether a batch size is below the noise scale."""
    known = [one for one in recent if math.isfinite(one.gradient_variance)]
    squares = sum(one.gradient_square - one.gradient_variance / one.batch_size for one in known)
    return sum(one.gradient_variance for one in known) / size > squares


def _taken(left: int, size: int) -> int:
    """How many of the inputs that are left in a pass the next batch takes."""
    return left if 2 * left < 3 * size else size
