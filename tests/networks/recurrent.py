"""Recurrent networks: of all kinds, as layers, as cells in a loop, and packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests.networks.shared import Family, Net, normal

RECURRENT = Family()
add = RECURRENT.add

PARTS_OF = {nn.RNN: nn.RNNCell, nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}


def _recurrent(kind: type[nn.Module], *, first: bool = True, **options: Any) -> nn.Module:
    directions = 2 if options.get("bidirectional") else 1
    width = options.get("proj_size", 0) or 3

    def forward(m: Any, x: Tensor) -> Tensor:
        out, state = m.rnn(x if first else x.transpose(0, 1))
        state = state[0] if isinstance(state, tuple) else state
        return m.head(torch.cat([out[:, -1] if first else out[-1], state[0]], 1))

    return Net(forward, rnn=kind(2, 3, batch_first=first, **options), head=nn.Linear(width * (directions + 1), 3))


for _kind in PARTS_OF:
    for _label, _options in {
        "": {},
        "_time_first": {"first": False},
        "_deep": {"num_layers": 2, "dropout": 0.3},
        "_both": {"bidirectional": True, "bias": False},
    }.items():
        add(
            f"{_kind.__name__.lower()}{_label}",
            lambda kind=_kind, options=_options: _recurrent(kind, **options),
            normal(4, 2),
            {"rnn": "call", "head": "rule"},
        )


def _loop(m: Any, x: Tensor) -> Tensor:
    state = None
    for step in x.unbind(1):
        state = m.cell(step, state)
    return m.head(state[0] if isinstance(state, tuple) else state)


for _kind in PARTS_OF.values():
    add(
        f"{_kind.__name__.lower()}_loop",
        lambda kind=_kind: Net(_loop, cell=kind(2, 3), head=nn.Linear(3, 3)),
        normal(4, 2),
        {"cell": "call", "head": "rule"},
    )
add(
    "lstm_projected",
    lambda: _recurrent(nn.LSTM, proj_size=2, num_layers=2),
    normal(3, 2),
    {"rnn": "call", "head": "rule"},
)


def _packed(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return m.head(m.rnn(packed)[1][-1])


add(
    "packed",
    lambda: Net(_packed, rnn=nn.GRU(2, 3, batch_first=True), head=nn.Linear(3, 3)),
    lambda n: (torch.randn(n, 4, 2), torch.arange(n) % 4 + 1),
    {"rnn": "rows", "head": "rule"},
)
