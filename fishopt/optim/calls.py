"""Calls of the loss module on a model's output: what it takes to evaluate the loss of other outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class LossCall:
    """A call of the loss module on the model's output, or on a view of it.

    Attributes:
        module: The loss.
        targets: Its further arguments.
        named: Those by keyword.
        view: Shape, strides, and offset in the output, of what it was called with.
        factor: What its value was multiplied by; known once there was a backward.
    """

    module: nn.Module
    targets: tuple[Any, ...]
    named: dict[str, Any]
    view: tuple[torch.Size, tuple[int, ...], int]
    factor: Tensor | float = 1.0

    def value(self, outputs: Tensor) -> Tensor:
        """The loss of other outputs, times its factor."""

        def alike(x: Any) -> Any:
            return x.to(outputs) if isinstance(x, Tensor) and x.is_floating_point() else x

        targets = [alike(x) for x in self.targets]
        named = {name: alike(x) for name, x in self.named.items()}
        # Not by calling it: nobody is to be told.
        (shape, strides, start), outputs = self.view, outputs.contiguous()
        viewed = outputs.as_strided(shape, strides, int(outputs.storage_offset()) + start)
        loss: Tensor = self.module.forward(viewed, *targets, **named)
        return loss * self.factor


class Tag:
    """Leads from an output to its record, for as long as there is a view of it; copied or pickled it leads nowhere.

    Attributes:
        record: What is kept of the forward that it came from.
    """

    def __init__(self, record: Any = None, start: int = 0, version: int = 0) -> None:
        self.record, self._start, self._version = record, start, version

    @classmethod
    def put(cls, output: Tensor, key: str, record: Any) -> None:
        """Tags an output whose elements lie in memory as in a copy of it."""
        if output.is_contiguous():
            tag = cls(record, int(output.storage_offset()), output._version)
            for x in (output, output._base):
                if x is not None:
                    setattr(x, key, tag)

    @staticmethod
    def of(x: Any, key: str) -> Tag | None:
        """The tag of what ``x`` is a view of, if that has not been changed in place since."""
        if not isinstance(x, Tensor):
            return None
        found: Tag | None = getattr(x, key, None) or getattr(x._base, key, None)
        return found if found is not None and found._version == x._version else None

    def call(self, module: nn.Module, x: Tensor, targets: Sequence[Any], named: Mapping[str, Any]) -> LossCall:
        """A loss module's call on ``x``, which it is the tag of."""
        view = x.shape, x.stride(), int(x.storage_offset()) - self._start
        return LossCall(module, tuple(map(_kept, targets)), {name: _kept(t) for name, t in named.items()}, view)

    def __reduce__(self) -> tuple[type[Tag], tuple[()]]:
        return Tag, ()


def _kept(argument: Any) -> Any:
    return argument.detach() if isinstance(argument, Tensor) else argument
