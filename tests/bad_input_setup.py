"""What tests of bad input share: models that are refused, and what a call that is refused may not change."""

import copy
import math
import threading
import warnings

import torch
from torch import nn

import fishopt

MODEL = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])
CE = nn.CrossEntropyLoss()
BOTH = [fishopt.FisherAdam, fishopt.DiagonalNGD]
NAN = math.nan


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3, sparse=True)

    def forward(self, x):
        return self.table(x)


class Lambda(nn.Module):
    """A forward given from outside, around one linear layer."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def _frozen():
    return nn.Linear(4, 3).requires_grad_(False)


def _in_inference_mode():
    with torch.inference_mode():
        return nn.Linear(4, 3)


def _scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(4, 3))


def _sparse_weight():
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(model.weight.detach().to_sparse())
    return model


def _with_lock():
    model = Lambda(torch.tanh)
    model.guard = {"inner": [threading.Lock()]}
    return model


IN_PLACE = nn.Sequential(nn.ELU(inplace=True), nn.Linear(4, 3))


def _same(a, b):
    """Whether two nestings are equal, tensors by every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _held(optimizer):
    """All that a call that is refused may not change."""
    model = optimizer._model
    hooks = [len(module._forward_hooks) for module in model.modules()]
    grads = [p.grad for p in model.parameters()]
    state = {**optimizer.state_dict(), "defaults": dict(optimizer.defaults)}
    return copy.deepcopy([model.state_dict(), grads, state, hooks, torch.get_rng_state()])


def _trained(kind, model):
    optimizer = kind(model, CE)
    CE(model(X), Y).backward()
    optimizer.step()
    return optimizer
