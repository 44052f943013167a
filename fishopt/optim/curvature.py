"""Estimates for an optimizer: which estimator each group uses, on which inputs, with which labels."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.batch import NonFiniteError, apart
from fishopt.checks import check_whole
from fishopt.estimators import Draw, by_structure, estimate
from fishopt.groups import Groups
from fishopt.likelihoods import Likelihood
from fishopt.optim.averages import precision
from fishopt.optim.estimate import TINY, Estimate, Moment, Part, Totals, Training
from fishopt.optim.failures import Attempt, Failures
from fishopt.optim.noise import Noise, residuals_of, squares
from fishopt.optim.record import Record
from fishopt.optim.subbatch import SubBatch
from fishopt.optim.world import World, group_of
from fishopt.passes import WAYS, Coverage, Diagonal, Shadow, unwrapped
from fishopt.passes.coverage import NETWORK, NONE, POOLED, ROWS
from fishopt.selection import PAPER, Choice, choose

SELECTION_INPUTS = 8
"""Inputs that a selection looks at, at most."""

SELECTION_ELEMENTS = 2**24
"""Inputs times positions times parameters that it looks at, about: large networks and long sequences get fewer inputs,
but never less than two, which is what a variance over inputs takes."""

FIRST_INTERVAL = 32
"""Steps from the first selection to the second; the interval doubles each time, as training slows down."""

CANDIDATES = {"bound": PAPER, "exact": PAPER, "efficiency": (*PAPER, "hutchinson", "exact")}
"""What "auto" chooses from. All that has no bias where cost is weighed; of variance alone the exact value has none."""


NO_MEMORY = "no choice: there was not the memory to compute variances"

WORSE = (NETWORK, ROWS, POOLED)
"""Ways that are slow, or noisy: taken with a warning."""


class Curvature:
    """Estimates the Fisher diagonal of a model in training, on sub-batches of what it was last trained on.

    Args:
        model: The user's network.
        likelihood: The family behind its loss.
        estimates_noise: Whether to estimate the labels' variance, relative to the one that the likelihood assumes.
        criterion: How ``"auto"`` chooses, see `fishopt.select_estimators`.
        refresh_inputs: Inputs per estimate, at most; if None `enough`.
        readout: What picks the natural parameters from the model's output.
        generator: Source of sub-batches and labels.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        estimates_noise: bool,
        criterion: str,
        refresh_inputs: int | None,
        readout: Callable[[Any], Any] | None,
        generator: torch.Generator,
    ) -> None:
        self.criterion = criterion
        self.estimates_noise = estimates_noise
        self.seconds = 0.0
        self.failures = Failures()
        self.noise = Noise()
        self.choices: dict[str, Choice] = {}
        self.history: list[dict[str, Any]] = []
        self._likelihood = likelihood
        self._model = model
        self._refresh_inputs = refresh_inputs
        self._readout = readout
        self._generator = generator
        self._shadow: Shadow | None = None
        self._next_selection = 0
        self._ways: dict[str, str] = {}
        self._warned: frozenset[str] = frozenset()

    @apart()
    def refresh(
        self, units: Groups, wanted: dict[str, str], record: Record, training: Training, step: int
    ) -> Estimate | None:
        """A new estimate for every parameter of ``units``, or None if there is no good one.

        Args:
            units: The groups of choice.
            wanted: Group -> estimator, or ``"auto"``.
            record: The training batch.
            training: Its gradients.
            step: The optimizer's step, for the schedule and the history of choices.

        Raises:
            ValueError: If the inputs or the model's output are not of a kind that fishopt can use.
            RuntimeError: If too many refreshes in a row have failed.
        """
        start = time.perf_counter()
        check_whole(self._model)  # it may have been sharded since
        group = record.group if record.group is not None else group_of(self._model)
        world, attempt = World(group, next(self._model.parameters()).device), Attempt()
        generator, wide = world.generator(self._generator), precision(next(self._model.parameters()))
        try:
            # The processes meet at the generator, choice, sums and mean, whatever has failed on one of them.
            some = attempt(lambda: self._drawn(record, generator))
            residuals = attempt(lambda: residuals_of(training.at_outputs, record, self._likelihood, wide))
            seen = residuals if self.estimates_noise else None
            noise = attempt.with_less(lambda own: squares(own, seen), some) or (0.0, 0.0)
            self._select(units, wanted, step, world, attempt, some)
            members = self._members(units, wanted)
            part = attempt.with_less(lambda own: self._estimated(own, members, generator, residuals), some)
            totals, found = self._merged(members, part, noise, record, training, world)
            if found is None:
                attempt.agree(world.first)
        finally:
            self.seconds += time.perf_counter() - start
        if attempt.error is not None:
            self._shadow = None  # it may have been left in the middle of a pass
        self.failures = self.failures.after(attempt.error, failed=world.size - round(totals.parts), of=world.size)
        attempt.forget()
        return found

    def way_of(self, name: str) -> str | None:
        """The way by which a parameter is covered, a key of `fishopt.passes.WAYS`; None before the first refresh."""
        return self._ways.get(name)

    @property
    def reduction(self) -> str:
        """How the loss averages, as `Likelihood.reduction`."""
        return self._likelihood.reduction

    # --- the parts of a refresh ---

    def _drawn(self, record: Record, generator: torch.Generator) -> SubBatch:
        if self._shadow is None or not self._shadow.is_current():
            self._shadow = Shadow(self._model, self._readout)
        return SubBatch.drawn(self._shadow, self._likelihood, record, self._refresh_inputs, generator)

    def _select(
        self,
        units: Groups,
        wanted: dict[str, str],
        step: int,
        world: World,
        attempt: Attempt,
        some: SubBatch | None,
    ) -> None:
        """Chooses, if it is time; the same on every process."""
        auto = {unit: names for unit, names in units.items() if wanted[unit] == "auto"}
        if not auto or (step < self._next_selection and auto.keys() <= self.choices.keys()):
            return
        chosen = attempt.with_less(lambda some: self._chosen(some, auto), some and some.first(SELECTION_INPUTS))
        if chosen is None and attempt.forgive_lack_of_memory():
            # The estimate itself may take less. Not tried again before the next selection is due.
            chosen = [self.choices.get(unit) or Choice(unit, "I1", {}, NO_MEMORY) for unit in auto]
        chosen = world.first(chosen)
        if chosen is not None:
            self.choices = {choice.group: choice for choice in chosen}
            self.history.append({"step": step, "choices": [asdict(choice) for choice in chosen]})
            self._next_selection = max(FIRST_INTERVAL, 2 * step)

    def _chosen(self, some: SubBatch, auto: Groups) -> list[Choice]:
        size = sum(p.numel() for p in some.shadow.parameters.values())
        two = some.first(2).batch()
        two.look()
        batch = some.first(max(2, SELECTION_ELEMENTS // max(size * two.positions, 1))).batch()
        return choose(batch, auto, self.criterion, CANDIDATES[self.criterion], exact_up_to=0)

    def _members(self, units: Groups, wanted: dict[str, str]) -> dict[str, list[str]]:
        """Estimator -> the parameters that it is for."""
        members: dict[str, list[str]] = defaultdict(list)
        for unit, names in units.items():
            if wanted[unit] != "auto":
                members[wanted[unit]].extend(names)
            elif unit in self.choices:
                members[self.choices[unit].estimator].extend(names)
        return members

    def _estimated(
        self,
        some: SubBatch,
        members: dict[str, list[str]],
        generator: torch.Generator,
        residuals: Tensor | None,
    ) -> Part:
        """An estimate from some inputs.

        Raises:
            NonFiniteError: If it comes out NaN or infinite.
        """
        batch = some.batch()
        plan = by_structure(members, batch.structure, batch.coverage)
        diagonal = estimate(batch, plan, Draw(1, generator, residuals=some.of(residuals), exact_up_to=0))
        if not _all_finite(list(diagonal.values())):
            raise NonFiniteError("the estimate is NaN or infinite")
        self._notice(batch.coverage)  # not before: NaNs spoil the look at which ways are right
        counted = some.counted
        per_input = batch.positions if counted is None else float(counted.sum()) / len(counted)
        return Part(diagonal, batch.observations, per_input, batch.width // batch.positions, batch.positions)

    def _merged(
        self,
        members: dict[str, list[str]],
        part: Part | None,
        noise: tuple[float, float],
        record: Record,
        training: Training,
        world: World,
    ) -> tuple[Totals, Estimate | None]:
        """The processes' estimates as one."""
        names = [name for listed in members.values() for name in listed]
        own = Totals.of(part, record.count, self._multiple(record, world), noise)
        unreached = [float(part is not None and self._ways.get(name) == NONE) for name in names]
        sums = world.sums([*own, *unreached])
        totals = Totals(*sums[: len(own)])
        if not totals.parts:
            return totals, None
        parameters = dict(unwrapped(self._model).named_parameters())
        share = own.observations / totals.observations
        diagonal = world.mean(part and part.diagonal, {name: parameters[name] for name in names}, share)
        if self.estimates_noise:
            self.noise = self.noise.after(totals.squares, totals.expected)
        scale = self._likelihood.gradient_scale(totals.batch_size, round(totals.width / totals.parts))
        moment = Moment(
            batch_size=totals.batch_size,
            scale=scale * totals.multiple / world.size,
            dispersion=self.noise.dispersion if self.estimates_noise else 1.0,
            positions=totals.positions / totals.parts,
        )
        nowhere = [count == totals.parts for count in sums[len(own) :]]
        self._fill_in(diagonal, compress(names, nowhere), training, moment)
        return totals, Estimate(diagonal, moment)

    def _fill_in(self, diagonal: Diagonal, names: Iterable[str], training: Training, moment: Moment) -> None:
        """Of parameters that the output does not depend on, what Adam would take for the gradient's second moment."""
        unit = moment.batch_size / (moment.scale**2 * max(moment.dispersion, TINY))
        for name in names:
            gradient = training.of(name)
            if gradient is None:  # nor does the loss
                del diagonal[name]
            else:
                self._warn_of(NONE, [name])
                diagonal[name] = gradient.to(diagonal[name].dtype).square() * unit

    def _multiple(self, record: Record, world: World) -> float:
        """The training gradient as a multiple of that of the loss on all that was trained on."""
        if self._likelihood.reduction == "sum":
            return 1 / world.size  # DistributedDataParallel averages what one process would have summed
        return float(record.parts) if record.is_added_up else 1.0

    def _notice(self, coverage: Coverage) -> None:
        """Keeps the ways, and warns where one is slow, or noisy."""
        if coverage.ways != self._ways:
            self._ways = dict(coverage.ways)
            for way in WORSE:
                self._warn_of(way, [name for name, other in self._ways.items() if other == way])

    def _warn_of(self, way: str, names: list[str]) -> None:
        if names and way not in self._warned:
            self._warned = self._warned | {way}
            listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            warnings.warn(f"the curvature of {listed} comes by {WAYS[way]}", RuntimeWarning, stacklevel=2)

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

    def _resume_draws(self, state: Tensor) -> None:
        if state.shape == self._generator.get_state().shape:
            self._generator.set_state(state)
        else:
            warnings.warn(
                "state_dict was written on another kind of device: the run goes on with other random labels than there",
                RuntimeWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue bit for bit."""
        return {
            "generator": self._generator.get_state(),
            "failures": list(self.failures),
            "seconds": self.seconds,
            "next_selection": self._next_selection,
            "noise": list(self.noise),
            "choices": [asdict(choice) for choice in self.choices.values()],
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._resume_draws(state["generator"].cpu())
        self.failures = Failures(*state["failures"])
        self.seconds = state["seconds"]
        self._next_selection = state["next_selection"]
        self.noise = Noise(*state["noise"])
        self.choices = {choice["group"]: Choice(**choice) for choice in state["choices"]}
        self.history = list(state["history"])


def _all_finite(tensors: list[Tensor]) -> bool:
    """By their norms, which are read at the speed of memory; a number too large to be squared counts as infinite."""
    norms = torch._foreach_norm([x for x in tensors if x.is_floating_point()])
    return bool(torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()) if norms else True
