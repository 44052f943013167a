"""What a monitor sees of training between two steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves

from fishopt.optim.recorder import Recorder
from fishopt.passes import Arguments


class Watch(Recorder):
    """Records what is trained on for the steps that are measured, and counts inputs for the others, which is cheaper.

    It forgets what went backward when gradients are set to None, as there is no hook on zero_grad.

    Args:
        optimizer: Whose parameters' gradients tell.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(wants_gradient=True, active=True)
        self._optimizer = optimizer
        self._counted = 0

    @property
    def count(self) -> int:
        """Inputs that were trained on since the last step."""
        return self.last.count if self._records and self.last is not None else self._counted

    def prepare(self, is_due: bool) -> None:
        """After a step; for one that is measured, or not."""
        self.start_anew()
        self._active = is_due

    def start_anew(self) -> None:
        """After a step, or when gradients are set to None."""
        super().start_anew()
        self._counted = 0

    @_disable_dynamo
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Records or counts, if this is a training forward."""
        groups = self._optimizer.param_groups
        if (self._records or self._counted) and all(p.grad is None for group in groups for p in group["params"]):
            self.start_anew()
        if self._active:
            super().__call__(module, args, kwargs, output)
        elif torch.is_grad_enabled():
            leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
            trained = next((x for x in leaves if isinstance(x, Tensor) and x.requires_grad), None)
            if trained is not None:
                trained.register_hook(self._counter(args, kwargs))

    def _counter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], None]:
        """Counts a call's inputs at the first backward."""
        is_tensor = args and isinstance(args[0], Tensor) and args[0].ndim
        left = [len(args[0]) if is_tensor else Arguments(args, kwargs).count]

        def add(_: Tensor) -> None:
            self._counted += left.pop() if left else 0

        return add
