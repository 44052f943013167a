"""The pass for any module that torch.func can differentiate: per-input derivatives by vmap. Slow, general, simple."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap

from fishopt.passes.arguments import Arguments
from fishopt.passes.base import Diagonal, Pass, Sketch, cost_with, second_derivatives, signs
from fishopt.passes.batching import over_inputs
from fishopt.passes.shadow import Shadow
from fishopt.passes.tracing import Substituting, under

MAX_ELEMENTS = 2**26
"""Numbers that one chunk of per-input derivatives may hold."""

Parameters = dict[str, Tensor]


class FunctionalPass(Pass):
    """Both primitives through torch.func.

    Args:
        shadow: The network.
        inputs: Its arguments.
        names: The parameters to differentiate.
    """

    def __init__(self, shadow: Shadow, inputs: Arguments, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._shadow = shadow
        self._inputs, self._call = inputs.split()
        held = {**shadow.parameters, **dict(shadow.module.named_buffers())}
        self._wanted: Parameters = {name: held[name].detach() for name in self.names}
        self._rest = {name: tensor.detach() for name, tensor in held.items() if name not in self._wanted}
        with torch.no_grad():
            self.outputs = shadow.run(inputs).detach()

    def vjp(self, columns: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        wanted = self._some(names)

        def gradients(c: Tensor, *x: Tensor) -> Parameters:
            found = [grad(self._inner_product)(wanted, one, *x) for one in c.unbind(0)]
            return {name: torch.stack([g[name] for g in found]) for name in wanted}

        found = self._in_chunks(gradients, columns.transpose(0, 1), wanted, per_input=True)
        return {name: g.transpose(0, 1) for name, g in found.items()}

    def squared_vjp(self, columns: Tensor, *, names: Sequence[str] | None = None, per_input: bool = False) -> Diagonal:
        wanted = self._some(names)

        def squares(c: Tensor, *x: Tensor) -> Parameters:
            gradients = [grad(self._inner_product)(wanted, one, *x) for one in c.unbind(0)]
            return {name: torch.stack([g[name].square() for g in gradients]).sum(0) for name in wanted}

        return self._in_chunks(squares, columns.transpose(0, 1), wanted, per_input=per_input)

    def hessian_diagonal(
        self,
        cotangent: Tensor,
        *,
        names: Sequence[str] | None = None,
        per_input: bool = False,
        sketch: Sketch | None = None,
    ) -> Diagonal:
        with second_derivatives():
            return self._hessians(cotangent, self._some(names), sketch, per_input=per_input)

    def _hessians(self, cotangent: Tensor, wanted: Parameters, sketch: Sketch | None, *, per_input: bool) -> Diagonal:
        exact = [name for name in wanted if sketch is None or not sketch.replaces(self.hessian_cost(name))]
        per = {name: self._hessian_diagonal_of(name, cotangent) for name in exact}
        total = per if per_input else {name: r.sum(0) for name, r in per.items()}
        rest = {name: p for name, p in wanted.items() if name not in per}
        if rest and sketch is not None:
            total.update(self._sketched(cotangent, rest, sketch, per_input=per_input))
        return total

    def _sketched(self, cotangent: Tensor, wanted: Parameters, sketch: Sketch, *, per_input: bool) -> Diagonal:
        """Signs for the parameters themselves: of what a module puts out nothing is known here."""
        count = len(cotangent)
        v = [signs((count, *p.shape), p, sketch.generator) for p in wanted.values()]

        def product(c: Tensor, *rest: Tensor) -> Parameters:
            drawn, x = dict(zip(wanted, rest[: len(v)], strict=True)), rest[len(v) :]

            def gradient(p: Parameters) -> Parameters:
                full = grad(self._inner_product)({**self._wanted, **p}, c, *x)
                return {name: full[name] for name in wanted}

            (moved,) = vjp(gradient, wanted)[1](drawn)
            return {name: moved[name] * sign for name, sign in drawn.items()}

        return self._in_chunks(product, cotangent, wanted, *v, per_input=per_input)

    def hessian_cost(self, name: str, sketch: Sketch | None = None) -> int:
        return cost_with(sketch, exact_cost(self._wanted[name]))

    def _some(self, names: Sequence[str] | None) -> Parameters:
        return self._wanted if names is None else {name: self._wanted[name] for name in names}

    def _in_chunks(
        self, function: Callable[..., Parameters], c: Tensor, wanted: Parameters, *also: Tensor, per_input: bool
    ) -> Diagonal:
        """``function`` for each input: ``[N, *shape]``, or the sum, never with more inputs at a time than fit."""
        size = sum(p.numel() for p in wanted.values())
        step = max(1, MAX_ELEMENTS // max(size, 1))
        parts = []
        for start in range(0, len(c), step):
            rows = slice(start, start + step)
            found = over_inputs(function, c[rows], *(x[rows] for x in also), *(x[rows] for x in self._inputs))
            parts.append({name: q.detach() if per_input else q.detach().sum(0) for name, q in found.items()})
        join = torch.cat if per_input else _total
        return {name: join([part[name] for part in parts]) for name in wanted}

    def _inner_product(self, parameters: Parameters, c: Tensor, *x: Tensor) -> Tensor:
        """``<c, h(x)>`` for one input."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self._shadow.module, {**self._rest, **parameters}, args, kwargs)

        rows = [value.unsqueeze(0) for value in x]
        h = under(Substituting(), lambda: self._shadow.read(self._call(rows, forward)))
        return (h.reshape(-1) * c).sum()

    def _hessian_diagonal_of(self, name: str, cotangent: Tensor) -> Tensor:
        parameter = self._wanted[name]
        size = parameter.numel()
        rows = max(1, MAX_ELEMENTS // (size * max(len(cotangent), 1)))
        parts = []
        for chosen in torch.arange(size, device=parameter.device).split(rows):
            units = torch.nn.functional.one_hot(chosen, size).to(parameter.dtype).reshape(-1, *parameter.shape)
            parts.append(over_inputs(self._entries(name, units), cotangent, *self._inputs).detach())
        return torch.cat(parts, dim=1).reshape(-1, *parameter.shape)

    def hessians(self, cotangent: Tensor) -> Tensor:
        """The Hessian of ``<c, h>`` in all parameters in a row, for each input: ``[N, P, P]``."""
        sizes = [p.numel() for p in self._wanted.values()]
        flat = torch.cat([p.flatten() for p in self._wanted.values()])

        def of_one_input(c: Tensor, *x: Tensor) -> Tensor:
            def inner_product(theta: Tensor) -> Tensor:
                parts = zip(self._wanted.items(), theta.split(sizes), strict=True)
                return self._inner_product({name: part.reshape(p.shape) for (name, p), part in parts}, c, *x)

            found: Tensor = hessian(inner_product)(flat)
            return found

        with second_derivatives():
            whole: Tensor = over_inputs(of_one_input, cotangent, *self._inputs)
        return whole.detach()

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


def exact_cost(parameter: Tensor) -> int:
    """Backward passes of an exact Hessian diagonal: a product with the Hessian, about two of them, for every entry."""
    return 2 * parameter.numel()


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)
