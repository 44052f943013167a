"""The pass for any module that torch.func can differentiate: per-input derivatives by vmap. Slow, general, simple."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

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
        gradients = vmap(grad(self._inner_product), in_dims=(None, 0, *self._axes))
        total = {name: p.new_zeros((len(self.outputs), *p.shape)) for name, p in self._wanted.items()}
        for column in columns:
            for name, g in gradients(self._wanted, column, *self._inputs).items():
                total[name] += g.detach().square()
        return total if per_input else {name: q.sum(0) for name, q in total.items()}

    def hessian_diagonal(self, cotangent: Tensor, *, per_input: bool = False) -> Diagonal:
        per = {name: self._hessian_diagonal_of(name, cotangent) for name in self.names}
        return per if per_input else {name: r.sum(0) for name, r in per.items()}

    def hessian_cost(self, name: str) -> int:
        # One product with the Hessian, itself about two backward passes, for every entry.
        return 2 * self._wanted[name].numel()

    @property
    def _axes(self) -> tuple[int, ...]:
        return (0,) * len(self._inputs)

    def _inner_product(self, parameters: Parameters, c: Tensor, *x: Tensor) -> Tensor:
        """``<c, h(x)>`` for one input."""
        row = tuple(value.unsqueeze(0) for value in x)
        h = functional_call(self._module, {**self._rest, **parameters}, row)
        return (h.reshape(-1) * c).sum()

    def _hessian_diagonal_of(self, name: str, cotangent: Tensor) -> Tensor:
        parameter = self._wanted[name]
        size = parameter.numel()
        rows = max(1, MAX_ELEMENTS // (size * max(len(cotangent), 1)))
        entries = vmap(self._entries(name), in_dims=(None, 0, *self._axes))
        parts = []
        for chosen in torch.arange(size, device=parameter.device).split(rows):
            units = torch.nn.functional.one_hot(chosen, size).to(parameter.dtype).reshape(-1, *parameter.shape)
            parts.append(entries(units, cotangent, *self._inputs).detach())
        return torch.cat(parts, dim=1).reshape(-1, *parameter.shape)

    def _entries(self, name: str) -> Callable[..., Tensor]:
        """Diagonal entries of one input's Hessian, for the unit vectors in the first argument."""

        def of_one_input(units: Tensor, c: Tensor, *x: Any) -> Tensor:
            def inner_product(p: Tensor) -> Tensor:
                return self._inner_product({**self._wanted, name: p}, c, *x)

            def product(unit: Tensor) -> Tensor:
                # Forward over reverse: torch has fewer gaps there than in reverse over reverse under vmap.
                row = jvp(grad(inner_product), (self._wanted[name],), (unit,))[1]
                return (row * unit).sum()

            return vmap(product)(units)

        return of_one_input
