"""What both optimizers share: recording inputs, deciding when to refresh, keeping state. No update rule."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.batch import check_finite, check_rows
from fishopt.checks import check_whole, checked_model, checked_option
from fishopt.estimators import ESTIMATORS
from fishopt.likelihoods import Likelihood
from fishopt.optim import checks
from fishopt.optim.amp import handed_over, has_overflowed, plain_gradients, unscale_gradients, unscaled
from fishopt.optim.atomic import Transaction
from fishopt.optim.averages import Average, averaged, measure
from fishopt.optim.buckets import Bucket, Members, Sorting, sort, with_gradient
from fishopt.optim.checkpoint import TRAINED
from fishopt.optim.curvature import Curvature
from fishopt.optim.estimate import Estimate, Moment, Training
from fishopt.optim.gradients import Skipped, not_finite, refuse_sparse
from fishopt.optim.noise import training_likelihood
from fishopt.optim.pace import interval
from fishopt.optim.portable import is_trial, make_room
from fishopt.optim.record import Record
from fishopt.optim.recorder import Recorder
from fishopt.optim.reporting import Reporting
from fishopt.optim.subbatch import INPUTS
from fishopt.optim.units import Params, known_as, members, parameter_groups
from fishopt.passes import Arguments, streams_kept, unwrapped
from fishopt.selection import CRITERIA


class FisherOptimizer(Reporting, ABC):
    """Base of the optimizers: a subclass adds its hyperparameters, a preconditioner and an update rule.

    These are four methods, `_check_group`, `_decay`, `_preconditioner` and `_update`, of which `examples/extending.py`
    shows the least. A parameter's state holds ``"step"``, ``"refreshes"``, ``"exp_avg"`` (zero, for the rule to use),
    ``"fisher"`` and ``"preconditioner"``; numbers that a rule adds are named in ``_scalars``, attributes in ``_kept``.

    Args:
        model: As in `FisherAdam`.
        likelihood: As there.
        params: As there.
        defaults: The rule's options, which parameter groups may name: ``"lr"`` and what it adds.
        criterion: As in `FisherAdam`, as all that follow.
    """

    _kept: tuple[str, ...] = (
        *("_model", "_name_of", "_layerwise", "_curvature", "_refresh_every", "_steps", "_is_fresh", "_moment"),
        *("_seconds", "_readout", "_skipped", "_holds", "_scale", "_grafts"),
    )
    _renewed: tuple[str, ...] = ("_sorting", "_started")
    _scalars: tuple[str, ...] = ()  # what the rule keeps of a parameter besides tensors of its shape
    _grafts_by_default = False  # whether layers have the size of their training gradients where scale is "auto"

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | nn.Module | str,
        params: Params,
        defaults: dict[str, Any],
        *,
        criterion: str = "efficiency",
        refresh_every: int = 50,
        refresh_inputs: int | None = None,
        output: Any = None,
        generator: torch.Generator | None = None,
        scale: str = "auto",
    ) -> None:
        family, estimates_noise = training_likelihood(likelihood, scale)
        by_default = scale == "auto" and self._grafts_by_default and not estimates_noise
        self._scale, self._grafts = scale, scale == "gradient" or by_default
        self._model = unwrapped(checked_model(model))
        self._readout = checks.readout(output)
        self._name_of = known_as(self._model, {})
        checked_option("criterion", criterion, CRITERIA)
        checks.whole("refresh_every", refresh_every)
        if refresh_inputs is not None:
            checks.whole("refresh_inputs", refresh_inputs)
        listed, self._layerwise = parameter_groups(params, list(self._name_of))
        super().__init__(listed, {"estimator": "auto", "maximize": False, **checks.plain(defaults)})
        source = checks.generator(generator, next(p.device for group in self.param_groups for p in group["params"]))
        self._curvature = Curvature(
            model,
            family,
            estimates_noise=estimates_noise,
            criterion=criterion,
            refresh_inputs=refresh_inputs,
            readout=self._readout,
            generator=source,
        )
        self._refresh_every = refresh_every
        self._steps, self._is_fresh = 0, False
        self._holds = TRAINED
        self._skipped = Skipped()
        self._sorting: Sorting | None = None
        self._moment = Moment(1, 1.0, 1.0)
        self._seconds = 0.0
        self._started: float | None = None
        self._recorder = Recorder(family, self._readout, keep=refresh_inputs or INPUTS, active=True)
        self._follow_model()
        self._hook_on(model, likelihood if isinstance(likelihood, nn.Module) else None)

    # --- what an update rule defines ---

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for hyperparameters out of range."""

    @abstractmethod
    def _decay(self, group: dict[str, Any]) -> float:
        """The decay rate, per refresh, of the moving average of the estimate."""

    @abstractmethod
    def _preconditioner(self, fisher: Average, group: dict[str, Any], state: dict[str, Any], moment: Moment) -> Tensor:
        """The curvature of one parameter in the form that `_update` wants it in, a tensor of the parameter's shape.

        Args:
            fisher: The averaged Fisher diagonal of one parameter; its values may be overwritten.
            group: The parameter group, with its hyperparameters.
            state: The parameter's state, for what else the rule keeps.
            moment: Batch size and scales.
        """

    @abstractmethod
    def _update(self, buckets: list[Bucket]) -> None:
        """Counts the step and moves the parameters; each one's state holds its ``"preconditioner"``."""

    def _to_trained(self) -> None:
        """Puts what is trained into the parameters, where a rule has something else in them at times."""

    def _make_room(self) -> None:
        """Makes all the state that there will be."""
        make_room(self, (*self._scalars, "energy") if self._grafts else self._scalars)

    def _prepared(
        self, estimate: Estimate | None, members: Members, closure: Any, loss: Any, transaction: Transaction
    ) -> Estimate | None:
        """What a rule computes while the step can still fail; returns the estimate that is left to be taken."""
        return estimate

    # --- torch.optim's interface ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Refreshes the curvature if it is due, then updates the parameters.

        A step whose gradients are NaN or infinite is skipped. All or nothing: an exception or KeyboardInterrupt within
        leaves parameters and state as they were before, or are after the step; lack of memory in the update may not.

        Args:
            closure: Evaluates the model and returns the loss, as with torch.optim.

        Raises:
            ValueError: If a refresh is due and the model was not called yet, or not with tensors alone.
            RuntimeError: If a gradient is sparse, or gradients or refreshes are NaN or infinite ten times in a row.
        """
        checks.closure(closure)
        if closure is None and not self.state and is_trial(self.param_groups):
            self._make_room()
            return None
        started = self._start_clock()
        loss = None
        if closure is not None:
            self._to_trained()
            with torch.enable_grad():
                loss = closure()
        self._to_trained()
        with Transaction() as transaction, torch.no_grad():
            members = with_gradient(self.param_groups)
            if not self._can_step(members):
                self._recorder.start_anew()
                return loss
            estimate = self._estimate(self._last_record(), transaction) if self._is_due(members) else None
            estimate = self._prepared(estimate, members, closure, loss, transaction)
            transaction.commit()
            unscale_gradients(self)
            if estimate is not None:
                self._take(estimate, trained=True)
            self._is_fresh = False
            self._update(self._sorted(members).buckets)
            self._steps += 1
            self._skipped = self._skipped.after_a_step()
            self._recorder.start_anew()
            self._seconds = time.perf_counter() - started
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's; what was trained on so far does not count for the next step."""
        super().zero_grad(set_to_none)
        self._recorder.start_anew()

    def refresh(self, *inputs: Tensor, **named: Tensor) -> None:
        """Refreshes the curvature now, from these inputs; the next `step` then does not.

        Needed only where the recorded inputs will not do: the arguments of the model's calls that were trained on since
        the last step.

        Args:
            *inputs: The model's positional arguments, tensors with one row per input.
            **named: Its keyword arguments.

        Raises:
            ValueError: If the inputs are empty, or contain NaN or infinite values, or if the labels' variance is to be
                estimated, as for ``nn.MSELoss``, and there was no backward yet.
            TypeError: If they are not tensors.
        """
        check_rows([*inputs, *named.values()])
        given = Arguments(inputs, named)
        check_finite(given)
        self._to_trained()
        started = self._start_clock()
        record = self._recorder.last
        if record is None or not record.is_of(given):
            record = Record(given, group=record and record.group)
        with Transaction() as transaction, torch.no_grad():
            estimate = self._estimate(record, transaction)
            transaction.commit()
            if estimate is not None:
                self._take(estimate, trained=False)
            self._is_fresh = estimate is not None
            self._seconds = time.perf_counter() - started

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of the model's parameters, with its own hyperparameters and estimator if it names them.

        Raises:
            ValueError: If a parameter is not the model's, or an option is out of range.
            TypeError: If ``param_group`` is no dict, or holds something else than parameters.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}; pass a dict with an entry 'params'")
        self._name_of = known_as(self._model, self._name_of)
        group = {**checks.plain(param_group), "params": members(param_group, self._name_of)}
        self._check_options({**self.defaults, **group})
        super().add_param_group(group)
        self._sorting = None
        if hasattr(self, "_recorder"):
            self._follow_model()

    def _check_options(self, group: dict[str, Any]) -> None:
        checked_option("estimator", group["estimator"], ("auto", *ESTIMATORS))
        self._check_group(group)

    # --- refreshing ---

    def _start_clock(self) -> float:
        if self._started is None:
            self._started = time.perf_counter() - self._seconds
        return self._started

    def _is_due(self, members: Members) -> bool:
        if self._is_fresh:
            return False
        if self._steps % interval(self._steps, self._refresh_every) == 0:
            return True
        return any(p.requires_grad for p in self._sorted(members).waiting)

    def _last_record(self) -> Record:
        record = self._recorder.last
        if record is None:
            raise ValueError(
                "step() came before any forward of model with gradients on; call model(inputs) first, or "
                "optimizer.refresh(inputs)"
            )
        return record

    def _estimate(self, record: Record, transaction: Transaction) -> Estimate | None:
        """A new estimate; None if it came out NaN or infinite."""
        groups, wanted = self._units()
        if not groups:
            check_whole(self._model)
            return Estimate({}, self._moment)
        transaction.on_failure(self._curvature.restorer())
        record = unscaled(self, record)
        training = Training(plain_gradients(self, record, self._curvature.reduction), self._gradient_of)
        with streams_kept(p.device for p in self._model.parameters()):
            return self._curvature.refresh(groups, wanted, record, training, self._steps)

    def _gradient_of(self, name: str) -> Tensor | None:
        """The training gradient of one parameter, without a GradScaler's scale."""
        grad = next(p.grad for p, own in self._name_of.items() if own == name)
        scale = handed_over(self)
        return grad if grad is None or scale is None else grad / scale.to(grad.device)

    def _take(self, estimate: Estimate, *, trained: bool) -> None:
        """Takes an estimate into the averages and preconditioners; ``trained``: the gradients are a step's."""
        if not estimate.diagonal:
            return
        started = time.perf_counter()
        self._moment, self._sorting = estimate.moment, None
        options = {self._name_of[p]: (p, group) for group in self.param_groups for p in group["params"]}
        params = {name: options[name][0] for name in estimate.diagonal}
        states = {name: self.state[p] for name, p in params.items()}
        decays = {name: self._decay(options[name][1]) for name in params}
        if self._grafts and trained:
            measure(params, states)
        for name, fisher in averaged(estimate.diagonal, params, states, decays).items():
            group, state = options[name][1], states[name]
            state["preconditioner"] = self._preconditioner(fisher, group, state, self._moment)
        self._curvature.seconds += time.perf_counter() - started

    def _sorted(self, members: Members) -> Sorting:
        """How the parameters that have a gradient now are sorted, anew only if they are others than before."""
        if self._sorting is None or not self._sorting.is_for(members, self.state):
            self._sorting = sort(members, self.state)
        return self._sorting

    def _can_step(self, members: Members) -> bool:
        """Whether all gradients are finite, as far as it is seen; a GradScaler has looked already."""
        refuse_sparse(members, self._name_of)
        if getattr(self, "found_inf", None) is not None:
            return not has_overflowed(self)
        bad = not_finite(members, self._name_of, may_wait=lambda: self._may_wait(members))
        if bad:
            self._skipped = self._skipped.after(bad)
        return not bad

    def _may_wait(self, members: Members) -> bool:
        """Whether a step may wait for the device, as it does so anyway."""
        return self._is_due(members)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Torch's contract: whether a GradScaler leaves the scaling to step(), and hands its scale over for that.

        Only where the scale is of use. Lightning does not clip gradients in mixed precision if this holds.
        """
        return self._wants_gradient() and not self._recorder.is_unscaled()

    def _wants_gradient(self) -> bool:
        return self._curvature.estimates_noise or any(g["estimator"] == "empirical" for g in self.param_groups)
