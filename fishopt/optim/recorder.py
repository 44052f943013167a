"""What an optimizer sees of training: the batches since the last step, by hooks on the model and on the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves

from fishopt.likelihoods import Likelihood
from fishopt.optim.backwards import Arrival, Backward, current, is_of_one_input, sign, signed
from fishopt.optim.calls import LossCall, Tag
from fishopt.optim.record import Record, joined
from fishopt.optim.world import group_of
from fishopt.passes import Arguments

MAX_KEPT = 2**24
"""Numbers in the inputs that are kept of one step, beyond its last micro-batch."""


class Recorder:
    """A forward hook that keeps what was trained on since the last step.

    A forward that no backward follows, as in evaluation, counts only until there is one that has been trained on. So
    does the last one with a backward that leaves the parameters' gradients alone, unless the user then puts some there.
    Copied or pickled along with its model it becomes inert: a copy of the model is not being trained by the optimizer.
    An optimizer that is copied along with them wakes the copy up.

    Attributes:
        wants_gradient: Keep the loss's gradient with respect to the output as well.
        wants_loss: Keep the calls of the loss module as well, and all micro-batches.
        keep: Inputs of earlier micro-batches to keep.
        parameters: What is trained; if there are none, any backward counts.

    Args:
        likelihood: Tells which labels counted, from the gradient at the output.
        readout: What picks the natural parameters from the model's output.
        wants_gradient: See above.
        keep: See above.
        active: Whether to record at all.
    """

    def __init__(
        self,
        likelihood: Likelihood | None = None,
        readout: Callable[[Any], Any] | None = None,
        *,
        wants_gradient: bool = False,
        keep: int = 0,
        active: bool = False,
    ) -> None:
        self.wants_gradient = wants_gradient
        self.wants_loss = False
        self.keep = keep
        self.likelihood, self._readout, self._active = likelihood, readout, active
        self.parameters: list[Tensor] = []
        self._records: list[Record] = []  # trained on since the last step
        self._dropped = self._parts = 0  # inputs and forwards of those that were let go
        self._under_way: dict[int, Backward] = {}  # by the engine's number; they bring more yet, or never ended
        self._idle: Backward | None = None  # the last that left the parameters alone; gradients may follow by hand
        self._is_by_hand = True  # whether they may: not after a backward that trained
        self._left_gradients = False  # whether the last that trained did; where they are gone, they were taken away
        self._unseen: Tensor | None = None  # what reached a loss of no output that is known
        self._before: Record | None = None  # what was trained on before the last step
        self._untrained: Record | None = None  # the last forward, trained on or not
        self._is_checked = False  # whether the likelihood has seen a gradient

    @property
    def _key(self) -> str:
        return f"_fishopt_record_{id(self)}"

    @property
    def records(self) -> list[Record]:
        """What has been trained on since the last step, each forward by itself, in order."""
        self._settle()
        if self._records or self._idle is None:
            return list(self._records)
        return list(map(_taken, self._idle.arrivals))

    @property
    def last(self) -> Record | None:
        """What has been trained on since the last step, or before it, or at least gone through the model."""
        records = self.records
        return joined(records, self._dropped, self._parts) if records else self._before or self._untrained

    def start_anew(self) -> None:
        """After a step, or when gradients are set to zero."""
        if self._records:
            self._before = joined(self._records, self._dropped, self._parts)
        for record in self._records:
            record.calls.clear()
        self._forget()
        self._under_way, self._unseen, self._left_gradients = {}, None, False

    def _forget(self) -> None:
        self._records, self._idle, self._is_by_hand = [], None, True
        self._dropped = self._parts = 0

    def is_unscaled(self) -> bool:
        """Whether the loss module tells that nothing was multiplied by anything since the last step."""
        last = self.last
        return last is not None and last.factor is not None and abs(float(last.factor) * last.parts - 1) < 1e-3

    @_disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """Records, if this is a training forward."""
        if not self._active or not torch.is_grad_enabled() or is_off(rest):
            return
        kwargs, output = rest
        trained = [x for x in tree_leaves(self._natural(output)) if isinstance(x, Tensor) and x.requires_grad]
        if not trained or is_of_one_input(trained[0]):
            return
        record = Record(Arguments(args, kwargs), group=group_of(module), is_within=current() >= 0)
        self._untrained = record
        sign(trained[0], self._key, record)
        if self.wants_loss:
            Tag.put(trained[0], self._key, record)
        trained[0].register_hook(partial(self._reach_output, record))

    def watch_loss(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook on the loss: the gradient that arrives at it is what it is multiplied by."""
        if not (self._active and isinstance(output, Tensor) and output.requires_grad and output.ndim == 0):
            return
        records = signed(output, self._key)
        named = dict(kwargs)
        first, *others = args or (named.pop("input", None),)
        tag = Tag.of(first, self._key)
        is_its = tag is not None and len(records) == 1 and records[0] is tag.record
        call = tag.call(module, first, others, named) if tag is not None and is_its else None
        output.register_hook(partial(self._reach_loss, records, call))

    def _reach_loss(self, records: list[Record], call: LossCall | None, gradient: Tensor) -> None:
        factor = gradient.detach()
        if not records:
            self._unseen = factor  # of outputs made within the backward, it may turn out
        whole = sum(record.count or 1 for record in records)
        for record in records:
            arrival = self._now().to(record)
            arrival.add_factor(factor * ((record.count or 1) / whole) if len(records) > 1 else factor)
            if call is not None:
                arrival.calls.append(replace(call, factor=factor))

    def _reach_output(self, record: Record, gradient: Tensor) -> None:
        backward = self._now()
        arrival = backward.to(record)
        if record.is_within and arrival.factor is None:
            arrival.factor = self._unseen
        if self.likelihood is not None and self.likelihood.leaves_out(gradient):
            if not self._is_checked:
                self.likelihood.check_gradient(gradient)
                self._is_checked = True
            arrival.counted = self.likelihood.counted_by(gradient)
        if self.wants_gradient:
            arrival.gradient = gradient.detach()
        backward.arrivals.append(arrival)

    def _now(self) -> Backward:
        """The backward that this is called from within."""
        task = current()
        backward = self._under_way.get(task)
        if backward is None:
            self._settle(but=[one for one, other in self._under_way.items() if other.is_announced])
            backward = self._under_way[task] = Backward(self.parameters, at_end=partial(self._end, task))
        return backward

    def _settle(self, but: Sequence[int] = ()) -> None:
        """Takes in what backwards have brought: a step may come from within one."""
        for task in [one for one in self._under_way if one not in but]:
            self._end(task)
        if self._idle is not None and self._is_by_hand and self._idle.is_followed:
            self._take(self._idle)

    def _end(self, task: int) -> None:
        backward = self._under_way.pop(task, None)
        if backward is None or not backward.arrivals:
            return
        if backward.trains:
            self._take(backward)
        else:
            self._idle = backward

    def _take(self, backward: Backward) -> None:
        if backward.found_none and self._left_gradients:
            self._forget()  # by the model's own zero_grad, or whatever else set them to None in between
        self._left_gradients, self._idle = backward.leaves_some, None
        self._is_by_hand = not backward.trains
        for arrival in backward.arrivals:
            is_first = not any(one is arrival.record for one in self._records)
            arrival.record.take(arrival, is_first=is_first)
            if is_first:
                self._records.append(arrival.record)
                self._trim()

    def _trim(self) -> None:
        """Lets go of the oldest micro-batches, if they hold much and there are enough inputs without."""
        kept = sum(one.count for one in self._records)
        while len(self._records) > 1:
            first = self._records[0]
            size = sum(x.numel() for one in self._records for x in one.inputs.leaves if isinstance(x, Tensor))
            if self.wants_loss or size <= MAX_KEPT or kept - first.count < self.keep:
                return
            kept -= first.count
            self._dropped += first.count
            self._parts += 1
            del self._records[0]

    def _natural(self, output: Any) -> Any:
        return output if self._readout is None else self._readout(output)

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()


class LossHook:
    """A forward hook on the loss module; copied or pickled along with the loss it tells nobody.

    Args:
        recorder: Whom it tells.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder

    @_disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """Watches a loss that can be differentiated."""
        if self._recorder is not None and not is_off(rest):
            kwargs, output = rest
            self._recorder.watch_loss(module, args, kwargs, output)

    def __reduce__(self) -> tuple[type[LossHook], tuple[()]]:
        return LossHook, ()


def is_off(rest: tuple[Any, ...]) -> bool:
    """Whether a hook was taken off within the call: torch then leaves out the keyword arguments that were asked for.

    Garbage is collected at any time, and with it an optimizer that nobody has any more.
    """
    return len(rest) < 2


def _taken(arrival: Arrival) -> Record:
    record: Record = replace(arrival.record, gradient=None, calls=[])
    record.take(arrival, is_first=True)
    return record
