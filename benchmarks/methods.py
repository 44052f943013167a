"""The methods compared: ours, torch's, and those of other packages. A new one is one function with `method`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fishopt
from benchmarks.caution import Cautious

Config = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """An optimizer.

    Attributes:
        name: As in tables.
        build: Makes it: network, loss, number of training examples, learning rate, and its own arguments.
        lr: Its default learning rate, the middle of the range that it is tuned in; None if it has none to tune.
        package: Of what else than torch it is a part, if it is.
        graph: Whether its backward must be differentiable.
        closure: Whether it evaluates the loss itself, several times in a step.
        iterations: How many steps a call of its ``step`` counts for.
        is_matrix: Whether a layer's weights are a matrix to it, orthogonalised or with matrices to precondition it, not
            entries each by itself.
        steady: What it takes, when it is tuned, with a constant learning rate.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    lr: float | None
    package: str | None = None
    graph: bool = False
    closure: bool = False
    iterations: int = 1
    is_matrix: bool = False
    steady: Config = field(default_factory=dict)

    def make(self, model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
        """An optimizer, at the default learning rate unless it is given another."""
        rate = {} if self.lr is None else {"lr": self.lr}
        return self.build(model, loss_fn, examples, **{**rate, **config})

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    @property
    def is_ours(self) -> bool:
        """Whether it is fishopt's."""
        return self.package == "fishopt"


METHODS: dict[str, Method] = {}


def method(name: str, lr: float | None, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a method; ``build(model, loss_fn, examples, **config)``."""

    def register(build: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
        METHODS[name] = Method(name, build, lr, **options)
        return build

    return register


# --- ours ---


@method("FisherAdam", 1e-3, package="fishopt")
def fisher_adam(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    return fishopt.FisherAdam(model, loss_fn, **config)


@method("FisherAdam schedule-free", 6e-3, package="fishopt")
def fisher_adam_schedule_free(
    model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any
) -> torch.optim.Optimizer:
    return fishopt.FisherAdam(model, loss_fn, schedule_free=True, **config)


@method("FisherAdam cautious", 1e-3, package="fishopt")
def fisher_adam_cautious(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    return Cautious(model, loss_fn, **config)


@method("DiagonalNGD", 1e-3, package="fishopt")
def diagonal_ngd(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    return fishopt.DiagonalNGD(model, loss_fn, **config)


@method("DiagonalNGD auto", None, package="fishopt")
def diagonal_ngd_auto(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    return fishopt.DiagonalNGD(model, loss_fn, lr="auto", **config)


# --- torch's ---


@method("AdamW", 1e-3)
def adamw(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True, **config)


@method("NAdam", 2e-3)
def nadam(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    return torch.optim.NAdam(model.parameters(), decoupled_weight_decay=True, **config)


@method("SGD", 1e-1)
def sgd(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **config)


@method("Muon", 1e-3, is_matrix=True)
def muon(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    """Matrices by Muon, scaled as AdamW's updates are, all else (and a convolution's weights) by AdamW."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return Several(
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **config),
        torch.optim.AdamW(others, fused=True, **config),
    )


@method("L-BFGS", None, closure=True, iterations=5, is_matrix=True)
def lbfgs(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    """Five iterations a call, the first of which evaluates once more where the last one ended.

    By itself ``max_eval`` is 5/4 of ``max_iter``, which leaves a line search nothing to search with, and the tolerances
    end a call where a loss of 1e-5 still falls.
    """
    options = {"line_search_fn": "strong_wolfe", "max_iter": 5, "max_eval": 125}
    options |= {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    return Restarting(model.parameters(), **options, **config)


class Restarting(torch.optim.LBFGS):
    """L-BFGS that forgets where a call has moved nothing: with the same memory the next one would not either."""

    def step(self, closure: Callable[[], Any]) -> Any:
        """One call."""
        before = [p.detach().clone() for p in self._params]
        loss = super().step(closure)
        if all(map(torch.equal, before, self._params)):
            self.state.clear()
        return loss


class Several(torch.optim.Optimizer):
    """Optimizers of different parameters as one; schedulers see all of their groups."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]
        self._parts = parts

    def step(self, closure: None = None) -> None:
        """One step of each."""
        for part in self._parts:
            part.step()


# --- other packages' ---


@method("Schedule-Free AdamW", 2.5e-3, package="schedulefree", steady={"warmup_steps": 100})  # as ours has
def schedule_free(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(model.parameters(), **config)


@method("SOAP", 3e-3, package="pytorch_optimizer", is_matrix=True)
def soap(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), **config)


@method("Sophia-H", 6e-2, package="pytorch_optimizer", graph=True)
def sophia(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SophiaH

    return SophiaH(model.parameters(), **config)


@method("AdaHessian", 1e-1, package="pytorch_optimizer", graph=True)
def adahessian(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdaHessian

    return AdaHessian(model.parameters(), **config)


@method("IVON", 1e-1, package="ivon")
def ivon(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    from ivon import IVON

    return IVON(model.parameters(), ess=examples, **config)


@method("SINGD", 1e-3, package="singd", is_matrix=True)
def singd(model: nn.Module, loss_fn: nn.Module, examples: int, **config: Any) -> torch.optim.Optimizer:
    """Linear layers and convolutions by SINGD, which trains no others, all else by AdamW."""
    from singd.optim.optimizer import SINGD

    kinds = nn.Linear | nn.Conv2d
    covered = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    own = [p for p in model.parameters() if id(p) in covered]
    others = [p for p in model.parameters() if id(p) not in covered]
    main = SINGD(model, params=own, **config)
    return Several(main, torch.optim.AdamW(others, fused=True, **config)) if others else main


# --- what they need of a training loop ---


@contextmanager
def surroundings(method: Method, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Where a method takes its gradients: IVON at a sample of its posterior, others where they have derivatives."""
    sample = getattr(optimizer, "sampled_params", None)
    with nullcontext() if sample is None else sample(train=True):
        if method.graph:  # the fused kernels of attention have no second derivatives
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            yield


def switch(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Puts in the weights that a method trains, or those that it evaluates, where they differ."""
    turn = getattr(optimizer, "train" if training else "eval", None)
    if turn is not None:
        turn()
