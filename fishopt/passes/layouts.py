"""Where parameters meet data, and where in each tensor the inputs lie: from forwards with two inputs and with three."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fishopt.passes.arguments import Arguments
from fishopt.passes.backward import Trace, Use, trace_forward
from fishopt.passes.contacts import Layout, Place, by_rule, entry_for
from fishopt.passes.rules import Entry
from fishopt.passes.shadow import Shadow
from fishopt.passes.streams import noise_like
from fishopt.passes.tracing import Contact, made_of

LOG = logging.getLogger("fishopt.passes")


def trace_of(shadow: Shadow, inputs: Arguments) -> tuple[Trace | None, int]:
    """Where parameters meet data, None where it is not told; and the numbers per input that these calls put out."""
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
    except Exception:  # whatever is the matter, torch.func does it
        LOG.debug("the rule %s does not cover this call of %s", entry.rule, contact.function, exc_info=True)
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
    columns = noise_like(h)
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
