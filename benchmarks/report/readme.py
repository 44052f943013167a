"""The README's tables, from runs: each between a mark with its name and one of its end."""

from __future__ import annotations

import re

from benchmarks.report import costs, fullbatch, summaries
from benchmarks.report.checks import best_of
from benchmarks.report.study import Study
from benchmarks.report.tables import Table
from benchmarks.report.targets import checks

SHOWN = (
    "FisherAdam schedule-free",
    "FisherAdam",
    "DiagonalNGD",
    "AdamW",
    "NAdam",
    "SGD",
    "Schedule-Free AdamW",
    "Muon",
)
"""The methods that have a column there."""

STRONGEST = "SOAP"
"""What ends best of others' methods as they come. A matrix method, and was not tuned on most problems."""

BEGIN, END = "<!-- table: ", "<!-- end of table -->"
MARK = re.compile(rf"({BEGIN}([\w-]+) -->\n)(?:(?!{BEGIN}).)*?({END})", re.DOTALL)


def tables(study: Study) -> dict[str, Table]:
    """All of them, by name."""
    return {
        "problems": summaries.problems(study),
        "defaults-metric": summaries.metrics(study, "defaults", (*SHOWN, STRONGEST)),
        "final-time": summaries.speedups(study, "final", "seconds", SHOWN),
        "final-metric": summaries.metrics(study, "final", SHOWN),
        "final-pace": summaries.paces(study, "final", SHOWN),
        "rates": summaries.widths(study),
        "goals": fullbatch.table(study, "DiagonalNGD auto"),
        "targets": best_of(checks(study), ""),
        **costs.tables(),
    }


def filled(text: str, study: Study) -> str:
    """A text with its tables as they are now; what is not between marks stays.

    Raises:
        KeyError: If a mark names no table.
        ValueError: If a table has no end.
    """
    found, marks = tables(study), len(MARK.findall(text))
    if text.count(BEGIN) != marks or text.count(END) != marks:
        raise ValueError(f"{text.count(BEGIN)} tables begin and {text.count(END)} end; put {END!r} after each")
    return MARK.sub(lambda match: match[1] + found[match[2]].body() + match[3], text)
