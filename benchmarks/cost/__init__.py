"""What curvature costs: ``python -m benchmarks cost``."""
