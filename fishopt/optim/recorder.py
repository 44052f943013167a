"""The one hook that an optimizer puts on the user's model: it remembers the last training batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Record:
    """One training forward.

    Attributes:
        inputs: The positional arguments, detached.
        has_keywords: Whether keyword arguments were passed too.
        gradient: The loss's gradient with respect to the output, once backward has run, if it was asked for.
    """

    def __init__(self, inputs: tuple[Any, ...], *, has_keywords: bool = False) -> None:
        self.inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        self.has_keywords = has_keywords
        self.gradient: Tensor | None = None

    def rows(self) -> int:
        """The number of inputs."""
        return next((len(x) for x in self.inputs if isinstance(x, Tensor) and x.ndim), 0)

    def keep_gradient(self, gradient: Tensor) -> None:
        """A tensor hook for the output."""
        self.gradient = gradient.detach()


class Recorder:
    """A forward hook that keeps the last inputs seen with gradients on; evaluation under no_grad leaves no trace.

    Copied or pickled along with its model it becomes inert: a copy of the model is not being trained by the optimizer.

    Args:
        wants_gradient: Keep the loss's gradient with respect to the output as well.
        active: Whether to record at all.
    """

    def __init__(self, *, wants_gradient: bool = False, active: bool = False) -> None:
        self.wants_gradient = wants_gradient
        self.active = active
        self.last: Record | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Records, if this is a training forward."""
        trains = output.requires_grad if isinstance(output, Tensor) else torch.is_grad_enabled()
        if not self.active or not trains:
            return
        self.last = Record(args, has_keywords=bool(kwargs))
        if self.wants_gradient and isinstance(output, Tensor):
            output.register_hook(self.last.keep_gradient)

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()
