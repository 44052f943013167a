"""``python -m benchmarks report``: from finished runs to tables, pictures and one page."""

from benchmarks.report.making import fill, make

__all__ = ["fill", "make"]
