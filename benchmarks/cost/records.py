"""What a measurement leaves: rows for JSON and tables."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.timing import Spread, Times, ratio, seconds


@dataclass(frozen=True)
class Row:
    """One method on one problem.

    Attributes:
        problem: What it was measured on.
        method: What was measured.
        baseline: What the ratio is to, measured in the same rounds.
        ratio: Time over the baseline's.
        seconds: The median time; for the curious, since it is this machine's alone.
        size: Where sizes vary, the one here.
        extra: What else a section measures.
    """

    problem: str
    method: str
    baseline: str
    ratio: Spread
    seconds: float
    size: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: str, method: str, baseline: str, times: Times, size: int = 0, **extra: Any) -> Row:
        """A row from the times of a loop."""
        return cls(problem, method, baseline, ratio(times, method, baseline), seconds(times, method), size, extra)

    @classmethod
    def read(cls, values: dict[str, Any]) -> Row:
        """A row from JSON."""
        return cls(**{**values, "ratio": Spread(**values["ratio"])})


@dataclass(frozen=True)
class Setting:
    """How a section is to be measured."""

    device: torch.device
    quick: bool


Measured = dict[str, list[Row]]
"""Section -> rows."""
Section = Callable[[Setting], list[Row]]


def environment(setting: Setting) -> dict[str, Any]:
    """What numbers depend on."""
    return {
        "torch": torch.__version__,
        "backpack": version("backpack-for-pytorch"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": _processor(),
        "gpu": torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else None,
        "quick": setting.quick,
    }


def write(path: Path, device: str, measured: Measured, where: dict[str, Any]) -> Measured:
    """Puts sections into the file, beside those that are there from other runs, each with its own environment.

    Returns:
        All sections of this device that the file now has.
    """
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    here = content.setdefault(device, {})
    for section, rows in measured.items():
        here[section] = {"environment": where, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return {section: [Row.read(row) for row in entry["rows"]] for section, entry in here.items()}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
