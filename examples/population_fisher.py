"""Fisher information of a population model, for designing experiments: the mathematics of optimal_design.py.

A subject of parameters g = beta exp(b), b ~ N(0, Omega), is measured at times t with errors e ~ N(0, Sigma),

    y = f(t, g) + h(f) e,        Omega and Sigma diagonal.

The first-order approximation takes y as normal, linearised at b = 0 (Leonov & Aliev, Optimal design for population
PK/PD models, Tatra Mt. Math. Publ. 51, 2012; in PopED's terms first-order, FO, without interaction):

    mu = f(t, beta),    V = L Omega L^T + diag(h Sigma h^T),    L = df/db and h at b = 0.

With theta = (beta, diag Omega, diag Sigma), the information of one subject is that of a normal distribution,

    I_ij = d_i mu^T V^-1 d_j mu + 1/2 tr(V^-1 d_i V V^-1 d_j V).

`full` has all of it: V moves with beta through both L and h. `reduced` takes dV/dbeta = 0, and so is block diagonal.
Of the normal model the full one is exact; of the nonlinear model that it approximates the reduced one was found to
predict standard errors better (Nyberg et al., Br. J. Clin. Pharmacol. 79, 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacfwd, vmap

CHUNK = 4096
"""Sets of times whose information is computed at once."""


@dataclass(frozen=True)
class Population:
    """A response with log-normal effects on all of its parameters.

    Attributes:
        response: ``f(t, g)``, any function in torch: times ``[n]`` and a subject's parameters ``[P]`` to ``[n]``.
        error: ``h(f)``: what errors are multiplied by, from responses ``[n]`` to ``[n, Q]``.
        fixed: beta, the typical subject's parameters: ``[P]``, in the response's units.
        omega: Variances of the effects b: ``[P]``, no unit.
        sigma: Variances of the errors e: ``[Q]``.

    Raises:
        ValueError: If a tensor is not one-dimensional, finite and positive, or omega does not fit fixed.
    """

    response: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor], Tensor]
    fixed: Tensor
    omega: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        for name in ("fixed", "omega", "sigma"):
            value = getattr(self, name)
            if value.ndim != 1 or not bool((value.isfinite() & (value > 0)).all()):
                raise ValueError(f"{name}={value}: pass a vector of finite numbers above 0")
        if len(self.omega) != len(self.fixed):
            raise ValueError(f"omega={self.omega}: pass one variance for each of the {len(self.fixed)} of fixed")

    @property
    def theta(self) -> Tensor:
        """(beta, omega, sigma): ``[p]``."""
        return torch.cat([self.fixed, self.omega, self.sigma])

    def moments(self, theta: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[n]`` and covariance ``[n, n]`` of the observations at ``times``, to first order."""
        beta, omega, sigma = theta.split([len(self.fixed), len(self.omega), len(self.sigma)])

        def of_effects(b: Tensor) -> Tensor:
            return self.response(times, beta * b.exp())

        zero = torch.zeros_like(beta)
        mean, slope = of_effects(zero), jacfwd(of_effects)(zero)
        return mean, (slope * omega) @ slope.T + torch.diag(self.error(mean).square() @ sigma)


@dataclass(frozen=True)
class Linearised:
    """Moments and their derivatives at G times; what any set of these times tells of theta follows from them.

    Attributes:
        mean_slope: dmu/dtheta: ``[G, p]``.
        covariance: V: ``[G, G]``.
        covariance_slope: dV/dtheta: ``[G, G, p]``.
    """

    mean_slope: Tensor
    covariance: Tensor
    covariance_slope: Tensor

    def information(self, sets: Tensor | None = None) -> Tensor:
        """One subject's information.

        Args:
            sets: Rows of indices of different times, ``[K, n]``; one set of all times if None.

        Returns:
            ``[K, p, p]``, or ``[p, p]`` for all times.

        Raises:
            ValueError: If the observations at a set of times have a singular covariance.
        """
        if sets is None:
            return self.information(torch.arange(len(self.covariance))[None])[0]
        return torch.cat([self._information(part) for part in sets.split(CHUNK)])

    def _information(self, sets: Tensor) -> Tensor:
        count, n = sets.shape
        rows, columns = sets[:, :, None], sets[:, None, :]
        factor, failed = torch.linalg.cholesky_ex(self.covariance[rows, columns])
        if failed.any():
            raise ValueError(
                f"times of numbers {sets[failed.argmax()].tolist()}: their observations have a singular covariance; "
                "take different times, and without an additive error none at which the response is zero"
            )

        def whitened(value: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(factor, value.reshape(count, n, -1), upper=False)

        # With C C^T = V: both terms of the information are Gram matrices of C^-1 dmu and of C^-1 dV C^-T.
        half = whitened(self.covariance_slope[rows, columns]).reshape(count, n, n, -1).transpose(1, 2)
        both = torch.cat([whitened(self.mean_slope[sets]), whitened(half).reshape(count, n * n, -1) / 2**0.5], 1)
        return both.mT @ both


def linearise(population: Population, times: Tensor, *, reduced: bool = False) -> Linearised:
    """Moments and derivatives at all of ``times``.

    Args:
        population: The model.
        times: ``[G]``, all different: two measurements at one time would have two errors, which V does not show.
        reduced: Whether dV/dbeta is taken as zero.

    Raises:
        ValueError: If times repeat, or the response or the errors' factors have another shape than they should.
    """
    if times.ndim != 1 or len(times.unique()) < len(times):
        raise ValueError(f"times={times}: pass a vector of different times")
    mean = population.response(times, population.fixed)
    if mean.shape != times.shape:
        raise ValueError(
            f"response: gives shape {tuple(mean.shape)} for {len(times)} times; one number for each is due"
        )
    factors, due = tuple(population.error(mean).shape), (len(times), len(population.sigma))
    if factors != due:
        raise ValueError(f"error: gives shape {factors}; {due} is due, a row for each time, a column for each of sigma")
    _, covariance = population.moments(population.theta, times)
    mean_slope, covariance_slope = jacfwd(population.moments)(population.theta, times)
    if reduced:
        covariance_slope = covariance_slope.clone()
        covariance_slope[..., : len(population.fixed)] = 0
    return Linearised(mean_slope, covariance, covariance_slope)


def simulated_scores(population: Population, times: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Scores d log p(y) / dtheta of the first-order normal model at observations drawn from it: ``[draws, p]``.

    The mean of their outer products estimates the full information without bias: what fishopt calls I1 (Eq. 3 of Soen
    & Sun 2024), for a whole matrix.
    """
    mean, covariance = population.moments(population.theta, times)
    normal = torch.randn(draws, len(times), generator=generator, dtype=mean.dtype)
    observed = mean + normal @ torch.linalg.cholesky(covariance).T

    def log_density(theta: Tensor, y: Tensor) -> Tensor:
        mu, v = population.moments(theta, times)
        factor = torch.linalg.cholesky(v)
        z = torch.linalg.solve_triangular(factor, (y - mu)[:, None], upper=False)
        return -factor.diagonal().log().sum() - z.square().sum() / 2

    return vmap(grad(log_density), in_dims=(None, 0), chunk_size=CHUNK)(population.theta, observed)


def relative_errors(information: Tensor, theta: Tensor) -> Tensor:
    """Relative standard errors of unbiased efficient estimates, by the Cramer-Rao bound: ``[p]``, in percent."""
    return 100 * torch.linalg.inv(information).diagonal().sqrt() / theta


def central(function: Callable[[Any], Any], at: Any, step: Any) -> Any:
    """Columns ``(function(at + step e_i) - function(at - step e_i)) / (2 step)``."""
    moves = step * np.eye(len(at), dtype=int).astype(object)
    return np.stack([(function(at + move) - function(at - move)) / (2 * step) for move in moves], -1)


def by_differences(
    curve: Callable[[Any, Any], Any],
    exp: Callable[[Any], Any],
    step: Any,
    times: Sequence[Any],
    fixed: Sequence[Any],
    omega: Sequence[Any],
    sigma: Sequence[Any],
) -> Linearised:
    """What `linearise` gives, as PopED computes it: derivatives of derivatives, all by central differences.

    The order of operations is that of PopED's gradff.R, gradfg.R, LinMatrixH.R and m2.R, because the error is rounding:
    a step of 1e-5, twice over, divides the last bit of f by 1e-10. Errors are proportional. All numbers are of one of
    Python's types, such as float or `decimal.Decimal`.

    Args:
        curve: f of one time and a subject's parameters.
        exp: The exponential function of that type: `math.exp`, or `decimal.Decimal.exp`.
        step: The step of every difference.
        times: As in `linearise`.
        fixed: As in `Population`, as the next two.
        omega: One for each of ``fixed``.
        sigma: One number.
    """
    beta, variances, error, no_effect = (np.array(v, object) for v in (fixed, omega, sigma, [0 * v for v in fixed]))
    no_error = 0 * error

    def subject(typical: Any, b: Any) -> Any:
        return typical * np.array([exp(value) for value in b], object)

    def observed(g: Any, e: Any) -> Any:
        return np.array([curve(t, g) for t in times], object) * (1 + e[0])

    def slopes(typical: Any) -> tuple[Any, Any]:
        g = subject(typical, no_effect)
        of_subject = central(lambda b: subject(typical, b), no_effect, step)
        of_response = central(lambda x: observed(x, no_error), g, step)
        return of_response @ of_subject, central(lambda e: observed(g, e), no_error, step)

    def covariance(typical: Any) -> Any:
        effects, errors = slopes(typical)
        return (effects * variances) @ effects.T + np.diag(((errors * error) @ errors.T).diagonal())

    effects, errors = slopes(beta)
    by_variances = [effects[:, None, :] * effects, np.diag(errors[:, 0] ** 2)[..., None]]
    of_mean = central(lambda typical: observed(subject(typical, no_effect), no_error), beta, step)
    parts = (
        np.concatenate([of_mean, np.zeros((len(times), len(omega) + 1))], 1),
        covariance(beta),
        np.concatenate([central(covariance, beta, step), *by_variances], -1),
    )
    return Linearised(*(torch.from_numpy(part.astype(float)) for part in parts))
