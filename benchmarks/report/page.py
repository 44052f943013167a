"""The report as one HTML file: pictures inside, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.report.tables import Strong, Table

TITLE = "fishopt: benchmarks"


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: Its head.
        about: What to know of it.
        tables: First.
        pictures: Then.
    """

    title: str
    about: str = ""
    tables: list[Table] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)


def html(sections: Sequence[Section]) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    environment.tests["strong"] = lambda cell: isinstance(cell, Strong)
    return environment.get_template("page.html").render(title=TITLE, sections=sections)


def markdown(sections: Sequence[Section]) -> str:
    """The tables alone."""
    lines = [f"# {TITLE}\n"]
    for section in sections:
        if section.tables:
            lines += [f"## {section.title}\n", *(table.markdown() for table in section.tables)]
    return "\n".join(lines)
