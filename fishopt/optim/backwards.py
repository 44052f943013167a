"""What a backward pass brings to outputs and losses that are watched, and whether it trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishopt.optim.calls import LossCall

NEAR = 128
"""Nodes of the autograd graph, from the loss down, among which the outputs that it is of are looked for."""


@dataclass
class Arrival:
    """What a backward brought to one output of the model.

    Attributes:
        record: What is kept of the forward that it came from.
        gradient: The gradient there, if it is wanted.
        counted: Which labels count, where some may not.
        factor: What the losses of this output were multiplied by, all together; None if no loss module tells.
        calls: These losses, if they are wanted.
    """

    record: Any
    gradient: Tensor | None = None
    counted: Tensor | None = None
    factor: Tensor | None = None
    calls: list[LossCall] = field(default_factory=list)


class Backward:
    """A backward that is under way.

    It trains if it leaves something in a parameter's ``grad``. Those for a penalty, for inputs that mislead the
    network, or for a picture of what it looks at, go through the same output and do not.

    Attributes:
        arrivals: What has come to outputs so far, in this order.

    Args:
        parameters: Whose gradients tell; if there are none, any backward trains.
        at_end: Is called when it is through.
    """

    def __init__(self, parameters: Sequence[Tensor], at_end: Callable[[], None]) -> None:
        self._parameters = parameters
        self._before = [_mark(p) for p in parameters]
        self._arrivals: dict[int, Arrival] = {}
        self.arrivals: list[Arrival] = []
        # As DistributedDataParallel has itself told.
        torch.autograd.Variable._execution_engine.queue_callback(at_end)

    @property
    def found_no_gradients(self) -> bool:
        """Whether no parameter had a gradient before, so that no earlier backward is part of what they have now."""
        return bool(self._before) and all(grad is None for grad, _ in self._before)

    @property
    def trains(self) -> bool:
        """Whether some parameter's gradient is another than before."""
        pairs = zip(self._parameters, self._before, strict=True)
        return not self._before or any(_differs(p, mark) for p, mark in pairs)

    def to(self, record: Any) -> Arrival:
        """What is on its way to the output of a forward."""
        return self._arrivals.setdefault(id(record), Arrival(record))


def current() -> int:
    """The backward that this is called from within, by number; a negative one outside of all."""
    return int(torch._C._current_graph_task_id())


def _mark(p: Tensor) -> tuple[Tensor | None, int]:
    grad = p.grad
    return grad, 0 if grad is None else grad._version


def _differs(p: Tensor, mark: tuple[Tensor | None, int]) -> bool:
    grad, version = _mark(p)
    return grad is not mark[0] or version != mark[1]


def sign(output: Tensor, key: str, value: Any) -> None:
    """Leaves a value in the autograd graph at an output, for as long as the graph is there."""
    if output.grad_fn is not None:
        _notes(output.grad_fn)[key] = value


def _notes(node: Any) -> dict[str, Any]:
    notes: dict[str, Any] = node.metadata
    return notes


def signed(loss: Tensor, key: str) -> list[Any]:
    """The values left at the outputs that a loss was computed from: the nearest ones, not what these came from."""
    found: list[Any] = []
    waiting, seen = deque([loss.grad_fn]), set[Any]()
    while waiting and len(seen) < NEAR:
        node = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        notes = _notes(node)
        if key in notes:
            found.append(notes[key])
        else:
            waiting.extend(nearer for nearer, _ in node.next_functions)
    return found


def is_of_one_input(x: Tensor) -> bool:
    """Whether this is a tensor within `torch.func.vmap`, which there is none of outside."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False
