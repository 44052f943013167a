"""The pass through module hooks: first derivatives of any network whose modules have rules, in plain torch.

A forward hook keeps what came into each module and where its output stands in the autograd graph; one backward pass
brings the cotangents there, and the module's rule does the rest. No weight's gradient is computed on the way, and the
graph reaches no deeper than the lowest module that is asked for. Against hooks on every module's backward this spares
most of the time of a small network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fishopt.passes.backpack import Chain
from fishopt.passes.base import SKETCH_COST, Diagonal, Pass, Sketch, add, cost_with, signs
from fishopt.passes.functional import FunctionalPass, exact_cost
from fishopt.passes.gradients import (
    SQUARES,
    VALUE,
    Reduction,
    fourth_powers,
    products,
    weighted_product_squares,
    weighted_squares,
)
from fishopt.passes.rules import Rule, rule_for
from fishopt.passes.shadow import Shadow

SMALL = 2**18
"""Numbers at the modules' outputs that a backward may bring however small the network. Beyond, as many columns go
together as take the memory of one and a half gradients, but at least three."""

MAX_GRADIENTS = 2**25
"""Numbers that one input's gradients for these columns may hold."""

BATCHED_UP_TO = 2**20
"""Above so many numbers per column vmap gains nothing over one backward for each."""


class Call(NamedTuple):
    """One module's call: its rule, its input, and its output's shape and place in the graph."""

    module: nn.Module
    rule: Rule
    a: Tensor
    edge: GradientEdge
    shape: torch.Size


def covers(shadow: Shadow, inputs: tuple[Tensor, ...], names: Sequence[str]) -> bool:
    """Whether this pass is right for the parameters ``names`` of this network."""
    key = tuple(names)
    if key not in shadow.covered:
        # Other names than these are what a reparametrisation, such as weight_norm's, makes the weight of.
        shadow.covered[key] = shadow.structure(inputs).hookable.issuperset(names) and all(
            rule_for(shadow.module.get_submodule(path)) is not None and own in {"weight", "bias"}
            for path, own in map(_split, names)
        )
    return shadow.covered[key]


class HookedPass(Pass):
    """Both primitives from the cotangents at the modules' outputs.

    Args:
        shadow: The network; `covers` must hold.
        inputs: Its positional arguments, tensors with one row per input.
        names: The parameters to differentiate. The backward pass goes no deeper than the lowest of them.
    """

    def __init__(self, shadow: Shadow, inputs: tuple[Tensor, ...], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._shadow = shadow
        self._inputs = inputs
        self._calls: dict[str, Call] = {}
        self._watched: list[tuple[Tensor, int]] = []
        owners = dict.fromkeys(_split(name)[0] for name in self.names)
        handles = [shadow.module.get_submodule(path).register_forward_hook(self._recorder(path)) for path in owners]
        try:
            with torch.enable_grad():
                self._graph: Tensor = shadow.module(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        if any(tensor._version != version for tensor, version in self._watched):
            raise RuntimeError("what went into or came out of a module was changed in place and cannot be followed")
        self._watched.clear()
        self.outputs = self._graph.detach()

    def close(self) -> None:
        self._calls.clear()
        del self._graph

    # --- first derivatives ---

    def squared_vjp(self, columns: Tensor, *, names: Sequence[str] | None = None, per_input: bool = False) -> Diagonal:
        total: Diagonal = {}
        sums: dict[str, Tensor] = {}
        for cotangents in self._backward(columns, self._by_path(names)):
            for path in [path for path in cotangents if len(columns) > 1 and len(self._calls[path].shape) == 2]:
                # One position: each entry of a parameter meets one of g, and only the sum of its squares matters.
                add(sums, {path: cotangents.pop(path).square().sum(0)})
            add(total, self._reduced(cotangents, names, SQUARES, per_input=per_input))
            del cotangents  # before there are new ones
        roots = {path: value.sqrt()[None] for path, value in sums.items()}
        return total | self._reduced(roots, names, SQUARES, per_input=per_input)

    def fourth_vjp(self, columns: Tensor, weights: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        total: Diagonal = {}
        groups, members = columns.shape[:2]
        at_once = self._columns_at_once(self._by_path(names))
        if members > at_once:
            return super().fourth_vjp(columns, weights, names=names)
        step = at_once // members
        for start in range(0, groups, step):
            some = slice(start, start + step)
            flat = columns[some].flatten(0, 1)
            cotangents = self._backward(flat, self._by_path(names), at_once=len(flat))
            add(total, self._reduced(next(cotangents), names, fourth_powers(weights[some]), per_input=False))
        return total

    def _backward(
        self, columns: Tensor, paths: Sequence[str], at_once: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Cotangents at the modules' outputs, ``[K, N, ...]`` by path, some of the columns at a time."""
        edges = [self._calls[path].edge for path in paths]
        columns = columns.reshape(len(columns), *self._graph.shape)
        parts = -(-len(columns) // (at_once or self._columns_at_once(paths)))
        for part in columns.tensor_split(parts):
            yield dict(zip(paths, self._vjp(part, edges, paths), strict=True))

    def _vjp(self, columns: Tensor, edges: list[GradientEdge], paths: Sequence[str]) -> list[Tensor]:
        size = sum(self._calls[path].shape.numel() for path in paths)
        if len(columns) > 1 and size <= BATCHED_UP_TO:
            with suppress(RuntimeError):  # an operation that vmap does not know
                found = self._grad(columns, edges, is_grads_batched=True)
                return self._filled(found, paths, len(columns))
        if len(columns) == 1:
            return [g[None] for g in self._filled(self._grad(columns[0], edges), paths, None)]
        # Each input's columns side by side, as the rules read them.
        shapes = [self._calls[path].shape for path in paths]
        stacked = [columns.new_empty((shape[0], len(columns), *shape[1:])) for shape in shapes]
        for k, column in enumerate(columns):
            for whole, g in zip(stacked, self._filled(self._grad(column, edges), paths, None), strict=True):
                whole[:, k] = g
        return [whole.transpose(0, 1) for whole in stacked]

    def _grad(self, cotangents: Tensor, edges: list[GradientEdge], **options: Any) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            self._graph, edges, cotangents, retain_graph=True, allow_unused=True, **options
        )
        return found

    def _filled(self, found: Sequence[Tensor | None], paths: Sequence[str], columns: int | None) -> list[Tensor]:
        """Zeros where the output does not depend on a module's."""
        leading = () if columns is None else (columns,)
        return [
            self._calls[path].a.new_zeros((*leading, *self._calls[path].shape)) if g is None else g
            for path, g in zip(paths, found, strict=True)
        ]

    def _columns_at_once(self, paths: Sequence[str]) -> int:
        calls = [self._calls[path] for path in paths]
        outputs = max(sum(call.shape.numel() for call in calls), 1)
        sizes = [p.numel() for call in calls for p in call.module.parameters(recurse=False)]
        # A gradient holds each output, what became of it, and itself.
        as_gradients = 3 * (sum(sizes) + 2 * outputs) // (2 * outputs)
        # A rule forms at least one input's gradient, for all of the columns.
        return max(3, SMALL // outputs, min(as_gradients, MAX_GRADIENTS // max(sizes)))

    # --- second derivatives ---

    def hessian_diagonal(
        self,
        cotangent: Tensor,
        *,
        names: Sequence[str] | None = None,
        per_input: bool = False,
        sketch: Sketch | None = None,
    ) -> Diagonal:
        return self._by_route(
            cotangent[None],
            names,
            sketch,
            closed=VALUE,
            sketched=products(),
            exact=lambda rest: self._exact(rest, cotangent, per_input=per_input),
            per_input=per_input,
        )

    def hessian_square(
        self,
        columns: Tensor,
        weights: Tensor,
        *,
        names: Sequence[str] | None = None,
        sketch: Sketch | None = None,
    ) -> Diagonal:
        by_definition = super().hessian_square
        return self._by_route(
            columns,
            names,
            sketch,
            closed=weighted_squares(weights),
            sketched=weighted_product_squares(weights),
            exact=lambda rest: by_definition(columns, weights, names=rest),
        )

    def _by_route(
        self,
        columns: Tensor,
        names: Sequence[str] | None,
        sketch: Sketch | None,
        *,
        closed: Reduction,
        sketched: Reduction,
        exact: Callable[[list[str]], Diagonal],
        per_input: bool = False,
    ) -> Diagonal:
        """Each parameter by its route: a reduction for the first two, all there is to do for the third."""
        diagonal, probed, rest = self._routes(names, sketch)
        total: Diagonal = {}
        if diagonal:
            found = self._closed(columns, diagonal)
            total.update(self._reduced(found, diagonal, closed, per_input=per_input, power=2))
        if probed:
            total.update(self._reduced(self._probed(columns, probed, sketch), probed, sketched, per_input=per_input))
        if rest:
            total.update(exact(rest))
        return total

    def hessian_cost(self, name: str, sketch: Sketch | None = None) -> int:
        if name in self._shadow.structure(self._inputs).diagonal:
            return SKETCH_COST
        return cost_with(sketch, self._exact_costs[name])

    def _routes(self, names: Sequence[str] | None, sketch: Sketch | None) -> tuple[list[str], list[str], list[str]]:
        """Which parameters go by the closed form, by the sketch, and by the exact way.

        Where nothing but one elementwise function and then affine maps lie above a layer's output ``z``, the Hessian in
        ``z`` is diagonal (Remark 4.5) and one product with it, taken at a vector of ones, is all of it.
        """
        wanted = self.names if names is None else names
        diagonal = self._shadow.structure(self._inputs).diagonal
        closed = [name for name in wanted if name in diagonal]
        rest = [name for name in wanted if name not in diagonal]
        if sketch is None:
            return closed, [], rest
        sketched = [name for name in rest if sketch.replaces(self._exact_costs[name])]
        return closed, sketched, [name for name in rest if name not in sketched]

    def _closed(self, columns: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        # One module at a time: two that feed the same smooth function have a diagonal each, and a block in common.
        return {
            path: torch.stack([self._diagonal(column, path) for column in columns]) for path in self._by_path(names)
        }

    def _diagonal(self, cotangent: Tensor, path: str) -> Tensor:
        call = self._calls[path]
        return self._hessian_product(cotangent, {path: call.a.new_ones(call.shape)})[path]

    def _probed(self, columns: Tensor, names: Sequence[str], sketch: Sketch | None) -> dict[str, Tensor]:
        """Random signs and, after all of them, their products with the Hessian: ``[2 M, N, ...]``."""
        generator = None if sketch is None else sketch.generator
        paths = self._by_path(names)
        calls = {path: self._calls[path] for path in paths}
        drawn = [{path: signs(call.shape, call.a, generator) for path, call in calls.items()} for _ in columns]
        found = [self._hessian_product(column, v) for column, v in zip(columns, drawn, strict=True)]
        return {path: torch.stack([*(v[path] for v in drawn), *(hv[path] for hv in found)]) for path in paths}

    def _hessian_product(self, cotangent: Tensor, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """``H v``, H the Hessian of ``<cotangent, h>`` in shifts of the outputs of the modules that ``v`` names."""
        edges = [self._calls[path].edge for path in v]
        with torch.enable_grad():
            first = self._grad(cotangent.reshape(self._graph.shape), edges, create_graph=True)
        moving = [(g, u) for g, u in zip(first, v.values(), strict=True) if g is not None and g.requires_grad]
        second: Sequence[Tensor | None] = [None] * len(v)
        if moving:
            second = torch.autograd.grad(
                [g for g, _ in moving], edges, [u for _, u in moving], retain_graph=True, allow_unused=True
            )
        return dict(zip(v, self._filled(second, list(v), None), strict=True))

    def _exact(self, names: list[str], cotangent: Tensor, *, per_input: bool) -> Diagonal:
        if self._chain is not None:
            with suppress(RuntimeError, AssertionError):
                return self._chain.hessian_diagonal(self._inputs, names, cotangent, per_input=per_input)
        functional = FunctionalPass(self._shadow, self._inputs, names)
        return functional.hessian_diagonal(cotangent, per_input=per_input)

    @cached_property
    def _chain(self) -> Chain | None:
        return Chain.of(self._shadow)

    @cached_property
    def _exact_costs(self) -> dict[str, int]:
        if self._chain is not None:
            return self._chain.hessian_costs(self._inputs, self.names)
        return {name: exact_cost(self._shadow.parameters[name]) for name in self.names}

    # --- the calls ---

    def _recorder(self, path: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            a = args[0].detach()
            rule = rule_for(module)
            if rule is not None:
                self._calls[path] = Call(module, rule, a, get_gradient_edge(output), output.shape)
            # A change in place of a view, as a linear layer's output on sequences is, gives it another past.
            self._watched += [(x, x._version) for x in (a, output) if x is a or x._is_view()]

        return record

    def _by_path(self, names: Sequence[str] | None) -> list[str]:
        return list(dict.fromkeys(_split(name)[0] for name in (self.names if names is None else names)))

    def _reduced(
        self,
        cotangents: dict[str, Tensor],
        names: Sequence[str] | None,
        reduction: Reduction,
        *,
        per_input: bool,
        power: int = 1,
    ) -> Diagonal:
        found = {}
        for name in self.names if names is None else names:
            path, own = _split(name)
            if path not in cotangents:
                continue
            call = self._calls[path]
            gradients = call.rule(call.module, own, call.a, cotangents[path], power)
            found[name] = gradients.reduced(reduction, per_input=per_input)
        return found


def _split(name: str) -> tuple[str, str]:
    path, _, own = name.rpartition(".")
    return path, own
