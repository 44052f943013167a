"""``python -m benchmarks.cost``, the same as ``python -m benchmarks cost``."""

from benchmarks.cost.measure import main

main()
