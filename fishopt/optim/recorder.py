"""The one hook that an optimizer puts on the user's model: it remembers the last training batch."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Record:
    """One training forward.

    Attributes:
        inputs: The positional arguments, detached; keyword arguments are put in their places.
        gradient: The loss's gradient with respect to the output, once backward has run, if it was asked for.
    """

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        self.gradient: Tensor | None = None

    def is_of(self, inputs: tuple[Any, ...]) -> bool:
        """Whether these are its inputs."""
        return len(inputs) == len(self.inputs) and all(
            a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
            for a, b in zip(inputs, self.inputs, strict=True)
        )


class Recorder:
    """A forward hook that keeps the inputs that the last backward went through.

    A forward that no backward follows, as in evaluation, counts only until there is one that has been trained on.
    Copied or pickled along with its model it becomes inert: a copy of the model is not being trained by the optimizer.
    An optimizer that is copied along with them wakes the copy up.

    Attributes:
        last: The record to use.

    Args:
        wants_gradient: Keep the loss's gradient with respect to the output as well.
        active: Whether to record at all.
    """

    def __init__(self, *, wants_gradient: bool = False, active: bool = False) -> None:
        self.wants_gradient = wants_gradient
        self.active = active
        self.last: Record | None = None
        self._is_trained_on = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Records, if this is a training forward."""
        trains = output.requires_grad if isinstance(output, Tensor) else torch.is_grad_enabled()
        if not self.active or not trains:
            return
        record = Record(_positional(module, args, kwargs) if kwargs else args)
        if not self._is_trained_on:
            self.last = record
        if isinstance(output, Tensor):
            output.register_hook(partial(self._backward, record))

    def _backward(self, record: Record, gradient: Tensor) -> None:
        record.gradient = gradient.detach() if self.wants_gradient else None
        self.last, self._is_trained_on = record, True

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()


def _positional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments in the order of ``forward``'s parameters; those that only go by name are given with their name."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return (*bound.args, *bound.kwargs.items())
