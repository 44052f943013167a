"""What a backward pass brings to outputs and losses that are watched, and whether it trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fishopt.optim.calls import LossCall

NEAR = 64
"""Outputs of autograd nodes, from the loss down, among which the model's outputs that it is of are looked for."""


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

    def add_factor(self, factor: Tensor) -> None:
        """Counts in a loss."""
        self.factor = factor if self.factor is None else self.factor + factor


class Backward:
    """A backward that is under way.

    Those for a penalty, for inputs that mislead the network, or for a picture of what it looks at, go through the same
    output as the one that trains.

    Attributes:
        arrivals: What has come to outputs so far, in this order.
        trains: Whether it adds to the gradient of a parameter.
        found_none: Whether no parameter had a gradient before.
        is_announced: Whether `at_end` will be called.

    Args:
        parameters: What is trained; if there are none, any backward trains.
        at_end: Is called when it is through, where that can be had.
    """

    def __init__(self, parameters: Sequence[Tensor], at_end: Callable[[], None]) -> None:
        # In a compiled backward there is no telling, as gradients are none yet while it is traced.
        self.is_announced = not torch.compiler.is_compiling()
        parameters = parameters if self.is_announced else ()
        self.arrivals: list[Arrival] = []
        self._parameters = parameters
        self.found_none = not self.leaves_some
        self.trains = not parameters or any(p.requires_grad and _is_reached(p) for p in parameters)
        self._before = [] if self.trains else [_mark(p) for p in parameters]
        self._by_record: dict[int, Arrival] = {}
        if self.is_announced:  # as DistributedDataParallel has itself told
            torch.autograd.Variable._execution_engine.queue_callback(at_end)

    @property
    def leaves_some(self) -> bool:
        """Whether some parameter has a gradient by now."""
        return any(p.grad is not None for p in self._parameters)

    @property
    def is_followed(self) -> bool:
        """Where it does not train: whether the user has put another gradient into a parameter since it began."""
        pairs = zip(self._parameters, self._before, strict=True)
        return any(p.grad is not None and _mark(p) != mark for p, mark in pairs)

    def to(self, record: Any) -> Arrival:
        """What is on its way to the output of a forward."""
        return self._by_record.setdefault(id(record), Arrival(record))


def current() -> int:
    """The backward that this is called from within, by number; a negative one outside of all."""
    return int(torch._C._current_graph_task_id())


def _is_reached(p: Tensor) -> bool:
    """Whether the backward under way accumulates into ``p.grad``, of which `torch.autograd.grad` does nothing."""
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(p).node))
    except RuntimeError:  # it says that this is `torch.autograd.grad`
        return False


def _mark(p: Tensor) -> tuple[int | None, int]:
    grad = p.grad
    return (None, 0) if grad is None else (id(grad), grad._version)


def sign(output: Tensor, key: str, value: Any) -> None:
    """Leaves a value in the autograd graph at an output, for as long as the graph is there."""
    if output.grad_fn is not None:
        _notes(output.grad_fn).setdefault(key, {})[output.output_nr] = value


def signed(loss: Tensor, key: str) -> list[Any]:
    """The values left at the outputs that a loss was computed from: the nearest ones, not what these came from."""
    found: list[Any] = []
    waiting, seen = deque([(loss.grad_fn, loss.output_nr)]), set[Any]()
    while waiting and len(seen) < NEAR:
        edge = waiting.popleft()
        node, number = edge
        if node is None or edge in seen:
            continue
        seen.add(edge)
        values = _notes(node).get(key, {})
        if number in values:
            found.append(values[number])
        else:
            waiting.extend(node.next_functions)
    return found


def _notes(node: Any) -> dict[str, Any]:
    notes: dict[str, Any] = node.metadata
    return notes


def is_of_one_input(x: Tensor) -> bool:
    """Whether this is a tensor within `torch.func.vmap`, which there is none of outside."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False
