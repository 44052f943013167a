"""Checks of hyperparameters: each error names the argument, its value and the mend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Rational, Real
from typing import Any

import torch
from torch import Tensor

from fishopt.checks import checked_generator


def number(
    name: str, value: Any, *, low: float = 0.0, above: bool = False, high: float = math.inf, infinite: bool = False
) -> None:
    """Checks that ``low <= value < high``; a one-element tensor will do.

    Args:
        name: The argument's name, for the message.
        value: Its value.
        low: The smallest value allowed; not itself allowed with ``above``.
        above: Whether ``low`` is excluded.
        high: The smallest value too large.
        infinite: Whether infinity is allowed.

    Raises:
        ValueError: If it is out of range or no number.
    """
    if infinite and isinstance(value, float) and value == math.inf:
        return
    shown = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    # Numpy's numbers are some as well. Torch takes no whole number of more than 64 bits.
    real = _is_real(shown)
    is_long = isinstance(shown, Integral) and abs(int(shown)) >= 2**63
    if not real or is_long or not (low < shown if above else low <= shown) or not shown < high:
        relation = ">" if above else ">="
        limit = "" if high == math.inf else f" and < {high:g}"
        raise ValueError(f"{name}={value!r}: pass a finite number {relation} {low:g}{limit}")


def plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group with Python's numbers in place of numpy's, which a checkpoint could not be read with."""
    return {name: _plain(value) for name, value in group.items()}


def _plain(value: Any) -> Any:
    if not _is_real(value):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _is_real(value: Any) -> bool:
    is_fraction = isinstance(value, Rational) and not isinstance(value, Integral)  # which tensors do not take
    return isinstance(value, Real) and not is_fraction and not isinstance(value, bool)


def whole(name: str, value: Any, *, low: int = 1) -> None:
    """Checks for a whole number of at least ``low``.

    Raises:
        ValueError: If it is out of range or not whole.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r}: pass a whole number >= {low}")


def pair(name: str, value: Any) -> None:
    """Checks for a pair of decay rates in [0, 1).

    Raises:
        ValueError: If it is not a pair, or out of range.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{name}={value!r}: pass a pair of numbers in [0, 1)")
    for i, beta in enumerate(value):
        number(f"{name}[{i}]", beta, high=1.0)


def closure(value: Any) -> None:
    """Checks for a function, or None.

    Raises:
        TypeError: If it is something else.
    """
    if value is not None and not callable(value):
        raise TypeError(f"closure={value!r}: pass a function that evaluates the model and returns the loss")


def generator(value: Any, device: torch.device) -> torch.Generator:
    """The user's generator, or one of our own, which leaves torch's global stream of random numbers as it is."""
    value = checked_generator(value)
    if value is None:
        return torch.Generator(device).manual_seed(torch.initial_seed())
    return value


def readout(output: Any) -> Callable[[Any], Any] | None:
    """What picks the natural parameters from the model's output.

    Raises:
        TypeError: If ``output`` is neither a function nor a key.
    """
    if output is None or callable(output):
        return output
    if isinstance(output, str | int) and not isinstance(output, bool):
        return Key(output)
    raise TypeError(f"output={output!r}: pass a function of the model's output, a key of it, or an attribute's name")


@dataclass(frozen=True)
class Key:
    """Picks an entry of a dict or tuple, or an attribute; a class of its own so that it can be pickled."""

    name: str | int

    def __call__(self, output: Any) -> Any:
        """The entry.

        Raises:
            ValueError: If there is none.
        """
        try:
            if isinstance(self.name, str) and not isinstance(output, Mapping):
                return getattr(output, self.name)
            return output[self.name]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            kind = type(output).__name__
            raise ValueError(f"output={self.name!r} is not in what model returned, a {kind}") from error
