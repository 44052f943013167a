"""By which way each parameter's derivatives are found: the fastest that was seen to be right.

A way is believed once its squared gradients of single inputs agree with autograd's on some of the user's inputs: no
list of modules that are known to work, and no promise that a network makes by its classes. Zeros are no evidence: where
a gradient vanishes, as below a gate that starts at zero, the best way is taken until there is something to be seen.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fishopt.passes.arguments import Arguments
from fishopt.passes.backward import Trace
from fishopt.passes.base import Diagonal, Pass
from fishopt.passes.functional import FunctionalPass
from fishopt.passes.layouts import trace_of
from fishopt.passes.rowwise import PooledPass, RowwisePass
from fishopt.passes.shadow import Shadow
from fishopt.passes.streams import noise_like, streams_kept
from fishopt.passes.traced import TracedPass
from fishopt.passes.tracing import Widening

LOG = logging.getLogger("fishopt.passes")
"""Why a way was not taken, at the level of debugging."""

RULE, CALL, NETWORK, ROWS, POOLED, NONE = "rule", "call", "network", "rows", "pooled", "none"

WAYS = {
    RULE: "a rule for the call that it is used in",
    CALL: "torch.func on the calls that it is used in",
    NETWORK: "torch.func on the whole network",
    ROWS: "the whole network, one input at a time",
    POOLED: "squares of the batch's gradient: its noise does not fall with the number of inputs",
    NONE: "the training gradient: the model's output does not depend on it",
}
"""The ways, best first, in words for a report."""

TOLERANCE = 30
"""Agreement that is asked for, in roots of the rounding unit, relative to the gradients' norm."""


MAX_TURNS = 3
"""A network that took so often another way than before is not traced any more."""


@dataclass(frozen=True)
class Coverage:
    """How a network's parameters are covered.

    Attributes:
        ways: Parameter -> its way, a key of `WAYS`.
        trace: What the traced ways need to know.
        activations: Numbers per input that calls with parameters put out.
    """

    ways: dict[str, str]
    trace: Trace | None
    activations: int

    def is_pooled(self, name: str) -> bool:
        """Whether of a parameter there is nothing but the batch's squared gradient."""
        return self.ways[name] == POOLED

    def is_per_input(self, name: str) -> bool:
        """Whether a parameter has derivatives for each input."""
        return self.ways[name] not in (POOLED, NONE)


def coverage_of(shadow: Shadow, inputs: Arguments) -> Coverage:
    """The network's coverage; tried once, on a few of the inputs."""
    structure = shadow.structure(inputs)
    if "coverage" not in shadow.notes:
        shadow.seen |= structure.reached
        names = [name for name in shadow.names if name in shadow.seen]
        ways = dict.fromkeys(shadow.names, NONE)
        if structure.needs_all:
            found = Coverage(ways | dict.fromkeys(names, POOLED), None, 0)
        else:
            found = _cover(shadow, inputs, names, ways)
        shadow.notes["coverage"] = found
    known: Coverage = shadow.notes["coverage"]
    return known


def _cover(shadow: Shadow, inputs: Arguments, names: list[str], ways: dict[str, str]) -> Coverage:
    # One of them twice: a network that sorts its inputs, or turns them round, cannot but change this order.
    some = inputs.take(torch.tensor([0, 1, 0, 2], device="cpu") % inputs.count)
    expected = _Expected(shadow, some, names)
    trace, activations = trace_of(shadow, inputs) if shadow.turns < MAX_TURNS else (None, 0)
    rest = names
    if trace is not None:
        followed = [name for name in rest if name in trace.uses]
        _without_rules(trace, [name for name in followed if shadow.proven.get(name) == CALL])
        good = expected.agrees(lambda own: TracedPass(shadow, some, own, trace), followed)
        others = [name for name in followed if name not in good]
        _without_rules(trace, others)
        good += expected.agrees(lambda own: TracedPass(shadow, some, own, trace), others)
        ways |= {name: CALL if any(use.entry is None for use in trace.uses[name]) else RULE for name in good}
        rest = [name for name in rest if name not in good]
    for way in (way for way in _ENGINES if way != POOLED):
        good = expected.agrees(partial(_ENGINES[way], shadow, some), rest)
        ways |= dict.fromkeys(good, way)
        rest = [name for name in rest if name not in good]
    ways |= dict.fromkeys(rest, POOLED)
    return Coverage(_remembered(shadow, ways, expected.telling if inputs.count > 1 else set()), trace, activations)


def _without_rules(trace: Trace, names: Sequence[str]) -> None:
    for name in names:
        trace.uses[name] = [use._replace(entry=None) for use in trace.uses[name]]


def _remembered(shadow: Shadow, ways: dict[str, str], certain: set[str]) -> dict[str, str]:
    """The ways found, but none that was once seen to be wrong."""
    order = list(WAYS)
    for name, way in shadow.proven.items():
        if ways.get(name, NONE) != NONE and (name not in certain or way == POOLED):
            ways[name] = max(way, ways[name], key=order.index)
    shadow.proven |= {name: ways[name] for name in certain}
    shadow.in_doubt = not certain.issuperset(ways)
    return ways


def open_way(shadow: Shadow, inputs: Arguments, names: Sequence[str], way: str, coverage: Coverage) -> Pass:
    """Takes inputs forward in one way."""
    if way in (RULE, CALL):
        assert coverage.trace is not None
        return TracedPass(shadow, inputs, names, coverage.trace)
    return _ENGINES[way](shadow, inputs, names)


_ENGINES: dict[str, Callable[[Shadow, Arguments, Sequence[str]], Pass]] = {
    NETWORK: FunctionalPass,
    ROWS: RowwisePass,
    POOLED: PooledPass,
}


# --- what is right ---


class _Expected:
    """Squared gradients of single inputs, by autograd and nothing else, for one random cotangent.

    Attributes:
        telling: The parameters for which those of all inputs differ from zero.
    """

    def __init__(self, shadow: Shadow, inputs: Arguments, names: Sequence[str]) -> None:
        shadow.require(shadow.names)
        with torch.enable_grad(), _steady():
            h = shadow.run(inputs, Widening())
        self._column = noise_like(h).reshape(len(h), -1)
        self._squares: dict[str, list[Tensor]] = {name: [] for name in names}
        own = [shadow.parameters[name] for name in names]
        for n in range(len(h)):
            cotangent = torch.zeros_like(self._column)
            cotangent[n] = self._column[n]
            found = torch.autograd.grad(h, own, cotangent.reshape(h.shape), retain_graph=True, allow_unused=True)
            for name, p, g in zip(names, own, found, strict=True):
                self._squares[name].append(torch.zeros_like(p) if g is None else g.square())
        sizes = [float(x.amax()) for squares in self._squares.values() for x in squares if x.numel()]
        # What cancels in exact arithmetic, such as a bias in front of a softmax, is rounding of larger gradients.
        self._rounding = torch.finfo(h.dtype).eps ** 1.5 * max(sizes, default=0.0)
        self.telling = {
            name for name, squares in self._squares.items() if all(bool((x > self._rounding).any()) for x in squares)
        }

    def agrees(self, build: Callable[[list[str]], Pass], names: Sequence[str]) -> list[str]:
        """Those of ``names`` for which a pass gives the same.

        Raises:
            MemoryError: If there is not the memory. Or an OutOfMemoryError.
            OutOfMemoryError: See above.
        """
        if not names:
            return []
        try:
            with _steady():
                through = build(list(names))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a network does to this way, there is another
            LOG.debug("%s cannot take the network through", build, exc_info=True)
            return []
        with through:
            return [name for name in names if self._is_right(through, name)]

    def _is_right(self, through: Pass, name: str) -> bool:
        try:
            with _steady():
                found: Diagonal = through.squared_vjp(self._column[None], names=[name], per_input=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # as above
            LOG.debug("%s has no derivatives of %r", type(through).__name__, name, exc_info=True)
            return False
        expected = torch.stack(self._squares[name])
        if found[name].shape != expected.shape:
            return False
        allowed = TOLERANCE * torch.finfo(expected.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected)
        allowed += self._rounding * expected.numel() ** 0.5
        is_right = bool(torch.linalg.vector_norm(found[name] - expected) <= allowed)
        if not is_right:
            LOG.debug("%s disagrees with autograd on %r", type(through).__name__, name)
        return is_right


@contextmanager
def _steady() -> Iterator[None]:
    """The same random numbers each time, for a network that draws some; the user's generators are left alone."""
    seeded = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with streams_kept(torch.device("cuda", i) for i in seeded):
        torch.manual_seed(0)
        random.seed(0)
        yield
