"""Each parameter by its own way, behind the face of one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fishopt.passes.arguments import Arguments
from fishopt.passes.backward import OtherPathError
from fishopt.passes.base import CoupledInputsError, Diagonal, Pass, Sketch
from fishopt.passes.coverage import CALL, NONE, POOLED, ROWS, RULE, Coverage, coverage_of, open_way
from fishopt.passes.shadow import Shadow


def open_pass(shadow: Shadow, inputs: Arguments, names: Sequence[str]) -> Pass:
    """Takes ``inputs`` forward, for each of ``names`` by the best way that was seen to be right.

    Raises:
        CoupledInputsError: If they turn out to be coupled where the way before counted on that they are not.
    """
    pooled: set[str] | None = None
    while True:
        coverage = coverage_of(shadow, inputs)
        ways = _sorted(names, coverage)
        now = set(ways.get(POOLED, ()))
        if pooled is not None and not now <= pooled:
            # The cotangents were chosen for derivatives per input, which these do not have; the next ones will not be.
            raise CoupledInputsError("model took another way than before, on which it couples the inputs of a batch")
        pooled = now
        try:
            if len(ways) == 1 and NONE not in ways:
                return open_way(shadow, inputs, names, next(iter(ways)), coverage)
            return RoutedPass(shadow, inputs, ways, coverage)
        except OtherPathError:
            # Looked at anew with these inputs; a network that turns again and again is not traced any more.
            shadow.turns += 1
            shadow.forget()
        except CoupledInputsError:
            shadow.proven |= dict.fromkeys(ways.get(ROWS, ()), POOLED)
            shadow.forget()
            raise


def _sorted(names: Sequence[str], coverage: Coverage) -> dict[str, list[str]]:
    ways: dict[str, list[str]] = {}
    for name in names:
        way = coverage.ways[name]
        ways.setdefault(RULE if way == CALL else way, []).append(name)
    return ways


def _check_unused(shadow: Shadow, inputs: Arguments, names: Sequence[str]) -> None:
    """Looks whether the output depends on these parameters now, as on an expert that is asked for the first time.

    Raises:
        OtherPathError: If it does.
    """
    shadow.require(shadow.names)
    with torch.enable_grad():
        h = shadow.run(inputs)
    own = [shadow.parameters[name] for name in names]
    found = torch.autograd.grad(h, own, torch.ones_like(h), allow_unused=True)
    used = [name for name, g in zip(names, found, strict=True) if g is not None]
    if used:
        shadow.seen |= set(used)
        raise OtherPathError(f"the output depends on {used[0]} for the first time")


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
        if NONE in ways and RULE not in ways:  # a trace would have told
            _check_unused(shadow, inputs, ways[NONE])
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

    def vjp(self, columns: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        leading = columns.shape[:2]
        return self._by_way(names, lambda engine, own: engine.vjp(columns, names=own), leading=leading)

    def gram(self, columns: Tensor, *, names: Sequence[str] | None = None) -> Tensor:
        total = columns.new_zeros(*columns.shape[:2], *columns.shape[:2])
        for engine, own in self._asked(names):
            total += engine.gram(columns, names=own)
        return total

    def squared_vjp(self, columns: Tensor, *, names: Sequence[str] | None = None, per_input: bool = False) -> Diagonal:
        return self._by_way(
            names,
            lambda engine, own: engine.squared_vjp(columns, names=own, per_input=per_input),
            leading=(self._count,) if per_input else (),
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
            leading=(self._count,) if per_input else (),
        )

    def fourth_vjp(self, columns: Tensor, weights: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        return self._by_way(
            names, lambda engine, own: engine.fourth_vjp(columns, weights, names=own), leading=weights.shape[:-2]
        )

    def quartic_sums(
        self, columns: Tensor, shares: Tensor, weights: Tensor, *, names: Sequence[str] | None = None
    ) -> Diagonal:
        return self._by_way(
            names, lambda engine, own: engine.quartic_sums(columns, shares, weights, names=own), leading=(4,)
        )

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
        leading: Sequence[int] = (),
    ) -> Diagonal:
        found: Diagonal = {}
        for engine, own in self._asked(names):
            found.update(ask(engine, own))
        for name in self.names if names is None else names:  # what the output does not depend on
            if name not in found:
                p = self._shadow.parameters[name]
                found[name] = p.new_zeros((*leading, *p.shape))
        return found

    def _asked(self, names: Sequence[str] | None) -> Iterator[tuple[Pass, list[str]]]:
        """The engines that are needed, each with its own of the parameters."""
        wanted = self.names if names is None else names
        for way, engine in self._engines.items():
            own = [name for name in wanted if self._way_of[name] == way]
            if own:
                yield engine, own
