"""Attention: language models, every option of it, encoders and decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.networks.shared import Family, Net, PreNorm, normal, scaled, tokens

ATTENTION = Family()
add = ATTENTION.add


def causal(length: int) -> Tensor:
    return torch.triu(torch.ones(length, length, dtype=torch.bool), 1)


def _multihead() -> nn.Module:
    return Net(
        lambda m, h: m.mha(h, h, h, attn_mask=causal(h.shape[1]), need_weights=False)[0],
        mha=nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True),
    )


class LanguageModel(nn.Module):
    """Tied embeddings, learned positions, one block of each attention."""

    def __init__(self, *attentions: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(map(PreNorm, attentions))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index) + self.positions(torch.arange(index.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).flatten(1)[:, -8:]


add("language_model", lambda: LanguageModel(_multihead, lambda: scaled(is_causal=True)), tokens(3))
add("sdpa_mask", lambda: LanguageModel(lambda: scaled(attn_mask=lambda: ~causal(3))), tokens(3))
add("sdpa_bias", lambda: LanguageModel(lambda: scaled(attn_mask=torch.ones(3, 3).tril().double())), tokens(3))
add("sdpa_scale", lambda: LanguageModel(lambda: scaled(scale=0.3, dropout_p=0.0)), tokens(3))


def _attended(mask: bool = False, **options: Any) -> nn.Module:
    """An attention of its own sequence or another, batch first or not, with its weights in the output."""
    first = options.get("batch_first", False)

    def forward(m: Any, x: Tensor, y: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        q, k = (x, y) if first else (x.transpose(0, 1), y.transpose(0, 1))
        attn = torch.eye(x.shape[1], y.shape[1], dtype=torch.bool) if mask else None
        out, weights = m.mha(q, k, k, attn_mask=attn, key_padding_mask=padding)
        out = out if first else out.transpose(0, 1)
        return m.head(torch.cat([out.flatten(1), weights.flatten(1)], 1))

    return Net(forward, mha=nn.MultiheadAttention(4, 2, **options), head=nn.LazyLinear(3))


def _built(build: Callable[[], nn.Module], inputs: Callable[[int], tuple[Any, ...]]) -> Callable[[], nn.Module]:
    """Lazy parts get their shapes."""

    def made() -> nn.Module:
        model, (*args, last) = build(), inputs(2)
        with torch.no_grad():
            model(*args, **last) if isinstance(last, dict) else model(*args, last)
        return model

    return made


def _padded(n: int) -> tuple[Any, ...]:
    padding = torch.zeros(n, 3, dtype=torch.bool)
    padding[1::2, 2] = True
    return torch.randn(n, 3, 4), {"padding": padding}


def _pair(width: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda n: (torch.randn(n, 3, 4), torch.randn(n, 2, width))


for _name, _build, _inputs in [
    ("attention_time_first", lambda: _attended(), normal(3, 4)),
    ("attention_batch_first", lambda: _attended(batch_first=True), normal(3, 4)),
    ("attention_mask", lambda: _attended(mask=True, batch_first=True), normal(3, 4)),
    ("attention_padding", lambda: _attended(batch_first=True), _padded),
    ("attention_padding_time_first", lambda: _attended(mask=True), _padded),
    ("attention_no_bias", lambda: _attended(bias=False, batch_first=True), normal(3, 4)),
    ("attention_cross", lambda: _attended(batch_first=True), _pair(4)),
    ("attention_widths", lambda: _attended(kdim=5, vdim=5), _pair(5)),
    ("attention_widths_batch_first", lambda: _attended(kdim=5, vdim=5, batch_first=True), _pair(5)),
    ("attention_zero", lambda: _attended(add_zero_attn=True), normal(3, 4)),
]:
    add(_name, _built(_build, _inputs), _inputs)
_inputs = normal(3, 4)
add("attention_bias_kv", _built(lambda: _attended(add_bias_kv=True, batch_first=True), _inputs), _inputs)


def _encoder(layers: int = 0, **options: Any) -> nn.Module:
    first = options["batch_first"]
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, **options)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else layer

    def forward(m: Any, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = m.encoder(x if first else x.transpose(0, 1), src_key_padding_mask=padding)
        return m.head(x[:, -1] if first else x[-1])

    return Net(forward, encoder=encoder, head=nn.Linear(4, 3))


for _first in (False, True):
    for _norm in (False, True):
        _options = {"batch_first": _first, "norm_first": _norm}
        _name = f"encoder{'_batch' if _first else '_time'}{'_pre' if _norm else '_post'}"
        add(_name, lambda options=_options: _encoder(**options), normal(3, 4))
        add(f"{_name}_padded", lambda options=_options: _encoder(2, activation="gelu", **options), _padded)
add(
    "decoder",
    lambda: Net(
        lambda m, x, y: m.head(m.decoder(x, y)[:, 0]),
        decoder=nn.TransformerDecoderLayer(4, 2, 5, batch_first=True),
        head=nn.Linear(4, 3),
    ),
    _pair(4),
)
add(
    "pooling",  # the bias of the scores makes no difference
    lambda: Net(lambda m, x: m.head((m.score(x).softmax(1) * x).sum(1)), score=nn.Linear(4, 1), head=nn.Linear(4, 3)),
    normal(3, 4),
)
