"""What the choice of "auto" loses by time: errors at equal backward passes, priced by what passes take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.errors import UNBIASED
from benchmarks.report.tables import Table, number

COSTS = {"ReLU": "mlp", "sigmoid": "mlp-sigmoid"}
"""The networks of errors.json, as cost.json calls them."""


def read(errors: Path, cost: Path) -> Table:
    """Of the hidden layers, whose estimates take the times that were measured; the last one's are in closed form."""
    networks = json.loads(errors.read_text())["networks"]
    measured = json.loads(cost.read_text())["cpu"]["passes"]["rows"]
    times = {(row["problem"], row["method"]): row["ratio"]["median"] for row in measured}
    rows = [row for network, moments in networks.items() for row in _rows(network, moments, times)]
    note = (
        "The variance of an estimate from one input x what it takes, over the least of the unbiased ones: passes as "
        "the efficiency rule counts them, time as measured on batches of 128."
    )
    columns = ["network", "layer", "auto picks", "by passes", "by time", "best by time"]
    return Table('Error of the choice of "auto" at equal cost, over the best one\'s', columns, rows, note)


def _rows(network: str, moments: dict[str, Any], times: dict[tuple[str, str], float]) -> Iterator[list[str]]:
    for moment, layers in moments.items():
        for place, layer in enumerate(list(layers.values())[:-1], start=1):
            auto, found = layer["rules"]["auto"], {}
            for name, values in layer["estimators"].items():
                time = times.get((COSTS[network], name))
                if time is not None and name in UNBIASED:
                    found[name] = values["error_x_compute"] / values["passes"] * time
            best = min(found, key=lambda name: found[name])
            mean = sum(share * found[name] for name, share in auto["picks"].items())
            ratios = [number(auto["ratio_to_best"]), number(mean / found[best])]
            picks = ", ".join(f"{name} {share:.0%}" for name, share in auto["picks"].items())
            yield [f"{network}, {moment}", str(place), picks, *ratios, best]
