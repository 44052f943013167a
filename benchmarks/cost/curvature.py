"""Ways to a diagonal of curvature, ours and others', each with a forward pass of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad, DiagGGNExact, DiagGGNMC, DiagHessian, SumGradSquared
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fishopt
from benchmarks.cost.inside import estimation
from benchmarks.cost.networks import Problem
from benchmarks.cost.timing import Case
from fishopt.passes.backpack import sum_grad_squared

GRADIENT = "gradient"
OURS = ("I1", "I1, 1/4 batch", "hutchinson", "exact", "I2, last two", "I2")
BACKPACK = {
    "BackPACK SumGradSquared": SumGradSquared,
    "BackPACK BatchGrad": BatchGrad,
    "BackPACK DiagGGNMC": lambda: DiagGGNMC(mc_samples=1),
    "BackPACK DiagGGNExact": DiagGGNExact,
    "BackPACK DiagHessian": DiagHessian,
    "our rules in BackPACK": sum_grad_squared,
}
METHODS = (*OURS, *BACKPACK, "torch.func vmap(grad)", "AdaHessian")
DEAR = ("BackPACK DiagHessian",)
"""Hundreds of gradients' time, left out of a quick look."""


def methods(problem: Problem, *, quick: bool) -> dict[str, Case]:
    """Every way that applies to a network, the gradient first."""
    found = {GRADIENT: gradient(problem), **ours(problem)}
    found.update({name: through_backpack(problem, make()) for name, make in BACKPACK.items()})
    found["torch.func vmap(grad)"] = per_sample_gradients(problem)
    found["AdaHessian"] = double_backward(problem)
    if problem.name != "mlp-sigmoid":
        # Piecewise linear networks have no more than a Gauss-Newton part; below sigmoids on images its factors take a
        # column for each unit, at the first convolution 50,176 of them for each input: a terabyte.
        found.pop("BackPACK DiagHessian")
    return {name: case for name, case in found.items() if not (quick and name in DEAR)}


def gradient(problem: Problem) -> Case:
    """The mean loss's gradient, that all ratios are to."""
    parameters = list(problem.model.parameters())
    return lambda: torch.autograd.grad(_loss(problem), parameters)


def ours(problem: Problem) -> dict[str, Case]:
    """fishopt's estimators; I2 where it is neither exact's value nor its cost."""
    family = fishopt.from_loss(nn.CrossEntropyLoss())

    def case(estimator: str, names: tuple[str, ...] = problem.names, x: Tensor = problem.x) -> Case:
        return estimation(problem.model, x, family, {estimator: names})

    found = {name: case(name) for name in ("I1", "hutchinson", "exact")}
    found["I1, 1/4 batch"] = case("I1", x=problem.x[: max(1, len(problem.x) // 4)])
    if any(isinstance(module, nn.Sigmoid) for module in problem.model):
        found["I2, last two"] = case("I2", problem.affine_names(2))
        found["I2"] = case("I2")
    return found


def through_backpack(problem: Problem, extension: Any) -> Case:
    """What BackPACK's extension leaves on the parameters; of gradients per input their mean square."""
    model = extend(copy.deepcopy(problem.model))
    loss_fn = extend(nn.CrossEntropyLoss())
    parameters = list(model.parameters())

    def run() -> list[Tensor]:
        loss = loss_fn(model(problem.x), problem.y)
        with backpack(extension):
            loss.backward()
        found = []
        for p in parameters:
            value = getattr(p, extension.savefield)
            found.append(value.square().sum(0) if isinstance(extension, BatchGrad) else value)
            delattr(p, extension.savefield)
            p.grad = None
        return found

    return run


def per_sample_gradients(problem: Problem) -> Case:
    """PyTorch's own way: torch.func's gradients per input, squared and averaged."""
    model = copy.deepcopy(problem.model).requires_grad_(False)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda: {n: g.square().mean(0) for n, g in gradients(parameters, problem.x, problem.y).items()}


def double_backward(problem: Problem) -> Case:
    """AdaHessian's estimate of the Hessian diagonal: random signs times their product with the Hessian."""
    parameters = list(problem.model.parameters())

    def run() -> list[Tensor]:
        grads = torch.autograd.grad(_loss(problem), parameters, create_graph=True)
        signs = [torch.randint_like(p, 2).mul_(2).sub_(1) for p in parameters]
        products = torch.autograd.grad(grads, parameters, grad_outputs=signs)
        return [sign * product for sign, product in zip(signs, products, strict=True)]

    return run


def _loss(problem: Problem) -> Tensor:
    return nn.functional.cross_entropy(problem.model(problem.x), problem.y)
