"""From cotangents at a contact's output to the per-input gradients of a parameter in it, by a rule or by torch.func."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_flatten

from fishopt.passes.batching import over_inputs
from fishopt.passes.gradients import Joined, Local, PerInput
from fishopt.passes.rules import RULES, Entry
from fishopt.passes.tracing import Contact


class Layout(NamedTuple):
    """How a tensor's entries belong to inputs.

    Attributes:
        axis: The dimension along which the inputs lie.
        merged: Whether each input has several places there, as after ``x.flatten(0, 1)``.
        outer: Whether these lie side by side; else the inputs alternate, as after ``torch.cat([x, y])``.
    """

    axis: int
    merged: bool = False
    outer: bool = True

    def rows(self, x: Tensor, count: int, lead: int = 0) -> Tensor:
        """The inputs in front, ``[N, ...]``, or ``[N, P, ...]`` if merged; after ``lead`` other dimensions."""
        x = x.movedim(self.axis + lead, lead)
        if not self.merged:
            return x
        if self.outer:
            return x.unflatten(lead, (count, -1))
        return x.unflatten(lead, (-1, count)).transpose(lead, lead + 1)

    def fits(self, shape: torch.Size, count: int) -> bool:
        """Whether a tensor of this shape can hold so many inputs."""
        if self.axis >= len(shape):
            return False
        size = shape[self.axis]
        return size % count == 0 if self.merged else size == count

    def of_one(self, row: Tensor) -> Tensor:
        """One input's part of `rows`, as the call takes it."""
        return (row if self.merged else row.unsqueeze(0)).movedim(0, self.axis)


@dataclass(frozen=True)
class Place:
    """What is known of a contact from a look at it with other numbers of inputs.

    Attributes:
        inputs: Leaf's number -> the layout of those leaves that hold inputs.
        outputs: The layouts of the outputs.
    """

    inputs: dict[int, Layout]
    outputs: list[Layout]


def entry_for(contact: Contact, slot: int) -> Entry | None:
    """The rule for the operand in a place of the call's arguments, if there is one."""
    for entry in RULES.get(contact.function, ()):
        named = _named(contact, entry, contact.leaves)
        operand = _name_of(named, contact.leaves[slot])
        data = [k for k, v in named.items() if isinstance(v, Tensor) and k != operand and k in entry.data]
        others = [k for k in named if k in entry.data and isinstance(named[k], Tensor) and k not in entry.operands]
        if operand in entry.operands and (data or not entry.data) and all(k in data for k in others):
            return entry
    return None


def by_rule(contact: Contact, place: Place, slot: int, entry: Entry, g: Tensor, count: int, power: int = 1) -> PerInput:
    """Per-input gradients by a rule.

    Args:
        contact: The call.
        place: Where its inputs lie.
        slot: The operand's number among the leaves.
        entry: The rule.
        g: Cotangents at the output, ``[K, *shape]``.
        count: Inputs, N.
        power: See `fishopt.passes.rules.Rule`.

    Raises:
        NotImplementedError: If the rule does not cover these arguments.
    """
    layout = place.outputs[0]
    leaves = [place.inputs[i].rows(x, count) if i in place.inputs else x for i, x in enumerate(contact.leaves)]
    named = _named(contact, entry, leaves)
    operand = _name_of(named, contact.leaves[slot])
    merged = [i for i, own in place.inputs.items() if own.merged]
    g = layout.rows(g, count, lead=1)
    call = SimpleNamespace(
        **{**dict.fromkeys(entry.names), **named},
        function=contact.function,
        layout=layout,
        shape=contact.shapes[0],
    )
    if entry.positions or not (merged or layout.merged):
        return entry.rule(call, operand, g, power)
    if not layout.merged or len(merged) != len(place.inputs):
        raise NotImplementedError
    # Several images for each input: a call for each.
    parts = []
    for j in range(g.shape[2]):
        one = {
            k: v[:, j] if k in entry.data and isinstance(v, Tensor) and k != operand else v for k, v in named.items()
        }
        own = SimpleNamespace(**{**vars(call), **one})
        parts.append(entry.rule(own, operand, g[:, :, j], power))
    return Joined(parts)


def by_function(contact: Contact, place: Place, slot: int, g: Sequence[Tensor], count: int) -> PerInput:
    """Per-input gradients by torch.func: the call itself, once for each input, in a batch where vmap can.

    Args:
        contact: The call.
        place: Where its inputs lie.
        slot: The operand's number among the leaves.
        g: Cotangents at each of the outputs, ``[K, *shape]``.
        count: Inputs, N.
    """
    data = {i: layout.rows(contact.leaves[i], count) for i, layout in place.inputs.items()}
    operand = contact.leaves[slot].detach()

    def outputs(p: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in contact.leaves]
        leaves[slot] = p
        for i, row in zip(data, rows, strict=True):
            leaves[i] = place.inputs[i].of_one(row)
        args, kwargs = contact.arguments(leaves)
        results = tree_flatten(contact.function(*args, **kwargs))[0]
        return tuple(results[i] for i in contact.outputs)

    def of_one(some: Sequence[Tensor], *rows: Tensor) -> Tensor:
        def pull(*columns: Tensor) -> Tensor:
            restored = tuple(layout.of_one(x) for layout, x in zip(place.outputs, columns, strict=True))
            found: Tensor = pulled(restored)[0]
            return found

        pulled = vjp(lambda p: outputs(p, *rows), operand)[1]
        found: Tensor = over_inputs(pull, *some)
        return found

    def gradients(rows: slice, some: Sequence[Tensor]) -> Tensor:
        k = len(some)
        batched = [*(x.transpose(0, 1) for x in some), *(x[rows] for x in data.values())]
        found: Tensor = over_inputs(lambda *row: of_one(row[:k], *row[k:]), *batched)
        return found.transpose(0, 1)

    by_input = [own.rows(x, count, lead=1) for own, x in zip(place.outputs, g, strict=True)]
    return Local(gradients, by_input, operand.shape)


def _named(contact: Contact, entry: Entry, leaves: Sequence[Any]) -> dict[str, Any]:
    args, kwargs = contact.arguments(leaves)
    return {**dict(zip(entry.names, args, strict=False)), **kwargs}


def _name_of(named: dict[str, Any], operand: Tensor) -> str:
    return next((name for name, value in named.items() if value is operand), "")
