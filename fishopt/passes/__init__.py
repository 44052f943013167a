"""Ways through the network: one forward pass, two primitives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fishopt.passes.backpack import BackpackPass, covers
from fishopt.passes.base import Diagonal, Pass
from fishopt.passes.functional import FunctionalPass
from fishopt.passes.shadow import Shadow, unwrapped
from fishopt.passes.structure import Structure

__all__ = ["Diagonal", "Pass", "Shadow", "Structure", "open_pass", "unwrapped"]


def open_pass(shadow: Shadow, inputs: tuple[Tensor, ...], names: Sequence[str]) -> Pass:
    """Takes ``inputs`` forward, by BackPACK where it is right for all of ``names`` and by torch.func elsewhere."""
    if shadow.takes_hooks and covers(shadow, inputs, names):
        try:
            return BackpackPass(shadow, inputs, names)
        except RuntimeError:  # an operation in place, right after a module with a backward hook
            shadow.takes_hooks = False
    return FunctionalPass(shadow, inputs, names)
