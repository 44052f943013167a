"""A function for each input: in a batch by vmap, or one at a time where an operation has no batching rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.func import vmap


def over_inputs(function: Callable[..., Any], *batched: Tensor) -> Any:
    """``function`` of each row, a tensor or a dict of them, stacked."""
    try:
        with quiet_fallbacks():
            return vmap(function)(*batched)
    except RuntimeError:  # torch raises NotImplementedError, a subclass, or whatever shape error comes first
        found = [function(*row) for row in zip(*batched, strict=True)]
        if isinstance(found[0], Tensor):
            return torch.stack(found)
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}


@contextmanager
def quiet_fallbacks() -> Iterator[None]:
    """Without torch's warnings at operations that vmap takes one by one: that is known, and counted on."""
    visit = _Visit()
    try:
        _switch(_visits.add, visit)
        yield
    finally:
        _switch(_visits.discard, visit)


class _Visit:
    """Somebody who wants them off."""


_visits: WeakSet[_Visit] = WeakSet()
"""Torch has one switch for all threads. Weak, so that none stays behind if Ctrl-C comes at an unlucky moment."""


def _switch(change: Callable[[_Visit], None], visit: _Visit) -> None:
    functorch: Any = torch._C._functorch
    change(visit)
    # Until no other thread's change has come in between: a lock could be left held where Ctrl-C comes.
    is_quiet = None
    while is_quiet != bool(_visits):
        is_quiet = bool(_visits)
        functorch._set_vmap_fallback_warning_enabled(not is_quiet)
