"""The networks of the problems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(widths: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A multilayer perceptron, from the number of features to that of outputs."""
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def small_cnn() -> nn.Sequential:
    """Two convolutions and two dense layers, for ``[N, 1, 28, 28]``."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def conv3_dense3(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """3c3d of DeepOBS for CIFAR-10: three convolutions, three dense layers, 895,210 parameters.

    The padding before each pool is TensorFlow's "same": 28 -> 14, 12 -> 6, 6 -> 3.
    """

    def pool() -> tuple[nn.Module, ...]:
        return activation(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, stride=2)

    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), *pool()),
        *(nn.Conv2d(64, 96, 3), *pool()),
        *(nn.Conv2d(96, 128, 3, padding=1), *pool()),
        *(nn.Flatten(), nn.Linear(1152, 512), activation(), nn.Linear(512, 256), activation(), nn.Linear(256, 10)),
    )


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to what came in (1x1 and strided where the width changes)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = outputs // inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(inner)) + self.skip(x))


def resnet8(width: int = 16) -> nn.Sequential:
    """ResNet-8 for CIFAR-10: one convolution, three residual blocks, one dense layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(Residual(width, width), Residual(width, 2 * width), Residual(2 * width, 4 * width)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


class Block(nn.Module):
    """A Transformer block: normalised causal attention and a normalised MLP, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.to_qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        split = (n, length, 3, self.heads, width // self.heads)
        q, k, v = self.to_qkv(self.norms[0](x)).view(split).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.inner(self.norms[1](x))


class CharTransformer(nn.Module):
    """A small GPT over characters; nanoGPT's CPU setting has 4 layers, 4 heads and width 128."""

    def __init__(self, vocabulary: int = 65, context: int = 64, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                # Those that end a residual branch by less, so that the sum of all keeps its scale.
                ends_branch = name.endswith(("out.weight", "inner.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if ends_branch else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.blocks(self.tokens(tokens) + self.places(places)))


class PoissonResidual(nn.Module):
    """What ``u_xx + u_yy = -2 pi^2 sin(pi x) sin(pi y)`` on the unit square, zero at its border, leaves over.

    ``u = x (1 - x) y (1 - y) N(x, y)`` meets the border's condition whatever the network N is. Values, gradients and
    Laplacians go through the layers together, so that the forward is plain matrix products.
    """

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise((2, *[width] * layers, 1)))

    def forward(self, points: Tensor) -> Tensor:
        """``[N, 2]`` -> the residuals, in units of the right side's amplitude, ``[N, 1]``."""
        value, slopes, laplacian = self.network(points)
        x, y = points.split(1, 1)
        a, b = x * (1 - x), y * (1 - y)
        slope = slopes[:, 0] * (1 - 2 * x) * b + slopes[:, 1] * (1 - 2 * y) * a
        total = a * b * laplacian + 2 * slope - 2 * (a + b) * value
        return total / (2 * math.pi**2) + torch.sin(math.pi * x) * torch.sin(math.pi * y)

    def network(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N ``[N, 1]``, its gradient ``[N, 2, 1]`` and its Laplacian ``[N, 1]``."""
        first, *others = self.layers
        z, dz = first(points), first.weight.t().expand(len(points), -1, -1)
        ddz = torch.zeros_like(z)
        for layer in others:
            t = torch.tanh(z)
            slope = 1 - t * t
            dt, ddt = slope[:, None] * dz, slope * (ddz - 2 * t * (dz * dz).sum(1))
            z, dz, ddz = layer(t), dt @ layer.weight.t(), ddt @ layer.weight.t()
        return z, dz, ddz
