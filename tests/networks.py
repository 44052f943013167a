"""Networks as people write them: name -> how to build one, what it is called with, and by which way it is covered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint


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


NETWORKS: dict[str, Network] = {}


def add(name: str, build: Any, inputs: Any, ways: Any = "rule", readout: Any = None) -> None:
    assert name not in NETWORKS
    NETWORKS[name] = Network(build, inputs, {"": ways} if isinstance(ways, str) else ways, readout)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def normal(*shape: int) -> Callable[[int], tuple[Tensor]]:
    return lambda n: (torch.randn(n, *shape),)


def tokens(length: int, vocabulary: int = 7) -> Callable[[int], tuple[Tensor]]:
    return lambda n: (torch.randint(0, vocabulary, (n, length)),)


# --- attention ---


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


def causal(length: int) -> Tensor:
    return torch.triu(torch.ones(length, length, dtype=torch.bool), 1)


def _multihead() -> nn.Module:
    return Net(
        lambda m, h: m.mha(h, h, h, attn_mask=causal(h.shape[1]), need_weights=False)[0],
        mha=nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True),
    )


def _scaled(**options: Any) -> nn.Module:
    def forward(m: Any, h: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, 2)).transpose(1, 2) for x in m.qkv(h).chunk(3, -1))
        made = {key: value() if callable(value) else value for key, value in options.items()}
        return m.out(functional.scaled_dot_product_attention(q, k, v, **made).transpose(1, 2).flatten(2))

    return Net(forward, qkv=nn.Linear(4, 12, bias=False), out=nn.Linear(4, 4))


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


add("language_model", lambda: LanguageModel(_multihead, lambda: _scaled(is_causal=True)), tokens(3))
add("sdpa_mask", lambda: LanguageModel(lambda: _scaled(attn_mask=lambda: ~causal(3))), tokens(3))
add("sdpa_bias", lambda: LanguageModel(lambda: _scaled(attn_mask=torch.ones(3, 3).tril().double())), tokens(3))
add("sdpa_scale", lambda: LanguageModel(lambda: _scaled(scale=0.3, dropout_p=0.0)), tokens(3))


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


# --- images ---


def _vision(m: Any, x: Tensor) -> Tensor:
    x = m.patches(x).flatten(2).transpose(1, 2)
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
    return m.head(m.encoder(x * m.scale)[:, 0])


def _with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model


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


def _pooled(*layers: nn.Module, channels: int) -> nn.Module:
    ends = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
    return _with_statistics(nn.Sequential(*layers, *ends))


add(
    "resnet",
    lambda: _pooled(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True), Residual(3), channels=3
    ),
    normal(2, 4, 4),
)
add(
    "mobilenet",
    lambda: _pooled(
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
    lambda: _pooled(
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
    lambda: _pooled(nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), nn.Tanh(), channels=3),
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
    lambda: _with_statistics(
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

# --- recurrent ---

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

# --- several inputs, arguments, outputs ---


def _tower() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _two(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4), torch.randn(n, 4)


add(
    "siamese",
    lambda: Net(lambda m, a, b: m.head((m.tower(a) - m.tower(b)).abs()), tower=_tower(), head=nn.Linear(3, 3)),
    _two,
)


def _stacked(join: Callable[[Tensor, Tensor], Tensor], part: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        left, right = part(m.tower(join(a, b)))
        return m.head(left * right)

    return lambda: Net(forward, tower=_tower(), head=nn.Linear(3, 3))


add("siamese_joined", _stacked(lambda a, b: torch.cat([a, b]), lambda z: z.chunk(2)), _two)
add(
    "siamese_alternating",
    _stacked(lambda a, b: torch.stack([a, b], 1).flatten(0, 1), lambda z: (z[::2], z[1::2])),
    _two,
)
add("siamese_stacked", _stacked(lambda a, b: torch.stack([a, b]), lambda z: z.unbind(0)), _two)
add("siamese_beside", _stacked(lambda a, b: torch.stack([a, b], 1), lambda z: z.unbind(1)), _two)
add(
    "inputs_of_several_kinds",
    lambda: Net(
        lambda m, x, index, image: m.head(m.a(x) * m.b(index) + m.c(image).flatten(1)),
        a=nn.Linear(4, 3),
        b=nn.Embedding(5, 3),
        c=nn.Conv2d(1, 3, 2),
        head=nn.Linear(3, 3),
    ),
    lambda n: (torch.randn(n, 4), torch.randint(0, 5, (n,)), torch.randn(n, 1, 2, 2)),
)
add(
    "keywords",
    lambda: Net(
        lambda m, x, *, gate, power: m.b(torch.sigmoid(m.a(x)) ** power * gate), a=nn.Linear(4, 3), b=nn.Linear(3, 3)
    ),
    lambda n: (torch.randn(n, 4), {"gate": torch.rand(n, 3), "power": 2}),
)
add(
    "no_tensors",
    lambda: Net(
        lambda m, batch, mode, flag: m.b(torch.tanh(m.a(batch["x"]))) * (2 if flag and mode == "wide" else 1),
        a=nn.Linear(4, 3),
        b=nn.Linear(3, 3),
    ),
    lambda n: ({"x": torch.randn(n, 4), "ids": list("abc")}, "wide", True, {}),
)
add(
    "dict_output",
    lambda: Net(lambda m, x: {"logits": m.a(x), "hidden": x, "loss": None}, a=nn.Linear(4, 3)),
    normal(4),
    readout=lambda output: output["logits"],
)
add(
    "tuple_output",
    lambda: Net(lambda m, x: (m.b(x), m.a(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 2)),
    normal(4),
    {"b": "none", "a": "rule"},
    readout=lambda output: output[1],
)

# --- parameters wherever they are ---

add("scale", lambda: Net(lambda m, x: m.a(x * m.s) * m.t, s=parameter(4), t=parameter(), a=nn.Linear(4, 3)), normal(4))
add(
    "matmul",
    lambda: Net(lambda m, x: torch.tanh(x @ m.w) @ m.v + m.b, w=parameter(4, 5), v=parameter(5, 3), b=parameter(3)),
    normal(4),
)
add("matmul_sequence", lambda: Net(lambda m, x: torch.tanh(x @ m.w).mean(1), w=parameter(4, 3)), normal(5, 4))
add("weight_first", lambda: Net(lambda m, x: torch.tanh(m.w @ x).sum(-1), w=parameter(3, 4)), normal(4, 2), "call")
add("weight_first_transposed", lambda: Net(lambda m, x: torch.tanh(m.w @ x.T).T, w=parameter(3, 4)), normal(4), "call")
add("addmm", lambda: Net(lambda m, x: torch.addmm(m.b, x, m.w), b=parameter(3), w=parameter(4, 3)), normal(4))
add(
    "addmm_scaled",
    lambda: Net(
        lambda m, x: torch.tanh(torch.addmm(m.b, x, m.w, beta=2, alpha=0.5)), b=parameter(3), w=parameter(4, 3)
    ),
    normal(4),
    "call",
)
add(
    "einsum",
    lambda: Net(lambda m, x: torch.tanh(torch.einsum("nld,dhe->nlhe", x, m.w)).sum((1, 2)), w=parameter(4, 2, 3)),
    normal(5, 4),
    "call",
)
add("bilinear", lambda: Net(lambda m, a, b: torch.tanh(m.bilinear(a, b)), bilinear=nn.Bilinear(4, 4, 3)), _two, "call")
add(
    "functional",
    lambda: Net(
        lambda m, x: functional.linear(functional.layer_norm(x, (4,), m.g, m.b), m.w),
        g=parameter(4),
        b=parameter(4),
        w=parameter(3, 4),
    ),
    normal(4),
)
add(
    "repeated_token",
    lambda: Net(
        lambda m, x: m.a(torch.cat([m.q.repeat(len(x), 1, 1) * x, x], 1).flatten(1)),
        q=parameter(1, 2, 4),
        a=nn.Linear(16, 3),
    ),
    normal(2, 4),
)
add(
    "squared_token",  # what is computed from an expanded parameter is data, and the numbers of what comes later shift
    lambda: Net(
        lambda m, x: (m.q.expand(len(x), -1).square().sin() * x) @ m.w.t(),
        q=parameter(4),
        w=parameter(4, 4),
    ),
    normal(4),
)
add(
    "queries",
    lambda: Net(
        lambda m, x: m.mha(m.q.unsqueeze(0).expand(len(x), -1, -1), x, x)[0].flatten(1),
        q=parameter(2, 4),
        mha=nn.MultiheadAttention(4, 1, batch_first=True),
    ),
    normal(3, 4),
)
add(
    "buffer",
    lambda: Net(lambda m, x: m.a((x - m.mean) / m.std), a=nn.Linear(4, 3), mean=torch.randn(4), std=torch.rand(4) + 1),
    normal(4),
)
add(
    "shared",
    lambda: Net(
        lambda m, x: m.parts[1](torch.tanh(m.parts[0](torch.tanh(m.parts[0](x))))),
        parts=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)]),
    ),
    normal(4),
)


def _listed() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


add("listed_twice", _listed, normal(4))
add(
    "unused",
    lambda: Net(lambda m, x: m.a(x), a=nn.Linear(4, 3), auxiliary=nn.Linear(4, 2), free=parameter(2)),
    normal(4),
    {"a.": "rule", "": "none"},
)

# --- weights that are computed ---


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Product(nn.Module):
    """Two parameters in one."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.randn(len(w), 2), torch.randn(2, w.shape[1])


def _parametrized(layer: nn.Module, with_: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", with_)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


for _name, _build in {
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)),
    "weight_norm_conv": lambda: _pooled(parametrizations.weight_norm(nn.Conv2d(1, 2, 2)), nn.Tanh(), channels=2),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh()),
    "symmetric": lambda: _parametrized(nn.Linear(4, 4), Symmetric()),
    "two_in_one": lambda: _parametrized(nn.Linear(4, 4), Product()),
}.items():
    add(_name, _build, normal(1, 3, 3) if "conv" in _name else normal(4))


class LoRA(nn.Linear):
    """A subclass, frozen but for a product of small rank, which starts from zero."""

    def __init__(self, inputs: int, outputs: int, *, zero: bool) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.a, self.b = parameter(2, inputs), parameter(outputs, 2)
        if zero:
            nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * (x @ self.a.T) @ self.b.T


class Merged(LoRA):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight + self.b @ self.a, self.bias)


class Standardized(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


for _zero in (False, True):
    for _layer in (LoRA, Merged):
        add(
            f"{_layer.__name__.lower()}{'_zero' if _zero else ''}",
            lambda layer=_layer, zero=_zero: nn.Sequential(layer(4, 4, zero=zero), nn.Tanh(), layer(4, 3, zero=zero)),
            normal(4),
        )
add("standardized", lambda: _pooled(Standardized(2, 3, 2), nn.ReLU(), channels=3), normal(2, 4, 4))

# --- what hides calls ---


class OldProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class NewProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mT @ g


for _name, _function in {"old_function": OldProduct, "new_function": NewProduct}.items():
    add(
        _name,
        lambda f=_function: Net(lambda m, x: m.a(torch.tanh(f.apply(x, m.w))), w=parameter(4, 5), a=nn.Linear(5, 3)),
        normal(4),
        {"w": "rows" if _function is OldProduct else "network", "a": "rule"},
    )


for _reentrant in (False, True):
    add(
        f"checkpoint{'_reentrant' if _reentrant else ''}",
        lambda reentrant=_reentrant: Net(
            lambda m, x: m.b(checkpoint(m.block, m.a(x), use_reentrant=reentrant)),
            a=nn.Linear(4, 4),
            block=nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            b=nn.Linear(4, 3),
        ),
        normal(4),
    )
    add(
        f"checkpoint_attention{'_reentrant' if _reentrant else ''}",
        lambda reentrant=_reentrant: Net(
            lambda m, x: m.b(checkpoint(m.block, m.a(x), use_reentrant=reentrant).flatten(1)),
            a=nn.Linear(4, 4),
            block=PreNorm(_scaled),
            b=nn.Linear(12, 3),
        ),
        normal(3, 4),
    )
add(
    "vmap",
    lambda: Net(
        lambda m, x: m.a(torch.vmap(lambda row: torch.tanh(m.w @ row))(x)), w=parameter(5, 4), a=nn.Linear(5, 3)
    ),
    normal(4),
    {"w": "network", "a": "rule"},
)
add(
    "func_grad",
    lambda: Net(
        lambda m, x: m.a(torch.func.grad(lambda z: torch.tanh(m.inner(z)).sum())(x)),
        inner=nn.Linear(4, 5),
        a=nn.Linear(4, 3),
    ),
    normal(4),
    {"inner.bias": "network", "inner": "network", "a": "rule"},
)


def _scaled_tanh(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w) * 2


add(
    "scripted_function",
    lambda: Net(
        lambda m, x: m.b(torch.jit.script(_scaled_tanh)(m.a(x), m.w)),
        a=nn.Linear(4, 4),
        w=parameter(4, 4),
        b=nn.Linear(4, 3),
    ),
    normal(4),
    {"w": "network", "": "rule"},
)

# --- forwards that are not the same each time ---


class Counting(nn.Module):
    """Changes a buffer, by its input, in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.b(torch.tanh(self.a(x)))


add("counting", Counting, normal(4))
add(
    "coupled",
    lambda: Net(lambda m, x: m.b(torch.tanh(m.a(x) - m.a(x).mean(0))), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
    normal(4),
    {"a": "pooled", "b": "rule"},
)
add("written_in", lambda: Net(lambda m, x: m.a(x.view(4, 4)), a=nn.Linear(4, 3)), normal(4), "pooled")


class SlopeNet(nn.Module):
    """What differentiates itself by its inputs, as physics-informed networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.b(torch.tanh(self.a(x))).sum(), x, create_graph=True)[0]


add("slopes", SlopeNet, normal(3), {"a.weight": "rows", "a.bias": "rule", "b": "rows"})
