"""By which way each parameter's derivatives are found: the fastest that was seen to be right.

A way is believed once its squared gradients of single inputs agree with autograd's on some of the user's inputs: no
list of modules that are known to work, and no promise that a network makes by its classes. Zeros are no evidence: where
a gradient vanishes, as below a gate that starts at zero, the best way is taken until there is something to be seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fishopt.passes.arguments import Arguments
from fishopt.passes.backward import Trace, Use, trace_forward
from fishopt.passes.base import Diagonal, Pass
from fishopt.passes.contacts import Layout, Place, by_rule, entry_for
from fishopt.passes.functional import FunctionalPass
from fishopt.passes.rowwise import PooledPass, RowwisePass
from fishopt.passes.rules import Entry
from fishopt.passes.shadow import Shadow
from fishopt.passes.streams import streams_kept
from fishopt.passes.traced import TracedPass
from fishopt.passes.tracing import Contact, Widening, made_of

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
    trace, activations = _trace(shadow, inputs) if shadow.turns < MAX_TURNS else (None, 0)
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
    for way in (NETWORK, ROWS):
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
        self._column = _noise(h).reshape(len(h), -1)
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
        except Exception:  # noqa: BLE001 - whatever a network does to this way, there is another
            return []
        with through:
            return [name for name in names if self._is_right(through, name)]

    def _is_right(self, through: Pass, name: str) -> bool:
        try:
            with _steady():
                found: Diagonal = through.squared_vjp(self._column[None], names=[name], per_input=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # noqa: BLE001 - as above
            return False
        expected = torch.stack(self._squares[name])
        if found[name].shape != expected.shape:
            return False
        allowed = TOLERANCE * torch.finfo(expected.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected)
        allowed += self._rounding * expected.numel() ** 0.5
        return bool(torch.linalg.vector_norm(found[name] - expected) <= allowed)


def _noise(like: Tensor) -> Tensor:
    """The same numbers each time, whatever device tensors are made on by default."""
    source = torch.Generator("cpu").manual_seed(0)
    return torch.randn(like.shape, generator=source, dtype=torch.float64, device="cpu").to(like)


@contextmanager
def _steady() -> Iterator[None]:
    """The same random numbers each time, for a network that draws some; the user's generators are left alone."""
    seeded = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with streams_kept(torch.device("cuda", i) for i in seeded):
        torch.manual_seed(0)
        random.seed(0)
        yield


# --- where parameters meet data ---


def _trace(shadow: Shadow, inputs: Arguments) -> tuple[Trace | None, int]:
    """From forwards with two and three inputs, whose shapes tell where in each tensor the inputs lie."""
    names = shadow.names
    spreading: frozenset[int] = frozenset()
    while True:
        seen = [trace_forward(shadow, inputs.first(count), names, spreading) for count in (2, 3)]
        if len(seen[0].made) != len(seen[1].made):
            return None, 0
        differ = [i for i, (a, b) in enumerate(zip(*(t.made for t in seen), strict=True)) if a != b]
        new = [i for i in differ if i not in spreading]
        if not new:
            break
        # One at a time: what is computed from it is data from now on, and later numbers are others.
        spreading |= {new[0]}
    pairs = list(zip(*(t.contacts for t in seen), strict=False))
    signatures = [contact.signature(shadow.name_of) for contact in seen[0].contacts]
    if signatures != [contact.signature(shadow.name_of) for contact in seen[1].contacts]:
        return None, 0
    places = _ordered([_place(a, b) for a, b in pairs], seen[1].contacts, seen[1].output)
    activations = sum(shape.numel() for a, _ in pairs for shape in a.shapes) // 2
    return Trace(_uses(shadow, seen[1].contacts, places), places, signatures, spreading), activations


def _uses(shadow: Shadow, contacts: list[Contact], places: list[Place | None]) -> dict[str, list[Use]]:
    uses: dict[str, list[Use]] = {}
    lost: set[str] = set()
    for i, (contact, place) in enumerate(zip(contacts, places, strict=True)):
        for slot, operand in contact.operands.items():
            names = made_of(operand, shadow.name_of)
            if place is None:
                lost.update(names)
                continue
            entry = entry_for(contact, slot)
            if entry is not None and not _applies(contact, place, slot, entry):
                entry = None
            is_made = id(operand) not in shadow.name_of
            for name in names:
                uses.setdefault(name, []).append(Use(i, slot, entry, is_made))
    return {name: found for name, found in uses.items() if name not in lost}


def _applies(contact: Contact, place: Place, slot: int, entry: Entry) -> bool:
    """Whether a rule covers these arguments."""
    zeros = contact.operands[slot].new_zeros((1, *contact.shapes[0]))
    try:
        return by_rule(contact, place, slot, entry, zeros, 3).shape == contact.operands[slot].shape
    except Exception:  # noqa: BLE001 - whatever is the matter, torch.func does it
        return False


def _place(two: Contact, three: Contact) -> Place | None:
    inputs = {}
    for i, (a, b) in enumerate(zip(two.leaves, three.leaves, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape:
            layout = _layout(a.shape, b.shape)
            if layout is None or i in two.operands:
                return None
            inputs[i] = layout
    outputs = [_layout(a, b) for a, b in zip(two.shapes, three.shapes, strict=True)]
    known = [layout for layout in outputs if layout is not None]
    return Place(inputs, known) if len(known) == len(outputs) else None


def _ordered(places: list[Place | None], contacts: list[Contact], h: Tensor) -> list[Place | None]:
    """Where an input has several places in one dimension: whether they lie side by side, from what belongs to one."""
    merged = [i for i, place in enumerate(places) if place is not None and any(own.merged for own in place.outputs)]
    if not merged:
        return places
    edges = [edge for i in merged for edge in contacts[i].edges]
    columns = _noise(h)
    found = []
    for row in (0, 2):  # the first and the last of three
        cotangent = torch.zeros_like(h)
        cotangent[row] = columns[row]
        found.append(torch.autograd.grad(h, edges, cotangent, retain_graph=True, allow_unused=True))
    pairs = zip(*found, strict=True)
    for i in merged:
        place = places[i]
        assert place is not None
        turned = []
        for own in place.outputs:
            first, last = next(pairs)
            turned.append(own._replace(outer=_is_outer(first, last, own)))
        outer = all(own.outer for own in turned if own.merged)
        places[i] = Place({slot: own._replace(outer=outer) for slot, own in place.inputs.items()}, turned)
    return places


def _is_outer(first: Tensor | None, last: Tensor | None, layout: Layout) -> bool:
    if first is None or last is None or not layout.merged:
        return True
    early, late = (g.movedim(layout.axis, 0).flatten(1).abs().sum(1).nonzero() for g in (first, last))
    size = first.shape[layout.axis]
    return bool((early < size // 3).all() and (late >= size - size // 3).all())


def _layout(two: torch.Size, three: torch.Size) -> Layout | None:
    if len(two) != len(three):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if len(axes) != 1 or two[axes[0]] * 3 != three[axes[0]] * 2:
        return None
    return Layout(axes[0], merged=two[axes[0]] != 2)
