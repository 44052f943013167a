"""Random numbers: the user's streams, which networks may draw from in eval mode too, and some that never change."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def streams_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Torch's random numbers and Python's go on afterwards as if nothing was drawn.

    Args:
        devices: Where the network is; besides the CPU, whose stream is kept in any case, CUDA's count.
    """
    own = random.getstate()
    with torch.random.fork_rng(sorted({d for d in devices if d.type == "cuda"}, key=str)):
        try:
            yield
        finally:
            random.setstate(own)


def noise_like(x: Tensor) -> Tensor:
    """Normal numbers, the same each time, whatever device tensors are made on by default."""
    source = torch.Generator("cpu").manual_seed(0)
    return torch.randn(x.shape, generator=source, dtype=torch.float64, device="cpu").to(x)
