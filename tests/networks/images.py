"""Images: convolutions, their norms and paddings, patches and frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.networks.shared import Family, Net, normal, parameter, pooled, with_statistics

IMAGES = Family()
add = IMAGES.add


def _vision(m: Any, x: Tensor) -> Tensor:
    x = m.patches(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
    return m.head(m.encoder(x * m.scale)[:, 0])


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.c2, self.b2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b2(self.c2(self.relu(self.b1(self.c1(x)))))
        out += x
        return self.relu(out)


add(
    "resnet",
    lambda: pooled(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True), Residual(3), channels=3
    ),
    normal(2, 4, 4),
)
add(
    "mobilenet",
    lambda: pooled(
        nn.Conv2d(2, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),
        nn.GroupNorm(2, 4),
        nn.Hardswish(inplace=True),
        nn.Conv2d(4, 3, 1),
        channels=3,
    ),
    normal(2, 5, 5),
)
add(
    "paddings",
    lambda: pooled(
        nn.Conv2d(2, 3, (2, 3), padding="same"),
        nn.Tanh(),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
        nn.PReLU(3),
        nn.Conv2d(3, 2, 2, padding="valid"),
        nn.PReLU(),
        channels=2,
    ),
    normal(2, 4, 4),
)
add(
    "circular_same",
    lambda: pooled(nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), nn.Tanh(), channels=3),
    normal(2, 4, 4),
)
add(
    "autoencoder",
    lambda: nn.Sequential(
        nn.Conv1d(2, 3, 2, stride=2), nn.InstanceNorm1d(3, affine=True), nn.ConvTranspose1d(3, 1, 2), nn.Flatten()
    ),
    normal(2, 6),
    {"1.": "call", "": "rule"},
)
add(
    "vision_transformer",
    lambda: Net(
        _vision,
        patches=nn.Conv2d(2, 4, 2, stride=2),
        token=parameter(1, 1, 4),
        positions=parameter(1, 5, 4),
        scale=parameter(4),
        encoder=nn.TransformerEncoderLayer(4, 2, 5, batch_first=True),
        head=nn.Linear(4, 3),
    ),
    normal(2, 4, 4),
)
add(
    "frames",
    lambda: with_statistics(
        Net(
            lambda m, x: (
                m.head(torch.tanh(m.norm(m.conv(x.flatten(0, 1))).flatten(1))).unflatten(0, x.shape[:2]).sum(1)
            ),
            conv=nn.Conv2d(1, 2, 2),
            norm=nn.BatchNorm2d(2),
            head=nn.Linear(8, 3),
        )
    ),
    normal(3, 1, 3, 3),
)
