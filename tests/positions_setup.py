"""What tests of labels at several positions share: networks, and their moments by every joint label."""

import itertools
import math

import torch
from torch import nn

import fishopt
from fishopt.batch import Batch
from tests.reference import derivatives

IGNORED = -100


class Tokens(nn.Module):
    """Each position sees those before it: embedding, running mean, LayerNorm, head."""

    def __init__(self, classes):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, classes)

    def forward(self, x):
        seen = self.table(x).cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=torch.float64)[:, None]
        return self.head(torch.tanh(self.norm(seen)))


def _pixels(classes):
    return nn.Sequential(nn.Conv2d(1, 2, (2, 1)), nn.Sigmoid(), nn.Conv2d(2, classes, 1))


# name: network, classes, one input's shape (None: tokens), one output's, the dimension of classes there
NETWORKS = {
    "head": (lambda: nn.Linear(3, 3), (2, 3), (2, 3), -1),
    "hidden": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), (3, 3), (3, 2), -1),
    "tokens": (lambda: Tokens(3), None, (2, 3), -1),
    "pixels": (lambda: _pixels(2), (1, 2, 3), (2, 1, 3), 1),
    "middle": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (2, 2, 2))), (3,), (2, 2, 2), 2),
}


class Problem:
    """A network and its inputs, with all moments over joint labels computed from nothing but the definition."""

    def __init__(self, name, masked):
        build, shape, output, dim = NETWORKS[name]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = build().double()
            for p in self.model.parameters():
                p.data += 0.3 * torch.randn_like(p)
            self.inputs = torch.randint(0, 5, (3, 2)) if shape is None else torch.randn(3, *shape, dtype=torch.float64)
        self.likelihood = fishopt.Categorical(dim=dim)
        self.classes = output[dim if dim < 0 else dim - 1]
        self.places = output[:-1] if dim < 0 else output[: dim - 1] + output[dim:]
        self.dim, self.output = dim, output
        count = math.prod(self.places)
        self.mask = torch.ones(3, count, dtype=torch.bool)
        if masked:  # an input that counts whole, one in part, and one not at all
            self.mask[1, 0] = False
            self.mask[2] = False
        self.observations = int(self.mask.sum())
        self.targets = torch.where(self.mask, 1, IGNORED).reshape(3, *self.places) if masked else None
        self.d = derivatives(self.model, (self.inputs,))
        self.p = self.by_position(self.d.h).softmax(-1)

    def by_position(self, h):
        return h.reshape(-1, *self.output).movedim(self.dim, -1).flatten(1, -2)

    def in_order(self, rows):
        """``[..., N, P, T]`` as the network puts it out, ``[..., N, P * T]``."""
        split = rows.reshape(*rows.shape[:-2], *self.places, self.classes)
        axis = -1 if self.dim < 0 else self.dim - 1 - len(self.output)
        return split.movedim(-1, axis).flatten(-len(self.output))

    def labels(self):
        """Joint labels ``[K, P]``, their residuals ``[K, N, P * T]`` and probabilities ``[K, N]``."""
        y = torch.tensor(list(itertools.product(range(self.classes), repeat=self.p.shape[1])))
        hot = nn.functional.one_hot(y, self.classes)[:, None]
        c = (self.p - hot) * self.mask[..., None]
        return y, self.in_order(c), (self.p * hot).sum(-1).prod(-1)

    def covariance(self):
        """By the definition, from joint labels."""
        _, c, weights = self.labels()
        return torch.einsum("kn,kna,knb->nab", weights, c, c)

    def root(self):
        """The factor that the signs go into."""
        s = torch.diag_embed(self.p.sqrt()) - self.p[..., None] * self.p.sqrt()[..., None, :]
        n, count, t = self.p.shape
        columns = torch.zeros(count, t, n, count, t, dtype=self.p.dtype)
        for i in range(count):
            columns[i, :, :, i] = (s[:, i] * self.mask[:, i, None, None]).permute(2, 0, 1)
        return self.in_order(columns.flatten(0, 1))

    def fisher(self):
        return torch.einsum("nai,nab,nbi->ni", self.d.first, self.covariance(), self.d.first)

    def per_label(self, name):
        """The estimate of each input under each joint label (or sign), ``[K, N, params]``, and the weights."""
        if name == "hutchinson":
            root = self.root()
            signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(root))), dtype=self.p.dtype)
            q = torch.einsum("nai,sk,kna->sni", self.d.first, signs, root).square()
            return q, torch.full(q.shape[:2], 1 / len(signs), dtype=q.dtype)
        _, c, weights = self.labels()
        if name == "I1":
            return torch.einsum("nai,kna->kni", self.d.first, c).square(), weights
        return self.fisher() + torch.einsum("nai,kna->kni", self.d.second, c), weights

    def variance(self, name):
        values, weights = self.per_label(name)
        mean = (weights[..., None] * values).sum(0)
        torch.testing.assert_close(mean, self.fisher(), rtol=1e-9, atol=1e-12)  # unbiased, every one
        return (weights[..., None] * (values - mean).square()).sum(0)

    def mean(self, per_input):
        return self.d.by_name(per_input.sum(0) / self.observations)

    def batch(self):
        return Batch.of(self.model, self.inputs, self.likelihood, self.targets)
