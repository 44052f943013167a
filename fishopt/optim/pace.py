"""How often the curvature is refreshed: ever more rarely as training goes on. A new rule is a new `interval`."""

EVERY_STEP_UNTIL = 10
"""Steps with a refresh each at the start, when the curvature changes fastest and the average is empty."""


def interval(step: int, longest: int) -> int:
    """Steps between refreshes at a step: twice as many whenever there have been twice as many, up to the longest."""
    return min(longest, 1 << max(0, (2 * step // EVERY_STEP_UNTIL).bit_length() - 1))
