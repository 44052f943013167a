"""Both primitives of a traced forward: the Hessian's by three routes.

Where nothing but one elementwise function and then affine maps lie above a contact's output ``z``, the Hessian in ``z``
is diagonal (Remark 4.5) and one product with it, taken at a vector of ones, is all of it. Elsewhere it is computed
exactly, or sketched by random signs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor

from fishopt.passes.backpack import Chain
from fishopt.passes.backward import AtContacts, Backward
from fishopt.passes.base import (
    SKETCH_COST,
    Diagonal,
    NoSecondDerivativesError,
    Sketch,
    cost_with,
    second_derivatives,
    signs,
)
from fishopt.passes.functional import FunctionalPass, exact_cost
from fishopt.passes.reductions import VALUE, Reduction, products, weighted_product_squares, weighted_squares
from fishopt.passes.rowwise import RowwisePass


class TracedPass(Backward):
    """Adds second derivatives to `Backward`, whose arguments it takes."""

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
            otherwise=lambda rest, own: self._otherwise(rest, cotangent, own, per_input=per_input),
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
            otherwise=lambda rest, own: by_definition(columns, weights, names=rest, sketch=own),
        )

    def _by_route(
        self,
        columns: Tensor,
        names: Sequence[str] | None,
        sketch: Sketch | None,
        *,
        closed: Reduction,
        sketched: Reduction,
        otherwise: Callable[[list[str], Sketch | None], Diagonal],
        per_input: bool = False,
    ) -> Diagonal:
        """Each parameter by its route: a reduction for the first two, all there is to do for the others."""
        diagonal, probed, exact, foreign = self._routes(names, sketch)
        total: Diagonal = {}
        if diagonal:
            found = self._closed(columns, diagonal)
            total.update(self._reduced(found, diagonal, closed, per_input=per_input, power=2))
        if probed:
            total.update(self._reduced(self._probed(columns, probed, sketch), probed, sketched, per_input=per_input))
        if exact:
            total.update(otherwise(exact, None))
        if foreign:
            total.update(otherwise(foreign, sketch))
        return total

    def hessian_cost(self, name: str, sketch: Sketch | None = None) -> int:
        if name in self._diagonal:
            return SKETCH_COST
        return cost_with(sketch, self._exact_costs[name])

    def _routes(
        self, names: Sequence[str] | None, sketch: Sketch | None
    ) -> tuple[list[str], list[str], list[str], list[str]]:
        """Which parameters go by the closed form, by the sketch at a contact, exactly, and by a sketch elsewhere."""
        wanted = self.names if names is None else names
        closed = [name for name in wanted if name in self._diagonal]
        rest = [name for name in wanted if name not in self._diagonal]
        if sketch is None:
            return closed, [], rest, []
        dear = [name for name in rest if sketch.replaces(self._exact_costs[name])]
        exact = [name for name in rest if name not in dear]
        return closed, [n for n in dear if n in self._plain], exact, [n for n in dear if n not in self._plain]

    @cached_property
    def _plain(self) -> frozenset[str]:
        """Parameters in which their one contact's output is affine: their Hessian comes from that output's."""
        uses = self._trace.uses
        return frozenset(
            n for n in self.names if len(uses[n]) == 1 and uses[n][0].entry is not None and not uses[n][0].is_made
        )

    @cached_property
    def _diagonal(self) -> frozenset[str]:
        return self._plain & self._shadow.structure(self._inputs).diagonal

    def _closed(self, columns: Tensor, names: Sequence[str]) -> AtContacts:
        # One contact at a time: two that feed the same smooth function have a diagonal each, and a block in common.
        return {
            i: [torch.stack([self._hessian_product(column, {i: self._like(i, torch.ones)})[i] for column in columns])]
            for i in self._of(names)
        }

    def _probed(self, columns: Tensor, names: Sequence[str], sketch: Sketch | None) -> AtContacts:
        """Random signs and, after all of them, their products with the Hessian: ``[2 M, N, ...]``."""
        generator = None if sketch is None else sketch.generator
        contacts = self._of(names)
        drawn = [
            {i: self._like(i, lambda shape, **_: signs(shape, self.outputs, generator)) for i in contacts}
            for _ in columns
        ]
        found = [self._hessian_product(column, v) for column, v in zip(columns, drawn, strict=True)]
        return {i: [torch.stack([*(v[i] for v in drawn), *(hv[i] for hv in found)])] for i in contacts}

    def _like(self, i: int, make: Callable[..., Tensor]) -> Tensor:
        return make(self._contacts[i].shapes[0], dtype=self.outputs.dtype, device=self.outputs.device)

    def _hessian_product(self, cotangent: Tensor, v: dict[int, Tensor]) -> dict[int, Tensor]:
        """``H v``, H the Hessian of ``<cotangent, h>`` in shifts of the outputs of the contacts that ``v`` names."""
        edges, shapes = self._ends(list(v))
        with torch.enable_grad():
            first = self._grad(cotangent.reshape(self._graph.shape), edges, create_graph=True)
        moving = [(g, u) for g, u in zip(first, v.values(), strict=True) if g is not None and g.requires_grad]
        second: Sequence[Tensor | None] = [None] * len(v)
        if moving:
            with second_derivatives():
                second = torch.autograd.grad(
                    [g for g, _ in moving], edges, [u for _, u in moving], retain_graph=True, allow_unused=True
                )
        return dict(zip(v, self._filled(second, shapes), strict=True))

    def _otherwise(self, names: list[str], cotangent: Tensor, sketch: Sketch | None, *, per_input: bool) -> Diagonal:
        if sketch is None and self._chain is not None:
            with suppress(RuntimeError, AssertionError):
                return self._chain.hessian_diagonal(self._inputs, names, cotangent, per_input=per_input)
        with suppress(NoSecondDerivativesError):
            functional = FunctionalPass(self._shadow, self._inputs, names)
            return functional.hessian_diagonal(cotangent, per_input=per_input, sketch=sketch)
        # What torch.func cannot follow, elsewhere in the network, may have second derivatives all the same.
        rowwise = RowwisePass(self._shadow, self._inputs, names)
        return rowwise.hessian_diagonal(cotangent, per_input=per_input, sketch=sketch)

    @cached_property
    def _chain(self) -> Chain | None:
        return Chain.of(self._shadow)

    @cached_property
    def _exact_costs(self) -> dict[str, int]:
        if self._chain is not None:
            return self._chain.hessian_costs(self._inputs, self.names)
        return {name: exact_cost(p) for name, p in self._parameters.items()}
