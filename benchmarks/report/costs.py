"""The README's tables of what curvature costs, from what ``python -m benchmarks.cost`` has left."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.cost.records import Row
from benchmarks.cost.training import OURS
from benchmarks.report.tables import Table

KEPT = Path(__file__).parent.parent / "results" / "cost.json"

NETWORKS = {
    "mlp": "MLP 784-256-256-128-10, ReLU",
    "mlp-sigmoid": "the same, sigmoid",
    "3c3d": "3c3d, ReLU",
    "3c3d-sigmoid": "3c3d, sigmoid",
}
PASSES = {
    "I1": "I1",
    "I1, 1/4 batch": "I1 from a quarter of the batch",
    "hutchinson": "hutchinson",
    "exact": "exact",
    "I2, last two": "I2, last two layers, closed form",
    "I2": "I2, all layers, sketched",
    "BackPACK SumGradSquared": "BackPACK SumGradSquared",
    "our rules in BackPACK": "the same with our rules in it",
    "BackPACK DiagGGNExact": "BackPACK DiagGGNExact",
    "BackPACK DiagHessian": "BackPACK DiagHessian",
    "torch.func vmap(grad)": "torch.func vmap(grad)",
    "AdaHessian": "AdaHessian's double backward",
}


def tables() -> dict[str, Table]:
    """All of them, by name."""
    sections = json.loads(KEPT.read_text())["cpu"]
    rows = {name: [Row.read(row) for row in section["rows"]] for name, section in sections.items()}
    return {
        "cost-passes": _passes(rows["passes"]),
        "cost-update": _update(rows["update"]),
        "cost-step": _step(rows["step"]),
    }


def _passes(rows: list[Row]) -> Table:
    cells = {(row.method, row.problem): _ratio(row) for row in rows}
    return Table(
        "passes",
        ["one estimate, over one gradient (batch 128)", *NETWORKS.values()],
        [[shown, *(cells.get((method, problem), "-") for problem in NETWORKS)] for method, shown in PASSES.items()],
    )


def _update(rows: list[Row]) -> Table:
    sizes = sorted({row.size for row in rows})
    cells = {(row.method, row.baseline, row.size): _ratio(row) for row in rows}
    return Table(
        "update",
        ["`step()` without a refresh, parameters:", *(f"{size:.0e}".replace("e+0", "e") for size in sizes)],
        [
            [f"{method} over {baseline}", *(cells[method, baseline, size] for size in sizes)]
            for method in OURS
            for baseline in ("AdamW foreach", "AdamW fused")
        ],
    )


def _step(rows: list[Row]) -> Table:
    problems = list(dict.fromkeys(row.problem for row in rows))
    cells = {(row.method, row.problem): _ratio(row) for row in rows}
    return Table(
        "step",
        ["whole training step over fused AdamW's, refreshes included", *problems],
        [[method, *(cells[method, problem] for problem in problems)] for method in OURS],
    )


def _ratio(row: Row) -> str:
    value = row.ratio.median
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"
