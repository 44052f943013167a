"""The pass through a traced forward: one backward brings cotangents to where parameters meet data, rules do the rest.

No weight's gradient is computed on the way, and the backward reaches no deeper than the lowest parameter that is asked
for.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fishopt.passes.arguments import Arguments
from fishopt.passes.base import Diagonal, Pass, add
from fishopt.passes.batching import quiet_fallbacks
from fishopt.passes.contacts import Place, by_function, by_rule
from fishopt.passes.gradients import Joined, PerInput, Pulled
from fishopt.passes.reductions import SQUARES, Reduction, fourth_powers, quartic
from fishopt.passes.rules import Entry
from fishopt.passes.shadow import Shadow
from fishopt.passes.tracing import Contact, Signature, Tracer

SMALL = 2**18
"""Numbers at the contacts' outputs that a backward may bring however small the network. Beyond, as many columns go
together as take the memory of one and a half gradients, but at least three."""

MAX_GRADIENTS = 2**25
"""Numbers that one input's gradients for these columns may hold."""

BATCHED_UP_TO = 2**20
"""Above so many numbers per column vmap gains nothing over one backward for each."""

AtContacts = dict[int, list[Tensor]]
"""Contact's number -> cotangents at each of its outputs, ``[K, *shape]``."""


class Use(NamedTuple):
    """One place where a parameter meets data.

    Attributes:
        contact: The contact's number.
        slot: The operand's number among its arguments.
        entry: The rule for it, None for torch.func.
        is_made: Whether the operand is made of the parameter, not the parameter itself.
    """

    contact: int
    slot: int
    entry: Entry | None
    is_made: bool


class Trace(NamedTuple):
    """What is known of a network's contacts before its forward.

    Attributes:
        uses: Parameter -> its uses.
        places: Contact's number -> where its inputs lie; None where that is not to be known.
        signatures: By what each contact is known again.
        spreading: See `Tracer`.
    """

    uses: dict[str, list[Use]]
    places: list[Place | None]
    signatures: list[Signature]
    spreading: frozenset[int]


class OtherPathError(RuntimeError):
    """The network took another way than it did when it was looked at."""


class Backward(Pass, ABC):
    """First derivatives, from the cotangents at the contacts.

    Args:
        shadow: The network.
        inputs: Its arguments.
        names: The parameters to differentiate. The backward pass goes no deeper than the lowest of them.
        trace: What is known of its contacts.

    Raises:
        OtherPathError: If the trace is not of this forward.
    """

    def __init__(self, shadow: Shadow, inputs: Arguments, names: Sequence[str], trace: Trace) -> None:
        self.names = tuple(names)
        self._shadow = shadow
        self._inputs = inputs
        self._trace = trace
        self._parameters = {name: shadow.parameters[name] for name in self.names}
        self._graph, self._contacts, _ = trace_forward(shadow, inputs, shadow.names, trace.spreading)
        self._check()
        self.outputs = self._graph.detach()

    def close(self) -> None:
        self._contacts = []
        del self._graph

    def _check(self) -> None:
        name_of = self._shadow.name_of
        if [contact.signature(name_of) for contact in self._contacts] != self._trace.signatures:
            raise OtherPathError("the network's forward is not the same for all batches")
        count = self._inputs.count
        for i in self._of(None):
            contact, place = self._contacts[i], self._place(i)
            shapes = [(contact.leaves[slot].shape, own) for slot, own in place.inputs.items()]
            shapes += zip(contact.shapes, place.outputs, strict=True)
            if not all(own.fits(shape, count) for shape, own in shapes):
                raise OtherPathError("inputs lie elsewhere in the network's tensors than in other batches")

    # --- first derivatives ---

    def vjp(self, columns: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        found = {name: one.formed(slice(0, one.count)) for name, one in self._per_input(columns, names)}
        return {name: g.reshape(*g.shape[:2], *self._parameters[name].shape) for name, g in found.items()}

    def gram(self, columns: Tensor, *, names: Sequence[str] | None = None) -> Tensor:
        total = columns.new_zeros(*columns.shape[:2], *columns.shape[:2])
        for _, one in self._per_input(columns, names):
            total += one.gram()
        return total

    def _per_input(self, columns: Tensor, names: Sequence[str] | None) -> Iterator[tuple[str, PerInput]]:
        """Of all columns at once, where any two of them meet."""
        (cotangents,) = self._backward(columns, self._of(names), at_once=len(columns))
        for name in self.names if names is None else names:
            yield name, self._gradients(name, cotangents)

    def squared_vjp(self, columns: Tensor, *, names: Sequence[str] | None = None, per_input: bool = False) -> Diagonal:
        total: Diagonal = {}
        sums: dict[int, Tensor] = {}
        flat = [i for i in self._of(names) if len(columns) > 1 and self._is_flat(i)]
        for cotangents in self._backward(columns, self._of(names)):
            for i in flat:
                # One position: each entry of a parameter meets one of g, and only the sum of its squares matters.
                square = cotangents.pop(i)[0].square().sum(0)
                sums[i] = sums[i].add_(square) if i in sums else square
            add(total, self._reduced(cotangents, names, SQUARES, per_input=per_input))
            del cotangents  # before there are new ones
        roots = {i: [value.sqrt()[None]] for i, value in sums.items()}
        return total | self._reduced(roots, names, SQUARES, per_input=per_input)

    def fourth_vjp(self, columns: Tensor, weights: Tensor, *, names: Sequence[str] | None = None) -> Diagonal:
        total: Diagonal = {}
        groups, members = columns.shape[:2]
        at_once = self._columns_at_once(self._of(names))
        if members > at_once:
            return super().fourth_vjp(columns, weights, names=names)
        step, several = at_once // members, weights if weights.ndim == 3 else weights[None]
        for start in range(0, groups, step):
            some = slice(start, start + step)
            add(total, self._sums(columns[some].flatten(0, 1), [fourth_powers(w[some]) for w in several], names))
        return total if weights.ndim == 3 else {name: value[0] for name, value in total.items()}

    def quartic_sums(
        self, columns: Tensor, shares: Tensor, weights: Tensor, *, names: Sequence[str] | None = None
    ) -> Diagonal:
        # The layers of which all columns fit are mostly the last ones, so that a second way back, to them, is short.
        wanted = self.names if names is None else names
        small = [name for name in wanted if len(columns) <= self._columns_at_once(self._of([name]))]
        rest = [name for name in wanted if name not in small]
        found = super().quartic_sums(columns, shares, weights, names=rest) if rest else {}
        return found | self._sums(columns, quartic(shares, weights), small) if small else found

    def _sums(self, columns: Tensor, reductions: Sequence[Reduction], names: Sequence[str] | None) -> Diagonal:
        return {name: one.sums(reductions) for name, one in self._per_input(columns, names)}

    def _is_flat(self, i: int) -> bool:
        """Whether all that is asked of a contact is a product of one cotangent's entry and something else."""
        contact = self._contacts[i]
        if len(contact.shapes) != 1 or len(contact.shapes[0]) != 2:
            return False
        return all(
            len(uses) == 1 and uses[0].entry is not None and uses[0].entry.entrywise and not uses[0].is_made
            for uses in map(self._trace.uses.__getitem__, self.names)
            if any(use.contact == i for use in uses)
        ) and not any(own.merged for own in self._place(i).outputs)

    def _backward(self, columns: Tensor, contacts: Sequence[int], at_once: int | None = None) -> Iterator[AtContacts]:
        """Cotangents at the contacts' outputs, some of the columns at a time."""
        columns = columns.reshape(len(columns), *self._graph.shape)
        edges, shapes = self._ends(contacts)
        parts = -(-len(columns) // (at_once or self._columns_at_once(contacts)))
        for part in columns.tensor_split(parts):
            found = self._vjp(part, edges, shapes)
            yield {i: [found.pop(0) for _ in self._contacts[i].edges] for i in contacts}

    def _ends(self, contacts: Sequence[int]) -> tuple[list[GradientEdge], list[torch.Size]]:
        listed = [self._contacts[i] for i in contacts]
        return [edge for c in listed for edge in c.edges], [shape for c in listed for shape in c.shapes]

    def _vjp(self, columns: Tensor, edges: list[GradientEdge], shapes: list[torch.Size]) -> list[Tensor]:
        size = sum(shape.numel() for shape in shapes)
        if len(columns) > 1 and size <= BATCHED_UP_TO:
            with suppress(RuntimeError), quiet_fallbacks():  # an operation that vmap does not know
                found = self._grad(columns, edges, is_grads_batched=True)
                return self._filled(found, shapes, (len(columns),))
        if len(columns) == 1:
            return [g[None] for g in self._filled(self._grad(columns[0], edges), shapes)]
        # Each input's columns side by side, as the rules read them.
        stacked = [columns.new_empty((shape[0], len(columns), *shape[1:])) for shape in shapes]
        for k, column in enumerate(columns):
            for whole, g in zip(stacked, self._filled(self._grad(column, edges), shapes), strict=True):
                whole[:, k] = g
        return [whole.transpose(0, 1) for whole in stacked]

    def _grad(self, cotangents: Tensor, edges: list[GradientEdge], **options: Any) -> Sequence[Tensor | None]:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            self._graph, edges, cotangents, retain_graph=True, allow_unused=True, **options
        )
        return found

    def _filled(
        self, found: Sequence[Tensor | None], shapes: Sequence[torch.Size], leading: tuple[int, ...] = ()
    ) -> list[Tensor]:
        """Zeros where the output does not depend on a contact's."""
        both = zip(shapes, found, strict=True)
        return [self.outputs.new_zeros((*leading, *shape)) if g is None else g for shape, g in both]

    def _columns_at_once(self, contacts: Sequence[int]) -> int:
        outputs = max(sum(shape.numel() for shape in self._ends(contacts)[1]), 1)
        met = [p for i in contacts for p in self._contacts[i].operands.values()]
        sizes = [p.numel() for p in met]
        # A gradient holds each output, what became of it, and itself.
        as_gradients = 3 * (sum(sizes) + 2 * outputs) // (2 * outputs)
        # A rule forms at least one input's gradient, for all of the columns.
        return max(3, SMALL // outputs, min(as_gradients, MAX_GRADIENTS // max(1, *sizes)))

    # --- the contacts ---

    def _of(self, names: Sequence[str] | None) -> list[int]:
        """The contacts of some parameters."""
        wanted = self.names if names is None else names
        return list(dict.fromkeys(use.contact for name in wanted for use in self._trace.uses[name]))

    def _place(self, i: int) -> Place:
        place = self._trace.places[i]
        if place is None:
            raise OtherPathError("a parameter's contact has no known layout")
        return place

    def _reduced(
        self,
        cotangents: AtContacts,
        names: Sequence[str] | None,
        reduction: Reduction,
        *,
        per_input: bool,
        power: int = 1,
    ) -> Diagonal:
        return {
            name: self._gradients(name, cotangents, power).reduced(reduction, per_input=per_input)
            for name in (self.names if names is None else names)
            if all(use.contact in cotangents for use in self._trace.uses[name])
        }

    def _gradients(self, name: str, cotangents: AtContacts, power: int = 1) -> PerInput:
        count = self._inputs.count
        parts: list[PerInput] = []
        for use in self._trace.uses[name]:
            contact, place, g = self._contacts[use.contact], self._place(use.contact), cotangents[use.contact]
            part = (
                by_function(contact, place, use.slot, g, count)
                if use.entry is None
                else by_rule(contact, place, use.slot, use.entry, g[0], count, power)
            )
            made = contact.operands[use.slot]
            parts.append(Pulled(part, made, self._parameters[name]) if use.is_made else part)
        return parts[0] if len(parts) == 1 else Joined(parts)


class Traced(NamedTuple):
    """A forward that was watched.

    Attributes:
        output: In its graph.
        contacts: Where parameters met data.
        made: See `Tracer`.
    """

    output: Tensor
    contacts: list[Contact]
    made: list[torch.Size]


def trace_forward(
    shadow: Shadow, inputs: Arguments, names: Sequence[str], spreading: frozenset[int] = frozenset()
) -> Traced:
    """Takes inputs forward and watches."""
    shadow.require(names)
    wanted = {name: shadow.parameters[name] for name in names}
    while True:
        tracer = Tracer(wanted, spreading, copies=shadow.changes_in_place)
        own = inputs.map(torch.Tensor.detach)
        tracer.watch([x for x, has_rows in zip(own.leaves, own.rows, strict=True) if has_rows])
        with torch.enable_grad():
            output = shadow.run(own, tracer)
        if shadow.changes_in_place or not tracer.was_changed():
            return Traced(output, tracer.contacts, tracer.made)
        shadow.changes_in_place = True
