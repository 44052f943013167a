"""Time and memory of every way to a diagonal of curvature, as ratios to one gradient."""

from __future__ import annotations

from typing import Any

from benchmarks.cost.curvature import GRADIENT, methods
from benchmarks.cost.networks import problems
from benchmarks.cost.records import Row, Setting
from benchmarks.cost.timing import Effort, interleaved, peak_memory

WEIGHED = ("I1", "exact", "BackPACK SumGradSquared", "BackPACK BatchGrad", "BackPACK DiagGGNExact")
"""Those whose memory is measured too; profiling what takes hundreds of gradients' time would take minutes."""


def passes(setting: Setting) -> list[Row]:
    """One estimate by each method, with a fresh forward."""
    rows: list[Row] = []
    effort = Effort(budget=0.5, least=2, most=5) if setting.quick else Effort(budget=20)
    for problem in problems(setting.device, quick=setting.quick):
        cases = methods(problem, quick=setting.quick)
        times = interleaved(cases, [GRADIENT], setting.device, effort, f"passes, {problem.name}")
        memory = {name: peak_memory(cases[name], setting.device) for name in (GRADIENT, *WEIGHED)}
        for name in cases:
            extra: dict[str, Any] = {"memory": memory[name] / memory[GRADIENT]} if name in memory else {}
            rows.append(Row.of(problem.name, name, GRADIENT, times, **extra))
    return rows
