"""The parameters that move together in a step: sorted once, for as long as the same ones have gradients."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, TypeVar

import torch
from torch import Tensor

from fishopt.optim.averages import follow, precision
from fishopt.optim.sampling import Measured

State = dict[str, Any]
M = TypeVar("M", bound=Measured)

ROUNDED = 2**22
"""Entries, about, that are copied to float32 at a time."""

PART = 2**18
"""Entries that are worked on at a time, on a CPU: fewer, and each part's fixed costs show."""


@dataclass
class Bucket:
    """Parameters of one group, on one device and of one dtype, that have made equally many steps.

    Attributes:
        group: The parameter group. Its hyperparameters are read anew each step: schedulers change them.
        params: The parameters; each has a gradient and an estimate.
        states: The optimizer's state of each.
        step: The count of steps, of each.
        is_rounded: Whether they have less precision than the step.
        measure: What updates are measured by, once they were.
    """

    group: dict[str, Any]
    step: int
    is_rounded: bool = False
    params: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    measure: Measured | None = None

    def advance(self) -> None:
        """Counts a step."""
        self.step += 1
        for state in self.states:
            state["step"] = self.step

    def share(self, lr: float) -> float:
        """Takes the step's iterate into the average, by the weight of the largest learning rate so far, squared.

        Returns:
            The share that it has in the average.
        """
        largest, averaged = _weights(self.states[0])
        if lr > largest:  # weights are counted in units of the last one
            averaged, largest = averaged * (largest / lr) ** 2, lr
        averaged += 1
        for state in self.states:
            state["lr_max"], state["averaged"] = largest, averaged
        return 1 / averaged

    def measured(self, kind: type[M], *tensors: list[Tensor]) -> M:
        """What updates are measured by, made anew only where these tensors are others than before."""
        if not isinstance(self.measure, kind) or not self.measure.is_of(*tensors):
            self.measure = kind(*tensors)
        return self.measure

    def kept(self, name: str) -> list[Tensor]:
        """An entry of every parameter's state."""
        return [state[name] for state in self.states]

    def grads(self) -> list[Tensor]:
        """The gradients of what is to be minimized."""
        grads = [p.grad for p in self.params if p.grad is not None]
        return list(torch._foreach_neg(grads)) if self.group["maximize"] and grads else grads

    def widened(self, tensors: list[Tensor]) -> list[Tensor]:
        """Parameters or gradients in the precision of the step: themselves if it is their own, else copies."""
        return [x.to(precision(x)) for x in tensors] if self.is_rounded else tensors

    def narrow(self, params: list[Tensor], moved: list[Tensor]) -> None:
        """Rounds what `widened` made of the parameters, once it is moved, into these."""
        if self.is_rounded:
            torch._foreach_copy_(params, moved)


Members = list[tuple[dict[str, Any], list[Tensor]]]
"""Each parameter group with those of its parameters that have a gradient."""


@dataclass
class Sorting:
    """Parameters sorted into buckets.

    Attributes:
        members: What was sorted.
        states: The optimizer's state then, and of how many parameters.
        kinds: In each group, the dtype of each of them then, and the device of the first.
        buckets: The parameters that have an estimate.
        waiting: Those that have none.
    """

    members: Members
    states: tuple[Any, int]
    kinds: list[list[Any]]
    buckets: list[Bucket] = field(default_factory=list)
    waiting: list[Tensor] = field(default_factory=list)

    def is_for(self, members: Members, states: dict[Tensor, State]) -> bool:
        """Whether it is of just these groups and parameters, by identity, as they are, and of this state."""
        known, count = self.states
        return (
            known is states
            and count == len(states)
            and len(members) == len(self.members)
            and all(
                group is other
                and len(params) == len(others)
                and all(map(operator.is_, params, others))
                and _kinds(params) == kinds
                for (group, params), (other, others), kinds in zip(members, self.members, self.kinds, strict=True)
            )
        )


def _kinds(params: list[Tensor]) -> list[Any]:
    """What may have changed of the same parameters, after `model.to`; at a tenth of a microsecond each."""
    return [*map(_dtype, params), params[0].device] if params else []


_dtype = operator.attrgetter("dtype")


def with_gradient(groups: Iterable[dict[str, Any]]) -> Members:
    """The parameters that have a gradient, by group."""
    return [(group, [p for p in group["params"] if p.grad is not None]) for group in groups]


def sort(members: Members, states: dict[Tensor, State]) -> Sorting:
    """Sorts the parameters that have a gradient.

    Args:
        members: These parameters, by group.
        states: The optimizer's state; parameters of which it counts ``"refreshes"`` have an estimate.
    """
    buckets: dict[Any, Bucket] = {}
    found = Sorting(members, (states, len(states)), [_kinds(params) for _, params in members])
    rounded = 0
    for i, (group, params) in enumerate(members):
        for p in params:
            state = states.get(p, {})
            if not state.get("refreshes"):
                found.waiting.append(p)
                continue
            follow(p, state)
            is_rounded = p.dtype != precision(p)
            rounded += is_rounded * p.numel()
            # Contiguous ones apart, so that a few others do not decide how all are updated.
            alike = (state["step"], *_weights(state), state.get("stretch"), state.get("beta"))
            key = (i, p.device, p.dtype, alike, p.is_contiguous(), rounded // ROUNDED)
            bucket = buckets.setdefault(key, Bucket(group, state["step"], is_rounded))
            bucket.params.append(p)
            bucket.states.append(state)
    found.buckets.extend(buckets.values())
    return found


def _weights(state: State) -> tuple[float, float]:
    return state.get("lr_max", 0.0), state.get("averaged", 0.0)


def in_parts(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Lists of tensors in parts of about `PART` entries, all lists cut alike, large tensors into flat views.

    Scalars go along with each view of the tensors that they are listed beside.

    A temporary of a part's size is used again for the next part, and stays in cache. A large one is new memory in each
    step, which takes the system longer to hand out than the step itself. On other devices than a CPU, whose memory is
    kept at hand, there is one part.
    """
    first = lists[0]
    if first[0].device.type != "cpu" or sum(x.numel() for x in first) <= PART:
        yield lists
        return
    part: tuple[list[Tensor], ...] = tuple([] for _ in lists)
    filled = 0
    for tensors in zip(*lists, strict=True):
        pieces: Iterable[tuple[Tensor, ...]] = [tensors]
        if tensors[0].numel() > PART and all(x.is_contiguous() for x in tensors):
            pieces = zip(*(x.view(-1).split(PART) if x.ndim else repeat(x) for x in tensors), strict=False)
        for piece in pieces:
            if filled and filled + piece[0].numel() > PART:
                yield part
                part, filled = tuple([] for _ in lists), 0
            for listed, x in zip(part, piece, strict=True):
                listed.append(x)
            filled += piece[0].numel()
    yield part
