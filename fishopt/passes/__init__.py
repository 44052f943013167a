"""Ways through the network: one forward pass, two primitives."""

from __future__ import annotations

from fishopt.passes.arguments import Arguments
from fishopt.passes.base import (
    CoupledInputsError,
    Diagonal,
    NoSecondDerivativesError,
    Pass,
    Sketch,
    add,
    signs,
    trace,
)
from fishopt.passes.coverage import WAYS, Coverage, coverage_of
from fishopt.passes.plain import widened
from fishopt.passes.products import Direction, pulled, pushed
from fishopt.passes.routed import open_pass
from fishopt.passes.shadow import Shadow, unwrapped
from fishopt.passes.streams import streams_kept
from fishopt.passes.structure import Structure

__all__ = [
    "WAYS",
    "Arguments",
    "CoupledInputsError",
    "Coverage",
    "Diagonal",
    "Direction",
    "NoSecondDerivativesError",
    "Pass",
    "Shadow",
    "Sketch",
    "Structure",
    "add",
    "coverage_of",
    "open_pass",
    "pulled",
    "pushed",
    "signs",
    "streams_kept",
    "trace",
    "unwrapped",
    "widened",
]
