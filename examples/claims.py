"""Claims of the paper, for the examples that reproduce its figures: what was expected, what was found."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what was found."""

    claim: str
    expected: str
    got: str
    holds: bool


def table(title: str, claims: list[Claim]) -> Table:
    """The claims, for people."""
    result = Table(title=title)
    for heading in ("claim", "expected", "got", "holds"):
        result.add_column(heading)
    for claim in claims:
        result.add_row(claim.claim, claim.expected, claim.got, "yes" if claim.holds else "[bold red]NO")
    return result
