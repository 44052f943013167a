"""Examples as modules."""

import importlib
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def loaded(name):
    """One of them, or what stands beside it, as a script finds it; the same module however often it is asked for."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))
