"""What the fuzz tests share: how many examples, the same ones each time, and which warnings are no failures."""

import contextlib
import warnings

from hypothesis import settings


def fuzz(examples):
    return settings(derandomize=True, deadline=None, max_examples=examples, database=None)


@contextlib.contextmanager
def slow_ways():
    """Warnings that a slow or noisy way was taken, and torch's own about LSTMs, are no failures here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the curvature of", RuntimeWarning)
        warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate", UserWarning)
        yield
