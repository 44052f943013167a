"""Results of other measurements: pictures as they are, and files that list claims."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report.tables import Strong, Table

HOLDS = {True: "yes", False: Strong("no"), None: "not measured"}


def read(path: Path) -> Table | None:
    """The table of a file's claims, if it lists any."""
    content = json.loads(path.read_text())
    found = content.get("claims") if isinstance(content, dict) else None
    if not found:
        return None
    rows = [[str(one["claim"]), str(one["expected"]), str(one["got"]), HOLDS[one["holds"]]] for one in found]
    held = sum(one["holds"] is True for one in found)
    return Table(f"Claims: {path.stem}", ["claim", "expected", "got", "holds"], rows, f"{held} of {len(found)} hold.")
