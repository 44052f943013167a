"""The problems: data, a network, a loss, a number of steps. A new one is one function with the `problem` decorator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.data import FILES, SOURCES, Data, Part
from benchmarks.models import CharTransformer, PoissonResidual, conv3_dense3, mlp, resnet8, small_cnn

CHUNK = 1000
"""Examples that are evaluated at a time."""


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        name: As in tables.
        about: In words.
        source: The name of its data.
        network: Makes a network, from torch's global generator.
        loss: Makes the loss module.
        steps: The budget.
        batch: Examples per step; all of them if None.
        goal: A target known in advance, at which training ends; the tuned AdamW's if None.
        most: Examples of the validation set that are looked at in training.
    """

    name: str
    about: str
    source: str
    network: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    steps: int
    batch: int | None
    goal: float | None = None
    most: int = 5000

    @property
    def is_classification(self) -> bool:
        """Whether the metric is the error rate; else it is the loss."""
        return self.loss is nn.CrossEntropyLoss and self.source != "shakespeare"

    @property
    def has_goal(self) -> bool:
        """Whether training ends at a goal: what it ends with is then by how much a method overshot, no result."""
        return self.goal is not None

    @property
    def has_zero(self) -> bool:
        """Whether a percent of the metric means something: Poisson's loss is without its constant."""
        return self.loss is not counted

    @property
    def metric(self) -> str:
        """The name of what is compared: the less the better."""
        return "error rate" if self.is_classification else "loss"

    @property
    def every(self) -> int:
        """Steps between evaluations: of full batches, whose evaluation costs no more than a step, more often."""
        return max(1, self.steps // (200 if self.batch is None else 50))

    @property
    def needs_files(self) -> bool:
        """Whether its data are files, not part of scikit-learn or generated."""
        return self.source in FILES

    def data(self, folder: Path | None) -> Data:
        """Its data; from files in ``folder``, or fetched."""
        return SOURCES[self.source](folder)

    def evaluate(self, model: nn.Module, part: Part) -> tuple[float, float]:
        """Loss and metric on some examples, the network as it is used after training."""
        loss_fn, was_training = self.loss(), model.training
        losses, errors = 0.0, 0.0
        with torch.no_grad():
            model.eval()
            for rows in torch.arange(len(part)).split(CHUNK):
                some = part.of(rows)
                h = model(some.inputs)
                losses += float(objective(loss_fn, h, some.targets)) * len(rows)
                if self.is_classification:
                    errors += float((h.argmax(1) != some.targets).sum())
            model.train(was_training)
        loss = losses / len(part)
        return loss, errors / len(part) if self.is_classification else loss


def objective(loss_fn: nn.Module, h: Tensor, targets: Tensor) -> Tensor:
    """The loss; labels of several positions are so many labels."""
    if isinstance(loss_fn, nn.CrossEntropyLoss) and h.ndim == 3:
        return loss_fn(h.flatten(0, 1), targets.flatten())
    return loss_fn(h, targets)


PROBLEMS: dict[str, Problem] = {}


def problem(
    source: str,
    loss: Callable[[], nn.Module],
    *,
    steps: int,
    batch: int | None = 128,
    goal: float | None = None,
    most: int = 5000,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Registers a problem under the name of the function that makes its network; the docstring says what it is."""

    def register(network: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = network.__name__
        about = (network.__doc__ or "").strip()
        PROBLEMS[name] = Problem(name, about, source, network, loss, steps, batch, goal, most)
        return network

    return register


@problem("digits", nn.CrossEntropyLoss, steps=500, batch=64)
def digits_mlp() -> nn.Module:
    """Digits, MLP 64-64-10, ReLU."""
    return mlp((64, 64, 10))


MNIST = (784, 256, 256, 128, 10)


@problem("mnist", nn.CrossEntropyLoss, steps=1200)
def mnist_relu() -> nn.Module:
    """MNIST, MLP 784-256-256-128-10, ReLU, batches of 128."""
    return mlp(MNIST)


@problem("mnist", nn.CrossEntropyLoss, steps=300, batch=1024)
def mnist_relu_large() -> nn.Module:
    """The same, batches of 1,024."""
    return mlp(MNIST)


@problem("mnist", nn.CrossEntropyLoss, steps=1200)
def mnist_sigmoid() -> nn.Module:
    """MNIST, MLP 784-256-256-128-10, sigmoid, batches of 128."""
    return mlp(MNIST, nn.Sigmoid)


@problem("mnist", nn.CrossEntropyLoss, steps=300, batch=1024)
def mnist_sigmoid_large() -> nn.Module:
    """The same, batches of 1,024."""
    return mlp(MNIST, nn.Sigmoid)


@problem("mnist_images", nn.CrossEntropyLoss, steps=500, batch=64, most=1000)
def mnist_cnn() -> nn.Module:
    """MNIST, two convolutions and two dense layers, batches of 64."""
    return small_cnn()


@problem("cifar10", nn.CrossEntropyLoss, steps=500, batch=64, most=500)
def cifar_3c3d() -> nn.Module:
    """CIFAR-10, 3c3d of DeepOBS, batches of 64."""
    return conv3_dense3()


@problem("cifar10", nn.CrossEntropyLoss, steps=500, batch=64, most=500)
def cifar_resnet8() -> nn.Module:
    """CIFAR-10, ResNet-8 with BatchNorm, batches of 64."""
    return resnet8()


@problem("mnist_pixels", nn.BCEWithLogitsLoss, steps=1000, most=2000)
def mnist_autoencoder() -> nn.Module:
    """MNIST, autoencoder 784-256-64-16-64-256-784, tanh, Bernoulli pixels."""
    return mlp((784, 256, 64, 16, 64, 256, 784), nn.Tanh)


@problem("shakespeare", nn.CrossEntropyLoss, steps=1000, batch=12, most=200)
def char_transformer() -> nn.Module:
    """Tiny Shakespeare, nanoGPT's CPU setting: 4 layers, 4 heads, width 128, context 64, batches of 12."""
    return CharTransformer()


def counted() -> nn.Module:
    """Poisson's loss, for outputs that are log rates."""
    return nn.PoissonNLLLoss(log_input=True)


@problem("counts", counted, steps=600, batch=64)
def poisson_regression() -> nn.Module:
    """Counts of a Friedman function, MLP 10-64-64-1, tanh, Poisson."""
    return mlp((10, 64, 64, 1), nn.Tanh)


@problem("diabetes", nn.MSELoss, steps=300, batch=32)
def gaussian_regression() -> nn.Module:
    """Diabetes progression, MLP 10-32-32-1, tanh, squared loss."""
    return mlp((10, 32, 32, 1), nn.Tanh)


@problem("curve", nn.MSELoss, steps=12000, batch=None, goal=1e-5)
def fit_curve() -> nn.Module:
    """A function of one variable at 512 points, MLP 1-64-64-64-1, tanh, full batch."""
    return mlp((1, 64, 64, 64, 1), nn.Tanh)


@problem("surface", nn.MSELoss, steps=12000, batch=None, goal=1e-5)
def fit_surface() -> nn.Module:
    """A function of two variables at 512 points, MLP 2-64-64-64-1, tanh, full batch."""
    return mlp((2, 64, 64, 64, 1), nn.Tanh)


@problem("poisson_equation", nn.MSELoss, steps=2000, batch=None, goal=1e-5)
def pinn_poisson() -> nn.Module:
    """Poisson's equation on the unit square, a physics-informed network 2-32-32-1, tanh, full batch."""
    return PoissonResidual()
