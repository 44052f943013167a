"""Ways through the network: one forward pass, two primitives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fishopt.passes.base import Diagonal, Pass, Sketch, add, signs
from fishopt.passes.functional import FunctionalPass
from fishopt.passes.hooked import HookedPass, covers
from fishopt.passes.shadow import Shadow, unwrapped
from fishopt.passes.structure import Structure

__all__ = ["Diagonal", "Pass", "Shadow", "Sketch", "Structure", "add", "open_pass", "signs", "unwrapped"]


def open_pass(shadow: Shadow, inputs: tuple[Tensor, ...], names: Sequence[str]) -> Pass:
    """Takes ``inputs`` forward, by hooks where modules have rules for all of ``names`` and by torch.func elsewhere."""
    if shadow.takes_hooks and covers(shadow, inputs, names):
        try:
            return HookedPass(shadow, inputs, names)
        except RuntimeError:  # an operation in place, right after a module whose output is looked at
            shadow.takes_hooks = False
    return FunctionalPass(shadow, inputs, names)
