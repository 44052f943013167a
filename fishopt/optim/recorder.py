"""What an optimizer sees of training: the batches since the last step, by hooks on the model and on the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves

from fishopt.likelihoods import Likelihood
from fishopt.optim.backwards import Arrival, Backward, current, is_of_one_input, sign, signed
from fishopt.optim.calls import LossCall, Tag
from fishopt.optim.world import group_of
from fishopt.passes import Arguments

MAX_KEPT = 2**24
"""Numbers in the inputs that are kept of one step, beyond its last micro-batch."""


@dataclass
class Record:
    """What one or several forwards were trained on.

    Attributes:
        inputs: The arguments.
        count: Inputs trained on; more than are in ``inputs`` if earlier micro-batches were dropped.
        recent: How many of these the last forward took.
        parts: Forwards.
        gradient: The gradient at the output, divided by what the loss was multiplied by, if it was asked for.
        counted: Which labels count, a row for each input, where some may not.
        factor: What the loss was multiplied by, None if the loss module does not tell.
        group: The processes that share this batch's gradient, None if there is one.
        calls: The loss module's calls on the output that there was a backward through, if they were asked for.
    """

    inputs: Arguments
    count: int = 0
    recent: int = 0
    parts: int = 1
    gradient: Tensor | None = None
    counted: Tensor | None = None
    factor: Tensor | None = None
    group: Any = None
    calls: list[LossCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count = self.count or self.inputs.count
        self.recent = self.recent or self.inputs.count

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "group": self.group is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The default group, as DistributedDataParallel has it, which is copied and pickled in no other.
        vars(self).update(state, group=dist.group.WORLD if state["group"] and dist.is_initialized() else None)

    @property
    def mask(self) -> Tensor | None:
        """Which labels count, if some do not. To be asked at a refresh alone: on a GPU the answer is waited for."""
        return leaving_out(self.counted)

    def loss(self, outputs: Tensor) -> Tensor:
        """What was made smaller, as a function of the output: the calls of the loss module, times their factors."""
        return torch.stack([call.value(outputs) for call in self.calls]).sum()

    def take(self, arrival: Arrival, *, is_first: bool) -> None:
        """Adds what a backward brought, the first one or a further one."""
        mine, other = self.factor, arrival.factor
        self.factor = other if is_first else None if mine is None or other is None else mine + other
        if arrival.gradient is not None:
            self.gradient = arrival.gradient if self.gradient is None else self.gradient + arrival.gradient
        self.counted = arrival.counted
        self.calls.extend(arrival.calls)

    def is_of(self, inputs: Arguments) -> bool:
        """Whether these are its inputs."""
        mine, others = self.inputs.leaves, inputs.leaves
        return len(mine) == len(others) and all(
            a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
            for a, b in zip(mine, others, strict=True)
        )


def leaving_out(counted: Tensor | None) -> Tensor | None:
    """Which labels count; None where each input has one and all do."""
    return None if counted is None or (counted.ndim < 2 and bool(counted.all())) else counted


def joined(records: Sequence[Record], dropped: int = 0, parts: int = 0) -> Record:
    """Several micro-batches as one.

    Args:
        records: In order; of those that are not like the last, whose rows cannot follow it, only the number counts.
        dropped: Inputs of earlier ones.
        parts: How many earlier ones.
    """
    last = records[-1]
    if len(records) == 1 and not parts:
        return last
    alike = [one for one in records if one.inputs.is_like(last.inputs) and _kinds(one) == _kinds(last)]
    total = dropped + sum(one.count for one in records)
    factors = [one.factor for one in records if one.factor is not None]
    return Record(
        Arguments.joined([one.inputs for one in alike]),
        count=total,
        recent=last.recent,
        parts=parts + len(records),
        gradient=_cat([one.gradient for one in alike]),
        counted=_cat([one.counted for one in alike]),
        factor=torch.stack(factors).mean() if len(factors) == len(records) else None,
        group=next((one.group for one in reversed(records) if one.group is not None), None),
    )


class Recorder:
    """A forward hook that keeps what was trained on since the last step.

    A forward that no backward follows, as in evaluation, counts only until there is one that has been trained on. So
    does one with a backward that leaves no gradient in any parameter: where users put gradients there by themselves,
    there is no other.
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
        self._records: list[Record] = []
        self._dropped = self._parts = 0
        self._idle: list[Arrival] = []
        self._under_way: dict[int, Backward] = {}
        self._before: Record | None = None
        self._untrained: Record | None = None
        self._is_checked = False

    @property
    def _key(self) -> str:
        return f"_fishopt_record_{id(self)}"

    @property
    def records(self) -> list[Record]:
        """What has been trained on since the last step, each forward by itself, in order."""
        self._end(current())  # a step from within its backward
        if self._records:
            return list(self._records)
        return list(map(_taken, self._idle))

    @property
    def last(self) -> Record | None:
        """What has been trained on since the last step, or before it, or at least gone through the model."""
        records = self.records
        return joined(records, self._dropped, self._parts) if records else self._before or self._untrained

    def start_anew(self) -> None:
        """After a step, or when gradients are set to zero."""
        if self.records:
            self._before = self.last
        for record in self._records:
            record.calls.clear()
        self._forget()
        self._under_way = {}

    def _forget(self) -> None:
        self._records, self._idle = [], []
        self._dropped = self._parts = 0

    def is_unscaled(self) -> bool:
        """Whether the loss module tells that nothing was multiplied by anything since the last step."""
        last = self.last
        return last is not None and last.factor is not None and abs(float(last.factor) * last.parts - 1) < 1e-3

    @_disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Records, if this is a training forward."""
        if not self._active or not torch.is_grad_enabled():
            return
        trained = [x for x in tree_leaves(self._natural(output)) if isinstance(x, Tensor) and x.requires_grad]
        if not trained or is_of_one_input(trained[0]):
            return
        record = Record(Arguments(args, kwargs), group=group_of(module))
        self._untrained = record
        sign(trained[0], self._key, record)
        if self.wants_loss:
            Tag.put(trained[0], self._key, record)
        trained[0].register_hook(partial(self._at_output, record))

    def watch_loss(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook on the loss: the gradient that arrives at it is what it is multiplied by."""
        if not (self._active and isinstance(output, Tensor) and output.requires_grad and output.ndim == 0):
            return
        records = signed(output, self._key)
        if records:
            tag = Tag.of(args[0], self._key) if args else None
            call = tag.call(module, args) if tag is not None and tag.record is records[0] else None
            output.register_hook(partial(self._at_loss, records, call))

    def _at_loss(self, records: list[Record], call: LossCall | None, gradient: Tensor) -> None:
        whole = sum(record.count or 1 for record in records)
        for record in records:
            arrival = self._now().to(record)
            factor = gradient.detach() * ((record.count or 1) / whole)
            arrival.factor = factor if arrival.factor is None else arrival.factor + factor
            if call is not None:
                arrival.calls.append(replace(call, factor=gradient.detach()))

    def _at_output(self, record: Record, gradient: Tensor) -> None:
        backward = self._now()
        arrival = backward.to(record)
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
        if task not in self._under_way:
            self._under_way[task] = Backward(self.parameters, at_end=partial(self._end, task))
        return self._under_way[task]

    def _end(self, task: int) -> None:
        """Takes in what a backward has brought."""
        backward = self._under_way.pop(task, None)
        if backward is None or not backward.arrivals:
            return
        if not backward.trains:
            self._idle = backward.arrivals
            return
        if backward.found_no_gradients:
            self._forget()  # by the model's own zero_grad, or whatever set gradients to None
        self._idle = []
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
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Watches a loss that can be differentiated."""
        if self._recorder is not None:
            self._recorder.watch_loss(module, args, output)

    def __reduce__(self) -> tuple[type[LossHook], tuple[()]]:
        return LossHook, ()


def _taken(arrival: Arrival) -> Record:
    record: Record = replace(arrival.record, gradient=None, calls=[])
    record.take(arrival, is_first=True)
    return record


def _kinds(record: Record) -> list[Any]:
    tensors = (record.gradient, record.counted)
    return [None if x is None else (x.shape[1:], x.dtype) for x in tensors]


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [x for x in tensors if x is not None]
    if len(present) < len(tensors) or not present:
        return None
    return present[0] if len(present) == 1 else torch.cat(present)
