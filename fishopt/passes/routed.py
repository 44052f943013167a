"""Each parameter by its own way, behind the face of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fishopt.passes.arguments import Arguments
from fishopt.passes.backward import OtherPathError
from fishopt.passes.base import Diagonal, Pass, Sketch
from fishopt.passes.coverage import CALL, NONE, RULE, Coverage, coverage_of, open_way
from fishopt.passes.shadow import Shadow


def open_pass(shadow: Shadow, inputs: Arguments, names: Sequence[str]) -> Pass:
    """Takes ``inputs`` forward, for each of ``names`` by the best way that was seen to be right."""
    while True:
        try:
            coverage = coverage_of(shadow, inputs)
            ways = _sorted(names, coverage)
            if len(ways) == 1 and NONE not in ways:
                return open_way(shadow, inputs, names, next(iter(ways)), coverage)
            return RoutedPass(shadow, inputs, ways, coverage)
        except OtherPathError:
            # Looked at anew with these inputs; a network that turns again and again is not traced any more.
            turns = shadow.notes.get("turns", 0) + 1
            shadow.forget()
            shadow.notes["turns"] = turns


def _sorted(names: Sequence[str], coverage: Coverage) -> dict[str, list[str]]:
    ways: dict[str, list[str]] = {}
    for name in names:
        way = coverage.ways[name]
        ways.setdefault(RULE if way == CALL else way, []).append(name)
    return ways


class RoutedPass(Pass):
    """One forward for each way that is needed.

    Args:
        shadow: The network.
        inputs: Its arguments.
        ways: Way -> the parameters that go by it.
        coverage: The network's.
    """

    def __init__(self, shadow: Shadow, inputs: Arguments, ways: dict[str, list[str]], coverage: Coverage) -> None:
        self.names = tuple(name for names in ways.values() for name in names)
        self._shadow, self._count = shadow, inputs.count
        self._way_of = {name: way for way, names in ways.items() for name in names}
        self._engines = {
            way: open_way(shadow, inputs, names, way, coverage) for way, names in ways.items() if way != NONE
        }
        if self._engines:
            self.outputs = next(iter(self._engines.values())).outputs
        else:
            with torch.no_grad():
                self.outputs = shadow.run(inputs).detach()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def squared_vjp(self, columns: Tensor, *, names: Sequence[str] | None = None, per_input: bool = False) -> Diagonal:
        return self._by_way(
            names, lambda engine, own: engine.squared_vjp(columns, names=own, per_input=per_input), per_input=per_input
        )

    def hessian_diagonal(
        self,
        cotangent: Tensor,
        *,
        names: Sequence[str] | None = None,
        per_input: bool = False,
        sketch: Sketch | None = None,
    ) -> Diagonal:
        return self._by_way(
            names,
            lambda engine, own: engine.hessian_diagonal(cotangent, names=own, per_input=per_input, sketch=sketch),
            per_input=per_input,
        )

    def fourth_vjp(self, columns: Tensor, weights: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        return self._by_way(names, lambda engine, own: engine.fourth_vjp(columns, weights, names=own))

    def hessian_square(
        self, columns: Tensor, weights: Tensor, *, names: Sequence[str] | None = None, sketch: Sketch | None = None
    ) -> Diagonal:
        return self._by_way(
            names, lambda engine, own: engine.hessian_square(columns, weights, names=own, sketch=sketch)
        )

    def hessian_cost(self, name: str, sketch: Sketch | None = None) -> int:
        engine = self._engines.get(self._way_of[name])
        return 0 if engine is None else engine.hessian_cost(name, sketch)

    def _by_way(
        self,
        names: Sequence[str] | None,
        ask: Callable[[Pass, list[str]], Diagonal],
        *,
        per_input: bool = False,
    ) -> Diagonal:
        found: Diagonal = {}
        wanted = self.names if names is None else names
        for way, engine in self._engines.items():
            own = [name for name in wanted if self._way_of[name] == way]
            if own:
                found.update(ask(engine, own))
        leading = (self._count,) if per_input else ()
        for name in wanted:  # what the output does not depend on
            if name not in found:
                p = self._shadow.parameters[name]
                found[name] = p.new_zeros((*leading, *p.shape))
        return found
