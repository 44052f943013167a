"""Estimates for an optimizer: which estimator each group uses, on which inputs, with which labels."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishopt.batch import Batch, NonFiniteError, checked_inputs
from fishopt.estimators import Draw, by_structure, estimate
from fishopt.groups import Groups
from fishopt.likelihoods import Gaussian, Likelihood, as_likelihood
from fishopt.optim.recorder import Record
from fishopt.passes import Diagonal, Shadow
from fishopt.selection import PAPER, Choice, choose

SELECTION_INPUTS = 8
"""Inputs that a selection looks at, at most."""

SELECTION_ELEMENTS = 2**24
"""Inputs times parameters that it looks at, at most: large networks get fewer inputs."""

FIRST_INTERVAL = 32
"""Steps from the first selection to the second; the interval doubles each time, as training slows down."""

NOISE_DECAY = 0.9
"""Decay rate, per refresh, of the moving average of the residuals' variance."""

MAX_FAILURES = 10
"""Refreshes in a row that may come out NaN or infinite before training is stopped."""

CANDIDATES = {"bound": PAPER, "exact": PAPER, "efficiency": (*PAPER, "hutchinson")}
"""What "auto" chooses from. Hutchinson's signs cost what I1 does, so they enter where cost is weighed."""


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
    """One refresh: an estimate of ``(1/N_x) sum_n I(theta_i | x_n)``, and the batch's `Moment`."""

    diagonal: Diagonal
    moment: Moment


class Curvature:
    """Estimates the Fisher diagonal of a model in training, on sub-batches of what it was last trained on.

    Args:
        model: The user's network.
        likelihood: The family behind its loss.
        estimates_noise: Whether to estimate the labels' variance, relative to the one that the likelihood assumes.
        criterion: How ``"auto"`` chooses, see `fishopt.select_estimators`.
        refresh_inputs: Inputs per estimate, at most.
        generator: Source of sub-batches and labels.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        estimates_noise: bool,
        criterion: str,
        refresh_inputs: int,
        generator: torch.Generator,
    ) -> None:
        self.criterion = criterion
        self.estimates_noise = estimates_noise
        self.seconds = 0.0
        self.failures = self.failures_in_a_row = 0
        self.choices: dict[str, Choice] = {}
        self.history: list[dict[str, Any]] = []
        self._likelihood = likelihood
        self._model = model
        self._refresh_inputs = refresh_inputs
        self._generator = generator
        self._shadow: Shadow | None = None
        self._next_selection = 0
        self._noise = self._noise_weight = 0.0

    def refresh(self, units: Groups, wanted: dict[str, str], record: Record, step: int) -> Estimate | None:
        """A new estimate for every parameter of ``units``, or None if it came out NaN or infinite.

        Args:
            units: The groups of choice.
            wanted: Group -> estimator, or ``"auto"``.
            record: The training batch.
            step: The optimizer's step, for the schedule and the history of choices.

        Raises:
            ValueError: If the inputs or the model's output are not of a kind that fishopt can use.
            RuntimeError: If too many refreshes in a row have failed.
        """
        start = time.perf_counter()
        try:
            found = self._estimate(units, wanted, record, step)
        except NonFiniteError:
            found = None
        finally:
            self.seconds += time.perf_counter() - start
        self._count(failed=found is None)
        return found

    def estimator_of(self, unit: str, wanted: dict[str, str]) -> str:
        """The estimator in use for a group."""
        return self.choices[unit].estimator if wanted[unit] == "auto" else wanted[unit]

    def _estimate(self, units: Groups, wanted: dict[str, str], record: Record, step: int) -> Estimate | None:
        inputs = checked_inputs(record.inputs)
        residuals = self._residuals(record)
        if residuals is not None and not _all_finite([residuals]):
            return None
        if self._shadow is None or not self._shadow.is_current():
            self._shadow = Shadow(self._model)
        # Drawn, not the first ones: a full batch comes in the same order each step.
        device = self._generator.device
        rows = torch.randperm(inputs.count, generator=self._generator, device=device)[: self._refresh_inputs]
        batch = Batch(self._shadow, inputs.take(rows), self._likelihood)
        self._select(batch, units, wanted, step)
        members: dict[str, list[str]] = defaultdict(list)
        for unit, names in units.items():
            members[self.estimator_of(unit, wanted)].extend(names)
        some = None if residuals is None else residuals[rows.to(residuals.device)]
        plan = by_structure(members, batch.structure)
        diagonal = estimate(batch, plan, Draw(1, self._generator, residuals=some, exact_up_to=0))
        if not _all_finite(list(diagonal.values())):
            return None
        observations = inputs.count * batch.positions
        scale = self._likelihood.gradient_scale(observations, batch.width // batch.positions)
        return Estimate(diagonal, Moment(observations, scale, self._dispersion(residuals)))

    def _residuals(self, record: Record) -> Tensor | None:
        """The cotangents eta - t(y) at the data's labels, ``[N, T]``: what backward sent to the output."""
        if record.gradient is None:
            return None
        likelihood, c = self._likelihood.at(record.gradient.to(next(self._model.parameters()).dtype))
        observations = len(c) * likelihood.positions
        return c * (observations / self._likelihood.gradient_scale(observations, c.shape[1] // likelihood.positions))

    def _dispersion(self, residuals: Tensor | None) -> float:
        """The mean of c^T I(h)^-1 c / T: for a Gaussian the variance of the residuals over the assumed one.

        A moving average over refreshes, which one without residuals leaves as it is.

        Raises:
            ValueError: If residuals were never seen.
        """
        if not self.estimates_noise:
            return 1.0
        if residuals is not None:
            new = float((residuals.square() / self._likelihood.covariance_diagonal(residuals)).mean())
            self._noise, self._noise_weight = (
                NOISE_DECAY * old + (1 - NOISE_DECAY) * x for old, x in ((self._noise, new), (self._noise_weight, 1.0))
            )
        if not self._noise_weight:
            raise ValueError(
                "the variance of the labels cannot be estimated: no backward from the output with a known scale was "
                "seen (scaler.unscale_ hides it); pass likelihood=fishopt.Gaussian(variance=<number>)"
            )
        return self._noise / self._noise_weight

    def _select(self, batch: Batch, units: Groups, wanted: dict[str, str], step: int) -> None:
        auto = {unit: names for unit, names in units.items() if wanted[unit] == "auto"}
        if not auto or (step < self._next_selection and auto.keys() <= self.choices.keys()):
            return
        size = sum(p.numel() for p in batch.shadow.parameters.values())
        count = max(1, min(SELECTION_INPUTS, SELECTION_ELEMENTS // max(size, 1)))
        few = Batch(batch.shadow, batch.inputs.take(slice(count)), self._likelihood)
        chosen = choose(few, auto, self.criterion, CANDIDATES[self.criterion], exact_up_to=0)
        self.choices = {choice.group: choice for choice in chosen}
        self.history.append({"step": step, "choices": [asdict(choice) for choice in chosen]})
        self._next_selection = max(FIRST_INTERVAL, 2 * step)

    def _count(self, *, failed: bool) -> None:
        if not failed:
            self.failures_in_a_row = 0
            return
        if self.failures == 0:
            warnings.warn(
                "a curvature refresh came out NaN or infinite (inputs, output or estimate); the last good estimate "
                "stays in use. Further ones are counted in report() without a warning.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.failures += 1
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= MAX_FAILURES:
            raise RuntimeError(
                f"{self.failures_in_a_row} curvature refreshes in a row came out NaN or infinite; lower lr or look for "
                "bad inputs"
            )

    def restorer(self) -> Callable[[], None]:
        """What puts all back as it is now, after an attempt that failed halfway: in microseconds."""
        before, random_state, selections = dict(vars(self)), self._generator.get_state(), len(self.history)

        def restore() -> None:
            # The shadow may have been left in the middle of a pass.
            vars(self).update(before, _shadow=None)
            self._generator.set_state(random_state)
            del self.history[selections:]

        return restore

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shadow": None}  # of the original's model; the copy makes its own

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit."""
        return {
            "generator": self._generator.get_state(),
            "failures": [self.failures, self.failures_in_a_row],
            "seconds": self.seconds,
            "next_selection": self._next_selection,
            "noise": [self._noise, self._noise_weight],
            "choices": [asdict(choice) for choice in self.choices.values()],
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._generator.set_state(state["generator"].cpu())
        self.failures, self.failures_in_a_row = state["failures"]
        self.seconds = state["seconds"]
        self._next_selection = state["next_selection"]
        self._noise, self._noise_weight = state["noise"]
        self.choices = {choice["group"]: Choice(**choice) for choice in state["choices"]}
        self.history = list(state["history"])


def training_likelihood(likelihood: Likelihood | nn.Module | str) -> tuple[Likelihood, bool]:
    """The family in training, and whether the labels' variance is to be estimated, relative to the family's.

    For squared loss it is, since the loss does not tell it: with a fixed one F would not shrink with the residuals, and
    an Adam-like step would stall.
    """
    family = as_likelihood(likelihood)
    if isinstance(family, Gaussian) and family.variance == "estimated":
        return family.with_variance(1.0), True
    return family, isinstance(likelihood, nn.MSELoss)


def _all_finite(tensors: list[Tensor]) -> bool:
    """By their norms, which are read at the speed of memory; a number too large to be squared counts as infinite."""
    norms = torch._foreach_norm([x for x in tensors if x.is_floating_point()])
    return bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()) if norms else True
