"""Data sets: files in their official layouts, fetched with a checksum where they are not there, and generated tables.

No pickle is ever loaded. A new data set is one function with the `source` decorator.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
import torch
from sklearn import datasets
from torch import Tensor

VALID = 5000
"""Training examples of an image data set that are held out for validation."""

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CONTEXT = 64
"""Characters in a window, nanoGPT's CPU setting."""


@dataclass(frozen=True)
class Part:
    """Examples, ``[N, ...]`` each."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def of(self, rows: Tensor | slice) -> Part:
        """Some of them."""
        return Part(self.inputs[rows], self.targets[rows])


@dataclass(frozen=True)
class Data:
    """What is trained on, what configurations are chosen on, and what is reported on."""

    train: Part
    valid: Part
    test: Part


Source = Callable[[Path | None], Data]
SOURCES: dict[str, Source] = {}
FILES = frozenset({"mnist", "mnist_pixels", "mnist_images", "cifar10", "shakespeare"})
"""The sources that read files; the others are generated or come with scikit-learn."""


def source(function: Source) -> Source:
    """Registers a data set under its function's name; it is loaded once in a process."""
    SOURCES[function.__name__] = cached = functools.cache(function)
    return cached


# --- files ---


@source
def mnist(folder: Path | None) -> Data:
    """MNIST as ``[N, 784]`` in [0, 1]: 55,000 to train, 5,000 to validate, 10,000 to test."""
    return _split(*(read_idx(_mnist_file(folder, name)) for name in MNIST_MD5))


@source
def mnist_images(folder: Path | None) -> Data:
    """The same as ``[N, 1, 28, 28]``."""
    return _mapped(mnist(folder), lambda part: Part(part.inputs.view(-1, 1, 28, 28), part.targets))


@source
def mnist_pixels(folder: Path | None) -> Data:
    """The same with the image itself as the target, for autoencoders."""
    return _mapped(mnist(folder), lambda part: Part(part.inputs, part.inputs))


@source
def cifar10(folder: Path | None) -> Data:
    """CIFAR-10 as ``[N, 3, 32, 32]``, channels of mean zero and variance one: 45,000 to train, 5,000, and 10,000."""
    parts = [np.fromfile(path, np.uint8).reshape(-1, 3073) for path in _cifar_files(folder)]
    train = np.concatenate(parts[:-1])
    found = _split(train[:, 1:], train[:, 0], parts[-1][:, 1:], parts[-1][:, 0])
    images = found.train.inputs.view(-1, 3, 1024)
    shift, scale = images.mean((0, 2)), images.std((0, 2))

    def standardised(part: Part) -> Part:
        x = (part.inputs.view(-1, 3, 1024) - shift[:, None]) / scale[:, None]
        return Part(x.view(-1, 3, 32, 32), part.targets)

    return _mapped(found, standardised)


@source
def shakespeare(folder: Path | None) -> Data:
    """Tiny Shakespeare by characters: windows of 64 and the next ones; a twentieth each to validate and to test."""
    path = _file(folder, "tinyshakespeare/input.txt", SHAKESPEARE_URL, f"sha256:{SHAKESPEARE_SHA256}")
    text = np.frombuffer(path.read_bytes(), np.uint8)
    _, codes = np.unique(text, return_inverse=True)
    tokens = torch.from_numpy(codes.astype(np.int64))
    cuts = [0, 9 * len(tokens) // 10, 19 * len(tokens) // 20, len(tokens)]
    train, *others = (tokens[a:b] for a, b in itertools.pairwise(cuts))
    # Any window to train on; for the others those that do not overlap.
    return Data(_windows(train, 1), *(_windows(part, CONTEXT) for part in others))


def _windows(tokens: Tensor, step: int) -> Part:
    views = tokens.unfold(0, CONTEXT + 1, step)
    return Part(views[:, :-1], views[:, 1:])


def _mnist_file(folder: Path | None, name: str) -> Path:
    return _file(folder, f"MNIST/raw/{name}", MNIST_URL + name, f"md5:{MNIST_MD5[name]}")


def _cifar_files(folder: Path | None) -> Iterable[Path]:
    here = _root(folder) / "cifar-10-batches-bin"
    if not all((here / name).exists() for name in CIFAR_FILES):
        pooch.retrieve(CIFAR_URL, f"md5:{CIFAR_MD5}", path=here.parent, processor=pooch.Untar(extract_dir="."))
    return (here / name for name in CIFAR_FILES)


def _file(folder: Path | None, name: str, url: str, known_hash: str) -> Path:
    path = _root(folder) / name
    if not path.exists():  # what is there is the user's own, and is taken as it is
        pooch.retrieve(url, known_hash, fname=path.name, path=path.parent, progressbar=True)
    return path


def _root(folder: Path | None) -> Path:
    return Path(pooch.os_cache("fishopt")) if folder is None else folder


def read_idx(path: Path) -> np.ndarray:
    """What an IDX file of bytes holds."""
    with gzip.open(path) as file:
        raw = file.read()
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _split(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Data:
    inputs, others = (torch.from_numpy(a / np.float32(255)).flatten(1) for a in (x, x_test))
    labels, test = (torch.from_numpy(a.astype(np.int64)) for a in (y, y_test))
    return Data(Part(inputs[:-VALID], labels[:-VALID]), Part(inputs[-VALID:], labels[-VALID:]), Part(others, test))


def _mapped(data: Data, function: Callable[[Part], Part]) -> Data:
    return Data(function(data.train), function(data.valid), function(data.test))


# --- tables ---


@source
def digits(folder: Path | None) -> Data:
    """Scikit-learn's handwritten digits, 1,797 of 64 pixels."""
    x, y = datasets.load_digits(return_X_y=True)
    return _table(x, torch.tensor(y))


@source
def diabetes(folder: Path | None) -> Data:
    """Scikit-learn's diabetes progression, 442 rows, the target standardised."""
    x, y = datasets.load_diabetes(return_X_y=True)
    return _table(x, torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)[:, None])


@source
def counts(folder: Path | None) -> Data:
    """Counts whose mean is Friedman's first function of 10 uniform inputs: 3,000 rows."""
    x, mean = datasets.make_friedman1(3000, noise=0.0, random_state=0)
    y = np.random.default_rng(0).poisson(mean)
    return _table(x, torch.tensor(y, dtype=torch.float32)[:, None])


def _table(x: np.ndarray, y: Tensor) -> Data:
    """Standardised by the training part: two thirds to train, a sixth each to validate and to test."""
    order = np.random.default_rng(0).permutation(len(x))
    cuts = (2 * len(x) // 3, 5 * len(x) // 6)
    train = x[order[: cuts[0]]]
    spread = train.std(0)
    inputs = torch.tensor((x - train.mean(0)) / np.where(spread > 0, spread, 1), dtype=torch.float32)
    parts = [Part(inputs[rows], y[torch.from_numpy(rows)]) for rows in np.split(order, cuts)]
    return Data(*parts)


# --- functions ---


@source
def curve(folder: Path | None) -> Data:
    """512 points of a function of one variable; validated on them, tested between them."""
    x = torch.linspace(-1, 1, 512)[:, None]
    between = torch.linspace(-1, 1, 2047)[:, None]
    train, test = (Part(t, torch.sin(3 * math.pi * t) + 0.3 * torch.cos(9 * math.pi * t)) for t in (x, between))
    return Data(train, train, test)


@source
def surface(folder: Path | None) -> Data:
    """512 points of a function of two variables; validated on them, tested on a grid."""
    x = 2 * torch.rand(512, 2, generator=torch.Generator().manual_seed(0)) - 1
    axis = torch.linspace(-1, 1, 48)
    grid = torch.cartesian_prod(axis, axis)
    train, test = (Part(t, torch.sin(math.pi * t[:, :1]) * torch.cos(2 * math.pi * t[:, 1:])) for t in (x, grid))
    return Data(train, train, test)


@source
def poisson_equation(folder: Path | None) -> Data:
    """Collocation points in the unit square for ``u_xx + u_yy = -2 pi^2 sin(pi x) sin(pi y)``; zero residuals.

    Tested by residuals elsewhere.
    """
    generator = torch.Generator().manual_seed(0)
    train, test = (Part(x, torch.zeros(len(x), 1)) for x in torch.rand(2, 512, 2, generator=generator))
    return Data(train, train, test)
