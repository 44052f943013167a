"""A likelihood of your own: counts that vary more than Poisson's, by the negative binomial with fixed dispersion.

Two methods are enough, the log-partition and a sampler; mean, variances and bounds follow by automatic differentiation.
The natural parameter is a log probability, so the network ends in ``-softplus``: its last layer is not affine any more,
and the selection finds that out by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fishopt
from fishopt.likelihoods import uniform


class NegativeBinomial(fishopt.Independent):
    """Failures before the r-th success: ``F(h) = -r log(1 - exp(h))``, h < 0 the log probability of a failure."""

    def __init__(self, r: int) -> None:
        self.r = r

    def log_partition(self, h: Tensor) -> Tensor:
        return -self.r * torch.log(-torch.expm1(h))

    def log_base_measure(self, y: Tensor) -> Tensor:
        return torch.lgamma(y + self.r) - torch.lgamma(y + 1) - torch.lgamma(torch.tensor(float(self.r)))

    def sample(self, h: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
        u = uniform((self.r, samples, *h.shape), h, generator)
        return (u.log() / h).floor().sum(0)  # a sum of r geometric numbers, each by inversion


class NegativeSoftplus(nn.Module):
    """Maps to h < 0."""

    def forward(self, z: Tensor) -> Tensor:
        return -nn.functional.softplus(z)


def main(steps: int = 400) -> None:
    """Fits simulated counts with both families and compares the likelihood of held-out ones."""
    torch.manual_seed(0)
    x = torch.rand(600, 2) * 2 - 1
    truth = NegativeBinomial(r=2)
    y = truth.sample(-torch.exp(-1 - x[:, :1] * x[:, 1:]), 1)[0]

    families: dict[str, tuple[fishopt.Likelihood, nn.Module]] = {
        "Poisson": (fishopt.Poisson(), nn.Identity()),
        "negative binomial": (truth, NegativeSoftplus()),
    }
    for name, (likelihood, end) in families.items():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1), end)
        optimizer = fishopt.FisherAdam(model, likelihood, lr=1e-2)
        for _ in range(steps):
            rows = torch.randint(0, 400, (64,))
            optimizer.zero_grad()
            likelihood.nll(model(x[rows]), y[rows]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            held_out = float(likelihood.nll(model(x[400:]), y[400:]).mean())
        print(f"{name}: held-out negative log-likelihood {held_out:.3f} nats")
        for choice in fishopt.select_estimators(model, x[:32], likelihood):
            print(f"  layer {choice.group}: {choice.estimator} ({choice.reason})")


if __name__ == "__main__":
    main()
