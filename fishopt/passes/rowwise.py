"""The last ways through a network, by plain autograd: one input at a time, or all inputs in one gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fishopt.passes.arguments import Arguments
from fishopt.passes.base import (
    SKETCH_COST,
    CoupledInputsError,
    Diagonal,
    NoSecondDerivativesError,
    Pass,
    Sketch,
    add,
    second_derivatives,
    signs,
)
from fishopt.passes.shadow import Shadow


class _Plain(Pass):
    """What both need.

    Args:
        shadow: The network.
        inputs: Its arguments.
        names: The parameters to differentiate.
    """

    def __init__(self, shadow: Shadow, inputs: Arguments, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._shadow = shadow
        self._inputs = inputs
        self._own = {name: shadow.parameters[name] for name in names}
        shadow.require(shadow.names)
        with torch.no_grad():
            self.outputs = shadow.run(inputs).detach()

    def hessian_cost(self, name: str, sketch: Sketch | None = None) -> int:
        return SKETCH_COST

    def _forward(self, inputs: Arguments) -> Tensor:
        with torch.enable_grad():
            h: Tensor = self._shadow.run(inputs)
        return h

    def _gradient(
        self, h: Tensor, cotangent: Tensor, names: Sequence[str], *, create_graph: bool = False
    ) -> dict[str, Tensor]:
        own = [self._own[name] for name in names]
        found = torch.autograd.grad(
            h, own, cotangent.reshape(h.shape), retain_graph=True, allow_unused=True, create_graph=create_graph
        )
        return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, own, found, strict=True)}


class RowwisePass(_Plain):
    """Both primitives from a forward and a backward for each input: right wherever inputs do not meet."""

    def __init__(self, shadow: Shadow, inputs: Arguments, names: Sequence[str]) -> None:
        super().__init__(shadow, inputs, names)
        alone = torch.cat([self._forward(one).detach() for one in self._rows()])
        gap = torch.linalg.vector_norm(alone - self.outputs)
        if gap > 30 * torch.finfo(alone.dtype).eps ** 0.5 * torch.linalg.vector_norm(alone):
            raise CoupledInputsError("model output for an input depends on the other inputs of the batch")

    def vjp(self, columns: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        def of_one(h: Tensor, n: int, wanted: Sequence[str]) -> Diagonal:
            found = [self._gradient(h, column, wanted) for column in columns[:, n]]
            return {name: torch.stack([g[name] for g in found]) for name in wanted}

        found = self._over_inputs(of_one, names, per_input=True)
        return {name: g.transpose(0, 1) for name, g in found.items()}

    def squared_vjp(self, columns: Tensor, *, names: Sequence[str] | None = None, per_input: bool = False) -> Diagonal:
        def of_one(h: Tensor, n: int, wanted: Sequence[str]) -> Diagonal:
            total: Diagonal = {}
            for column in columns[:, n]:
                add(total, {name: g.square() for name, g in self._gradient(h, column, wanted).items()})
            return total

        return self._over_inputs(of_one, names, per_input=per_input)

    def hessian_diagonal(
        self,
        cotangent: Tensor,
        *,
        names: Sequence[str] | None = None,
        per_input: bool = False,
        sketch: Sketch | None = None,
    ) -> Diagonal:
        """By random signs for the parameters, exactly only where no sketch is allowed."""

        def of_one(h: Tensor, n: int, wanted: Sequence[str]) -> Diagonal:
            found: Diagonal = {}
            for name in wanted:
                (g,) = self._gradient(h, cotangent[n], [name], create_graph=True).values()
                p = self._own[name]
                if sketch is None:
                    units = torch.eye(p.numel(), dtype=p.dtype, device=p.device).reshape(-1, *p.shape)
                    entries = [(self._product(g, p, unit) * unit).sum() for unit in units]
                    found[name] = torch.stack(entries).reshape(p.shape)
                else:
                    v = signs(p.shape, p, sketch.generator)
                    found[name] = v * self._product(g, p, v)
            return found

        return self._over_inputs(of_one, names, per_input=per_input)

    def _product(self, gradient: Tensor, p: Tensor, v: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(p)
        with second_derivatives():
            (found,) = torch.autograd.grad(gradient, p, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(p) if found is None else found

    def _over_inputs(
        self, of_one: Callable[[Tensor, int, Sequence[str]], Diagonal], names: Sequence[str] | None, *, per_input: bool
    ) -> Diagonal:
        wanted = self.names if names is None else tuple(names)
        total: Diagonal = {}
        for n, one in enumerate(self._rows()):
            found = of_one(self._forward(one), n, wanted)
            if per_input:
                for name, value in found.items():
                    whole = total.setdefault(name, value.new_zeros((self._inputs.count, *value.shape)))
                    whole[n] = value
            else:
                add(total, found)
        return total

    def _rows(self) -> list[Arguments]:
        return [self._inputs.take(slice(n, n + 1)) for n in range(self._inputs.count)]


class PooledPass(_Plain):
    """Squares of the whole batch's gradient: where cotangents are independent with mean zero, so are cross terms.

    An unbiased estimate then of the sum over inputs, from any network at all, whose noise does not fall with their
    number.
    """

    def vjp(self, columns: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        wanted = self.names if names is None else tuple(names)
        raise CoupledInputsError(
            f"model parameters {', '.join(map(repr, wanted[:3]))} have no derivatives per input: the model couples "
            "the inputs of a batch, or runs on whole batches alone"
        )

    def squared_vjp(self, columns: Tensor, *, names: Sequence[str] | None = None, per_input: bool = False) -> Diagonal:
        if per_input:
            self.vjp(columns, names=names)
        wanted = self.names if names is None else tuple(names)
        h, total = self._forward(self._inputs), dict[str, Tensor]()
        for column in columns:
            add(total, {name: g.square() for name, g in self._gradient(h, column, wanted).items()})
        return total

    def hessian_diagonal(
        self,
        cotangent: Tensor,
        *,
        names: Sequence[str] | None = None,
        per_input: bool = False,
        sketch: Sketch | None = None,
    ) -> Diagonal:
        raise NoSecondDerivativesError("second derivatives are taken per input, which this model does not allow")
