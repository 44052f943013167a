"""What tests of the Fisher matrix share: the dense one by definition, and directions to multiply it with."""

import functools

import torch

from tests.reference import derivatives, moments


@functools.cache
def _brute(case):
    """Derivatives and moments by enumeration, which takes seconds for three Poisson outputs."""
    model, inputs, _ = case.build()
    d = derivatives(model, inputs)
    return d, moments(d, case.family)


def _dense(case):
    """The exact matrix by definition, ``[P, P]``, and what it is made of."""
    model, inputs, likelihood = case.build()
    d, m = _brute(case)
    covariance = m.covariance
    return model, inputs, likelihood, torch.einsum("nap,nab,nbq->pq", d.first, covariance, d.first) / len(d.h)


def _flat(by_name):
    return torch.cat([value.flatten() for value in by_name.values()])


def _directions(model, count=3):
    generator = torch.Generator().manual_seed(5)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [
        {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in named.items()}
        for _ in range(count)
    ]
