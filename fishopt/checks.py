"""Checks of single arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_flag(name: str, value: Any) -> None:
    """Checks for True or False: any other object would be taken for one of the two.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: pass True or False")


def check_trainable(name: str, p: Tensor) -> None:
    """Checks for a parameter with a dense real gradient.

    Raises:
        TypeError: If it is complex or sparse.
        ValueError: If it was made in inference mode.
    """
    if p.is_complex() or p.layout != torch.strided:
        kind = "complex" if p.is_complex() else "sparse"
        raise TypeError(f"model parameter {name!r} is {kind}; fishopt needs dense real parameters")
    if p.is_inference():
        raise ValueError(f"model parameter {name!r} was made in inference mode; build the model outside of it")


def check_dense(name: str, x: Tensor) -> None:
    """Checks for a tensor with values that can be computed with.

    Raises:
        TypeError: If it is sparse, nested, quantized or of fewer than 16 bits.
        ValueError: If it is on the meta device.
    """
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name} holds a {'nested' if x.is_nested else 'sparse'} tensor; pass a dense one")
    if x.is_quantized or (x.is_floating_point() and torch.finfo(x.dtype).bits < 16):
        raise TypeError(f"{name} holds a tensor of type {x.dtype}; pass float32, or another that torch computes in")
    if x.is_meta:
        raise ValueError(f"{name} holds a tensor on the meta device, which has no values; pass one that has")
