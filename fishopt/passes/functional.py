"""The pass for any module that torch.func can differentiate: per-input derivatives by vmap. Slow, general, simple."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap

from fishopt.passes.base import Diagonal, Pass
from fishopt.passes.shadow import Shadow

MAX_ELEMENTS = 2**26
"""Numbers that one chunk of Hessian rows may hold at a time."""

Parameters = dict[str, Tensor]


class FunctionalPass(Pass):
    """Both primitives through torch.func.

    Args:
        shadow: The network.
        inputs: Its positional arguments, tensors with one row per input.
        names: The parameters to differentiate.
    """

    def __init__(self, shadow: Shadow, inputs: tuple[Tensor, ...], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._inputs = inputs
        self._module = shadow.module
        held = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        self._wanted: Parameters = {name: held[name].detach() for name in self.names}
        self._rest = {name: tensor for name, tensor in held.items() if name not in self._wanted}
        with torch.no_grad():
            self.outputs = self._module(*inputs).detach()

    def squared_vjp(self, columns: Tensor, *, per_input: bool = False) -> Diagonal:
        total = {name: p.new_zeros((len(self.outputs), *p.shape)) for name, p in self._wanted.items()}
        for column in columns:
            gradients = _over_inputs(
                lambda c, *x: grad(self._inner_product)(self._wanted, c, *x), column, *self._inputs
            )
            for name, g in gradients.items():
                total[name] += g.detach().square()
        return total if per_input else {name: q.sum(0) for name, q in total.items()}

    def hessian_diagonal(self, cotangent: Tensor, *, per_input: bool = False) -> Diagonal:
        per = {name: self._hessian_diagonal_of(name, cotangent) for name in self.names}
        return per if per_input else {name: r.sum(0) for name, r in per.items()}

    def hessian_cost(self, name: str) -> int:
        # One product with the Hessian, itself about two backward passes, for every entry.
        return 2 * self._wanted[name].numel()

    def _inner_product(self, parameters: Parameters, c: Tensor, *x: Tensor) -> Tensor:
        """``<c, h(x)>`` for one input."""
        row = tuple(value.unsqueeze(0) for value in x)
        h = functional_call(self._module, {**self._rest, **parameters}, row)
        return (h.reshape(-1) * c).sum()

    def _hessian_diagonal_of(self, name: str, cotangent: Tensor) -> Tensor:
        parameter = self._wanted[name]
        size = parameter.numel()
        rows = max(1, MAX_ELEMENTS // (size * max(len(cotangent), 1)))
        parts = []
        for chosen in torch.arange(size, device=parameter.device).split(rows):
            units = torch.nn.functional.one_hot(chosen, size).to(parameter.dtype).reshape(-1, *parameter.shape)
            parts.append(_over_inputs(self._entries(name, units), cotangent, *self._inputs).detach())
        return torch.cat(parts, dim=1).reshape(-1, *parameter.shape)

    def _entries(self, name: str, units: Tensor) -> Callable[..., Tensor]:
        """Diagonal entries of one input's Hessian, for some unit vectors."""

        def of_one_input(c: Tensor, *x: Any) -> Tensor:
            def inner_product(p: Tensor) -> Tensor:
                return self._inner_product({**self._wanted, name: p}, c, *x)

            def forward_over_reverse(unit: Tensor) -> Tensor:
                return (jvp(grad(inner_product), (self._wanted[name],), (unit,))[1] * unit).sum()

            def reverse_over_reverse(unit: Tensor) -> Tensor:
                pull_back: Callable[[Tensor], tuple[Tensor]] = vjp(grad(inner_product), self._wanted[name])[1]
                return (pull_back(unit)[0] * unit).sum()

            try:
                return vmap(forward_over_reverse)(units)
            except NotImplementedError:  # an operation without a forward-mode rule
                return torch.stack([reverse_over_reverse(unit) for unit in units])

        return of_one_input


def _over_inputs(function: Callable[..., Any], *batched: Tensor) -> Any:
    """``function`` for each row, by vmap, or in a loop where an operation has no batching rule."""
    try:
        return vmap(function)(*batched)
    except RuntimeError:  # torch raises NotImplementedError, a subclass, or whatever shape error comes first
        found = [function(*row) for row in zip(*batched, strict=True)]
        if isinstance(found[0], Tensor):
            return torch.stack(found)
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}
