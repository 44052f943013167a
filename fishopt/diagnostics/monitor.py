"""Watching a training run by hooks: whatever the optimizer, without a change to the loop or to its numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from fishopt.batch import Batch, NonFiniteError, apart
from fishopt.checks import check_flag, checked_generator, checked_model
from fishopt.diagnostics.measures import Measurement, condition_number, fisher_moments, gradient_moments
from fishopt.diagnostics.watch import Watch
from fishopt.likelihoods import Likelihood, as_likelihood
from fishopt.likelihoods.base import COLUMN_LIMIT
from fishopt.optim.amp import plain_gradients, unscaled
from fishopt.optim.averages import precision
from fishopt.optim.checks import whole
from fishopt.optim.record import Record, leaving_out
from fishopt.optim.recorder import LossHook
from fishopt.passes import Shadow, streams_kept, unwrapped

GRAM_INPUTS = 512
"""Inputs that the condition number is of, at most; of a larger batch so many are drawn."""

FISHER_INPUTS = 16
"""Inputs that the trace and its estimator's variance are of, at most."""

FISHER_COLUMNS = 2048
"""Inputs times outputs that these take, about; but two inputs at least, which is what a variance takes."""


class TrainingMonitor:
    """Watches a training run by hooks; the loop stays as it is, and so do its numbers, bit for bit.

    Of the batch B that each k-th step is trained on, J holds the gradients of the single inputs at the data's labels.
    With e the singular values of J (Liao et al., 2020):

    - ``C_k = max e / min e``, over the e that are not zero, and `condition`, its mean over the steps measured;
    - `length`, ``L_K = sum_k alpha_k / B_k |J_k|_F``, alpha the learning rate. Rate and batch size are those of each
      step; ``|J|_F`` is the last measured one. Where parameter groups have rates of their own, ``alpha |J|_F`` is the
      norm of J with each group's columns times its rate.

    J is the network's in eval mode (no dropout, running statistics in batch norm), at the residuals of the output that
    was trained on. The batch is all that went backward since the last step, unless gradients were set to None since;
    several micro-batches count as averaged, and of some that differ in shape only those like the last are looked at. It
    stays on the model, loss and optimizer until `detach`. In mixed precision the scale is only seen at a loss module.

    A measurement that fails is warned of once, and counted in `failures`. The default pace costs about 3 % of a small
    network's training time (``python -m benchmarks.monitor``).

    Attributes:
        every: Steps from one measurement to the next.
        history: What was measured, in order.
        failures: Measurements that failed.
        steps: Steps watched.

    Args:
        model: The network.
        loss_fn: The loss module in use, a `Likelihood`, or its name.
        optimizer: Any of torch's or fishopt's, on parameters of the model.
        every: Steps from one measurement to the next.
        normalize: Whether ``|J|_F`` is divided by the root of B, as for the mean of squares; in the authors' code it is
            not. Of no effect on condition numbers.
        generator: Draws the inputs that are looked at where not all are.

    Raises:
        ValueError: If an argument does not fit: a loss without a likelihood, a group without a numeric learning rate.
        TypeError: If one is of the wrong kind.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Likelihood | nn.Module | str,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 600,
        normalize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        whole("every", every)
        check_flag("normalize", normalize)
        self._likelihood = as_likelihood(loss_fn)
        self._model = unwrapped(checked_model(model))
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise TypeError(
                "model is in DistributedDataParallel, and a monitor sees one process; pass model.module, to watch this "
                "process's part of each batch"
            )
        self._names = _named_groups(self._model, optimizer)
        self._optimizer, self.every, self._normalize = optimizer, every, normalize
        self._generator = checked_generator(generator) or torch.Generator().manual_seed(0)
        self._shadow: Shadow | None = None
        self.history: list[Measurement] = []
        self.failures = self.steps = 0
        self._norms: list[float] | None = None
        self._length = 0.0
        self._recorder = Watch(optimizer)
        hooks = [model.register_forward_hook(self._recorder, with_kwargs=True)]
        if isinstance(loss_fn, nn.Module):
            hooks.append(loss_fn.register_forward_hook(LossHook(self._recorder), with_kwargs=True))
        hooks.append(optimizer.register_step_pre_hook(self._before_step))
        hooks.append(optimizer.register_step_post_hook(lambda *_: self._recorder.prepare(self.steps % self.every == 0)))
        self._hooks = ExitStack()
        for hook in hooks:
            self._hooks.callback(hook.remove)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Takes the hooks off; what was measured stays. Once or several times is the same."""
        self._hooks.close()
        self._recorder = Watch(self._optimizer)  # lets go of the last batch

    @property
    def condition(self) -> float:
        """The mean of ``C_k`` over the steps measured; NaN if there are none."""
        known = [one.condition for one in self.history if math.isfinite(one.condition)]
        return sum(known) / len(known) if known else math.nan

    @property
    def length(self) -> float:
        """``L_K`` up to now. Steps before the first measurement that succeeded do not count."""
        return self._length

    # --- hooks ---

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimizer
        if closure is None:
            self._count()
            return None
        return args[:1], {**kwargs, "closure": self._watched(closure)}

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure; after its first call, which is where the step starts from, the step is counted."""
        is_first = True

        def call() -> Any:
            nonlocal is_first
            loss = closure()
            if is_first:
                is_first = False
                self._count()
            return loss

        return call

    def _count(self) -> None:
        if self.steps % self.every == 0:
            try:
                self._measure(self._recorder.last if self._recorder.records else None)
            except Exception as error:  # noqa: BLE001 - the model is the user's, and may raise anything
                self._fail(error)
        if self._norms is not None and self._recorder.count:
            rates = [float(group["lr"]) for group in self._optimizer.param_groups]
            pairs = zip(rates, self._norms, strict=False)  # a group may have been added since
            self._length += math.hypot(*(rate * norm for rate, norm in pairs)) / self._recorder.count
        self.steps += 1

    def _fail(self, error: Exception) -> None:
        self._shadow = None  # it may have been left in the middle of a pass
        self.failures += 1
        if self.failures == 1:
            warnings.warn(
                f"a measurement of TrainingMonitor failed: {error}. Training goes on; further failures are counted in "
                "its attribute failures, without a warning.",
                RuntimeWarning,
                stacklevel=2,
            )

    # --- measuring ---

    @apart()
    @torch.no_grad()
    def _measure(self, record: Record | None) -> None:
        if record is None:
            raise ValueError("step() came before any backward through the model; call loss.backward() first")
        if not record.inputs.count:
            raise ValueError("the model was called without a tensor that has a row for each input")
        residuals, counted = self._residuals(record)
        self._names = _named_groups(self._model, self._optimizer)
        with streams_kept(p.device for p in self._model.parameters()):
            shadow, self._shadow = self._current_shadow(), None
            rows = torch.randperm(record.inputs.count, generator=self._generator, device=self._generator.device)
            rows = rows[:GRAM_INPUTS]
            batch = Batch(shadow, record.inputs.take(rows), self._likelihood, _of(counted, rows))
            scores = self._gram(batch, residuals[rows.to(residuals.device)])
            some = rows[: max(2, min(FISHER_INPUTS, FISHER_COLUMNS // batch.width))]
            fisher = Batch(shadow, record.inputs.take(some), self._likelihood, _of(counted, some))
            moments = fisher_moments(fisher, self._trained) if batch.width <= COLUMN_LIMIT else (math.nan,) * 3
        norms = [self._scaled(float(part.trace()), len(rows), record.count) for part in scores]
        gram = torch.stack(scores).sum(0)
        square, variance = gradient_moments(gram, record.count)
        found = Measurement(
            self.steps,
            float(self._optimizer.param_groups[0]["lr"]),
            record.count,
            condition_number(gram),
            math.hypot(*norms),
            square,
            variance,
            *moments,
        )
        self._shadow, self._norms = shadow, norms
        self.history.append(found)

    @property
    def _trained(self) -> list[str]:
        return [name for group in self._names for name in group]

    def _scaled(self, square: float, seen: int, count: int) -> float:
        """``|J|_F`` of the whole batch, from its square over the inputs that were seen."""
        return (square * (1 if self._normalize else count) / seen) ** 0.5

    def _current_shadow(self) -> Shadow:
        is_current = self._shadow is not None and self._shadow.is_current()
        return self._shadow if is_current and self._shadow is not None else Shadow(self._model)

    def _residuals(self, record: Record) -> tuple[Tensor, Tensor | None]:
        """Cotangents at the output, ``[N, T]``, such that the mean over inputs of what they pull back is the gradient.

        And which labels count, where some may not.

        Raises:
            ValueError: If their scale is not to be known.
            NonFiniteError: If they are NaN or infinite.
        """
        record = unscaled(self._optimizer, record)
        gradients = plain_gradients(self._optimizer, record, self._likelihood.reduction)
        if gradients is None:
            raise ValueError("the loss was multiplied by a number that was not seen; pass the loss module as loss_fn")
        gradient = torch.cat(gradients)
        is_sum = record.parts == 1 or self._likelihood.reduction == "sum" or record.is_added_up
        _, c = self._likelihood.at(gradient.to(precision(next(self._model.parameters()))))
        counted = None
        if self._likelihood.leaves_out(gradient):
            self._likelihood.check_gradient(gradient)
            counted = leaving_out(self._likelihood.counted_by(gradient))
        if not c.isfinite().all():
            raise NonFiniteError("the gradient at the model's output is NaN or infinite")
        return c * (record.count / (1 if is_sum else record.parts)), counted

    def _gram(self, batch: Batch, residuals: Tensor) -> list[Tensor]:
        """``J J^T`` of each parameter group's columns, ``[N, N]``."""
        nothing = residuals.new_zeros(len(batch), len(batch))
        with batch.whole() as (through, _, _, _):
            return [through.gram(residuals[None], names=names)[0, :, 0] if names else nothing for names in self._names]


def _named_groups(model: nn.Module, optimizer: Any) -> list[list[str]]:
    """The names of each parameter group's trainable parameters.

    Raises:
        TypeError: If it is no optimizer.
        ValueError: If a parameter is not the model's, or a group has no numeric learning rate.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer={optimizer!r}: pass a torch.optim.Optimizer")
    name_of = {p: name for name, p in model.named_parameters()}
    found = []
    for i, group in enumerate(optimizer.param_groups):
        lr = group.get("lr")
        if isinstance(lr, str) or not isinstance(lr, int | float | Tensor):
            raise ValueError(f"optimizer group {i} has lr={lr!r}; TrainingMonitor needs a number, for its length L_K")
        if any(p not in name_of for p in group["params"]):
            raise ValueError(
                f"optimizer group {i} holds a parameter that is not model's; pass the model that it trains"
            )
        found.append([name_of[p] for p in group["params"] if p.requires_grad])
    return found


def _of(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows.to(values.device)]
