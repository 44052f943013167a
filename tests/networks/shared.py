"""What the families share: how a network is listed, and the parts and inputs that several have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Network:
    """One row of the table.

    Attributes:
        build: Makes it, with three or so outputs per input.
        inputs: Number of inputs -> positional arguments; a dict at the end holds keyword arguments.
        ways: Beginning of a parameter's name -> its way; the first that fits.
        readout: What picks the natural parameters from its output.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    ways: Mapping[str, str] = field(default_factory=lambda: {"": "rule"})
    readout: Callable[[Any], Tensor] | None = None


class Net(nn.Module):
    """Parts, and a forward that uses them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


class Family(dict[str, Network]):
    """Networks of one kind, by name."""

    def add(self, name: str, build: Any, inputs: Any, ways: Any = "rule", readout: Any = None) -> None:
        assert name not in self
        self[name] = Network(build, inputs, {"": ways} if isinstance(ways, str) else ways, readout)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def normal(*shape: int) -> Callable[[int], tuple[Tensor]]:
    return lambda n: (torch.randn(n, *shape),)


def tokens(length: int, vocabulary: int = 7) -> Callable[[int], tuple[Tensor]]:
    return lambda n: (torch.randint(0, vocabulary, (n, length)),)


def two(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randn(n, 4)


class PreNorm(nn.Module):
    """A block of a language model."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attention = attention()
        self.up, self.down, self.dropout = nn.Linear(4, 6), nn.Linear(6, 4), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.n1(x)))
        return x + self.dropout(self.down(functional.gelu(self.up(self.n2(x)))))


def scaled(**options: Any) -> nn.Module:
    def forward(m: Any, h: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, 2)).transpose(1, 2) for x in m.qkv(h).chunk(3, -1))
        made = {key: value() if callable(value) else value for key, value in options.items()}
        return m.out(functional.scaled_dot_product_attention(q, k, v, **made).transpose(1, 2).flatten(2))

    return Net(forward, qkv=nn.Linear(4, 12, bias=False), out=nn.Linear(4, 4))


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model


def pooled(*layers: nn.Module, channels: int) -> nn.Module:
    ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
    return with_statistics(nn.Sequential(*layers, *ends))
