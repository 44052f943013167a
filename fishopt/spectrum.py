"""The Fisher information matrix as a whole, never stored: its Gram form, its products with vectors, its spectrum.

With ``J`` the rows ``(d h_n / d theta)^T c`` of a batch, over its inputs n and the cotangents c that an estimator
sends, divided by the root of the number of observations, the estimate of the P x P matrix is ``F = J^T J``. Its
eigenvalues other than zero are those of ``J J^T``, as large as the batch has rows, and its products with vectors take
one forward-mode and one reverse-mode pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishopt.batch import Batch, apart
from fishopt.checks import checked_option
from fishopt.eigenvalues import Spectrum, nonzero_eigenvalues
from fishopt.estimators import ESTIMATORS, Draw, by_structure, estimate, request
from fishopt.likelihoods import Likelihood
from fishopt.passes import Diagonal, add, pulled, pushed, trace

MATRICES = ("exact", "I1", "hutchinson", "empirical")
"""Estimators that are sums of squares, the diagonal of ``J^T J``."""

METHODS = ("auto", "gram", "lanczos")

GRAM_LIMIT = 4096
"""Rows, or parameters if these are fewer, up to which all eigenvalues are found, unless it is told otherwise."""

LEADING = 20
"""Eigenvalues that are found where not all of them are."""


@apart()
def fisher_gram(
    model: nn.Module,
    inputs: Any,
    likelihood: Any,
    *,
    estimator: str = "exact",
    samples: int = 1,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The Gram matrix of scores, whose eigenvalues other than zero are those of the Fisher information matrix.

    The matrix is the one whose diagonal is `fisher_diagonal` with the same arguments: per input, averaged over the
    batch (per observation, where labels have positions). Gradients of linear layers are never formed: where a weight
    is met once per input, ``<g a^T, g' a'^T> = <g, g'> <a, a'>``.

    Args:
        model: The network.
        inputs: A tensor, or a tuple of the network's positional arguments, with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        estimator: Where the rows are from: ``"exact"``, the columns of ``S S^T = I(h|x)``; ``"I1"``, labels sampled
            from the model; ``"hutchinson"``, random signs of these columns; ``"empirical"``, the data's labels.
        samples: Labels or signs drawn for each input.
        targets: The data's labels.
        generator: Makes the draws reproducible; torch's global generator if None.

    Returns:
        ``[N M, N M]``, M rows for each of the N inputs in turn: the T outputs, or ``samples``, or one.

    Raises:
        ValueError: If an argument does not fit, or the network couples its inputs.
        TypeError: If one is of the wrong kind.
    """
    return gram(*request(model, inputs, likelihood, estimator, MATRICES, samples, targets, generator), estimator)


def gram(batch: Batch, draw: Draw, estimator: str) -> Tensor:
    """`fisher_gram` of a checked batch."""
    with batch.whole() as (through, likelihood, h, _):
        columns = _columns(likelihood, h, draw, estimator)
        found = through.gram(columns / batch.observations**0.5)
    rows = columns.shape[0] * columns.shape[1]
    return found.permute(1, 0, 3, 2).reshape(rows, rows)


def _columns(likelihood: Likelihood, h: Tensor, draw: Draw, estimator: str) -> Tensor:
    columns = ESTIMATORS[estimator](likelihood, h, draw).squared
    assert columns is not None
    return columns


@apart()
def fisher_vector_product(
    model: nn.Module,
    inputs: Any,
    likelihood: Any,
    vector: Mapping[str, Tensor],
    *,
    targets: Tensor | None = None,
) -> Diagonal:
    """The product of a batch's exact Fisher information matrix with a vector, ``(1/N_x) sum_n J_n^T I(h_n) J_n v``.

    It is the generalised Gauss-Newton matrix of the mean negative log-likelihood (Schraudolph, 2002; Martens, 2020).

    Args:
        model: The network.
        inputs: A tensor, or a tuple of the network's positional arguments, with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        vector: Name of each trainable parameter -> tensor of its shape; parameters that are not there count as zero.
        targets: The data's labels, where some positions or inputs are to be ignored.

    Returns:
        Name of each trainable parameter -> tensor of its shape.

    Raises:
        ValueError: If an argument does not fit: a name or shape in ``vector`` that the model does not have.
        TypeError: If one is of the wrong kind.
    """
    batch, _ = request(model, inputs, likelihood, "exact", MATRICES, 1, targets, None)
    return _product(batch, _checked_vector(batch, vector), _information)


Between = Callable[[Likelihood, Tensor, Tensor, slice], Tensor]
"""What stands between the Jacobian and its transpose: takes a vector at the outputs of some inputs, ``[N, T]``."""


def _product(batch: Batch, vector: Mapping[str, Tensor], between: Between) -> Diagonal:
    total: Diagonal = {}
    for rows, part in batch.parts():
        outputs, (moved,) = pushed(batch.shadow, part, [vector])
        leaf = outputs.detach().requires_grad_()
        with torch.enable_grad():
            likelihood, h = batch.bound(leaf, rows)
        u = between(likelihood, h.detach(), batch.bound(moved, rows)[1], rows)
        # Natural parameters are the outputs in another order, perhaps, and this takes them back.
        (cotangent,) = torch.autograd.grad(h, leaf, u)
        add(total, pulled(batch.shadow, part, batch.names, cotangent))
    return {name: value / batch.observations for name, value in total.items()}


def _information(likelihood: Likelihood, h: Tensor, v: Tensor, rows: slice) -> Tensor:
    """``I(h|x) v = S S^T v``, S^T as the transpose of what the family gives as S."""
    e = torch.zeros_like(h, requires_grad=True)
    with torch.enable_grad():
        (back,) = torch.autograd.grad(likelihood.apply_factor(h, e), e, v)
    return likelihood.apply_factor(h, back)


def _checked_vector(batch: Batch, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vector with zeros where it has nothing.

    Raises:
        ValueError: If it names what the model does not train, or a shape or value does not fit.
        TypeError: If it is no mapping of tensors.
    """
    held = {name: batch.shadow.parameters[name] for name in batch.names}
    if not isinstance(vector, Mapping):
        raise TypeError(f"vector is a {type(vector).__name__}; pass a mapping of parameter names to tensors")
    for name, value in vector.items():
        if name not in held:
            raise ValueError(f"vector has {name!r}, no trainable parameter of the model; pass some of {list(held)[:5]}")
        if not isinstance(value, Tensor):
            raise TypeError(f"vector[{name!r}] is a {type(value).__name__}; pass a tensor")
        if value.shape != held[name].shape:
            raise ValueError(f"vector[{name!r}] has shape {tuple(value.shape)}; pass {tuple(held[name].shape)}")
        if not value.isfinite().all():
            raise ValueError(f"vector[{name!r}] contains NaN or infinite values; pass a finite direction")
    return {name: vector[name].detach().to(p) if name in vector else torch.zeros_like(p) for name, p in held.items()}


@apart()
def spectrum(
    model: nn.Module,
    inputs: Any,
    likelihood: Any,
    *,
    estimator: str = "exact",
    samples: int = 1,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
    method: str = "auto",
    count: int = LEADING,
) -> Spectrum:
    """The spectrum of the Fisher information matrix whose diagonal is `fisher_diagonal` with the same arguments.

    Args:
        model: The network.
        inputs: A tensor, or a tuple of the network's positional arguments, with one row per input.
        likelihood: A `Likelihood`, its name, or the torch loss module in use.
        estimator: As in `fisher_gram`.
        samples: As in `fisher_gram`.
        targets: The data's labels.
        generator: Makes draws, and Lanczos' starting vector, reproducible; torch's global generator if None.
        method: ``"gram"``, all eigenvalues, from ``J J^T`` or ``J^T J``, whichever is smaller; ``"lanczos"``, the
            largest, from products with vectors (scipy's ``eigsh``, of the extra ``fishopt[spectrum]``); ``"auto"``, the
            first up to 4,096 rows or parameters.
        count: How many Lanczos finds, fewer than there are parameters.

    Returns:
        See `Spectrum`.

    Raises:
        ValueError: If an argument does not fit.
        TypeError: If one is of the wrong kind.
    """
    checked_option("method", method, METHODS)
    batch, draw = request(model, inputs, likelihood, estimator, MATRICES, samples, targets, generator)
    size = sum(batch.shadow.parameters[name].numel() for name in batch.names)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count={count!r}: pass a positive number of eigenvalues")
    if method != "lanczos":  # counting rows takes a forward
        rows = _rows(batch, draw, estimator)
        if method == "gram" or min(rows, size) <= GRAM_LIMIT:
            matrix = gram(batch, draw, estimator) if rows <= size else _dense(batch, draw, estimator)
            return Spectrum(nonzero_eigenvalues(matrix), float(matrix.trace()), size, is_complete=True)
    if count >= size:
        raise ValueError(f"count={count}: Lanczos finds fewer than the {size} there are; pass method='gram'")
    return _by_lanczos(batch, draw, estimator, size, count)


def _rows(batch: Batch, draw: Draw, estimator: str) -> int:
    if estimator == "exact":
        rows, part = next(iter(batch.parts()))  # which tells the number of outputs
        with torch.no_grad():
            batch.bound(batch.shadow.run(part), rows)
        return len(batch) * batch.width
    return len(batch) * (1 if estimator == "empirical" else draw.samples)


def _dense(batch: Batch, draw: Draw, estimator: str) -> Tensor:
    """``J^T J`` itself, where it is smaller than ``J J^T``."""
    total: Tensor | float = 0.0
    for through, likelihood, h, rows in batch.chunks(batch.names, per_input=True):
        for column in _columns(likelihood, h, draw.rows(rows), estimator):
            found = through.vjp(column[None])
            scores = torch.cat([found[name].flatten(2)[0] for name in batch.names], dim=1)
            total = total + scores.T @ scores
    return torch.as_tensor(total / batch.observations)


def _by_lanczos(batch: Batch, draw: Draw, estimator: str, size: int, count: int) -> Spectrum:
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise ImportError("method='lanczos' needs scipy: pip install '.[spectrum]' from fishopt's source") from error
    between, total = _square(batch, draw, estimator)
    if not total:  # which is no starting point for Lanczos
        return Spectrum(torch.zeros(0, dtype=torch.float64, device="cpu"), total, size, is_complete=True)
    held = {name: batch.shadow.parameters[name] for name in batch.names}

    def product(flat: Any) -> Any:
        parts = torch.as_tensor(flat).flatten().split([p.numel() for p in held.values()])
        vector = {name: part.reshape(p.shape).to(p) for (name, p), part in zip(held.items(), parts, strict=True)}
        found = _product(batch, vector, between)
        return torch.cat([found[name].flatten() for name in held]).double().cpu().numpy()

    start = torch.rand(size, generator=draw.generator, device=_device(draw), dtype=torch.float64).cpu().numpy() - 0.5
    operator = LinearOperator((size, size), matvec=product, dtype=start.dtype)
    values = eigsh(operator, k=count, which="LA", v0=start, return_eigenvectors=False)
    found = torch.as_tensor(values).sort(descending=True).values
    wide = next(iter(held.values())).dtype
    kept = found[found > found[0] * size * torch.finfo(wide).eps]
    return Spectrum(kept, total, size, is_complete=len(kept) < count)  # after the first zero there are no others


def _device(draw: Draw) -> torch.device | None:
    return None if draw.generator is None else draw.generator.device


def _square(batch: Batch, draw: Draw, estimator: str) -> tuple[Between, float]:
    """What stands for I(h|x) in the estimate, ``sum_c c c^T``, the same draws at every product; and its trace."""
    if estimator == "exact":
        plan = by_structure({"exact": batch.names}, batch.structure, batch.coverage)
        found = estimate(batch, plan, draw)
        return _information, trace(found)
    parts, total = [], 0.0
    for through, likelihood, h, rows in batch.chunks(batch.names):
        parts.append(_columns(likelihood, h, draw.rows(rows), estimator))
        total += trace(through.squared_vjp(parts[-1]))
    columns = torch.cat(parts, dim=1)

    def between(likelihood: Likelihood, h: Tensor, v: Tensor, rows: slice) -> Tensor:
        own = columns[:, rows]
        return (own * (own * v).sum(2, keepdim=True)).sum(0)

    return between, total / batch.observations
