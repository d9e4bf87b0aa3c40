"""LoRA-guided: importance from a LoRA's factors and gradients instead of the weight's gradient.

Source: Zhang et al., "LoRAPrune", arXiv 2305.18403.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.ir.sites import Site
from sparsefx.passes.criteria.base import given_gradients
from sparsefx.passes.criteria.random import site_seed
from sparsefx.passes.gradients import (
    BUDGET,
    Gradients,
    Loss,
    evaluate,
    groups,
    only_these,
    take_samples,
)
from sparsefx.passes.statistics import Statistics

RANK, STEPS, RATE = 8, 64, 1e-3


def lora_guided(
    weight: Tensor, statistics: Statistics | None, gradients: Gradients | None, seed: int
) -> Tensor:
    """w²·E[ĝ²] (N, K) with the ĝ of `collect_lora`.

    The paper takes W + B·A for w; here B·A is thrown away after the measurement.
    """
    return weight.float().square() * given_gradients(gradients, "lora_guided").square


class Adapter:
    """B·A beside one weight (N, K): A (r, K) random as in LoRA (arXiv 2106.09685), B (N, r) 0."""

    def __init__(self, site: Site, device: torch.device, rank: int, seed: int) -> None:
        rank = min(rank, site.n, site.k)
        generator = torch.Generator().manual_seed(site_seed(seed, site.name))
        # Kaiming's uniform with a = √5, nn.Linear's default, which LoRA uses for A
        a = (2 * torch.rand(rank, site.k, generator=generator) - 1) / site.k**0.5
        self.a = a.to(device).requires_grad_(True)
        self.b = torch.zeros(site.n, rank, device=device, requires_grad=True)

    def beside(self, site: Site, weight: Tensor) -> Tensor:
        """W + B·A in the parameter's shape and dtype."""
        product: Tensor = site.parameter_shape(self.b @ self.a).to(weight.dtype)
        return weight + product

    def estimate(self, of_a: Tensor, of_b: Tensor) -> Tensor:
        """ĝ = ∂B·A + B·∂A − ∂B·∂A (N, K): how one step of both factors moves B·A."""
        a, b = self.a.detach(), self.b.detach()
        return torch.addmm(of_b @ a, b - of_b, of_a)


def collect_lora(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    loss: Loss | None = None,
    rank: int = RANK,
    steps: int = STEPS,
    seed: int = 0,
    budget: int = BUDGET,
) -> Iterator[tuple[Site, Gradients]]:
    """As `gradients.collect`, with ĝ in the gradient's place while adapters learn (Adam).

    One step a sample, `steps` at most; adapters of the Sites that `budget` holds learn together.
    The model's own parameters need no gradient and get no `.grad`.
    """
    data = take_samples(batches)[:steps]
    for group in groups(sites, copies=5, budget=budget):
        weights = [model.get_parameter(site.name) for site in group]
        pairs = list(zip(group, weights, strict=True))
        adapters = [Adapter(site, weight.device, rank, seed) for site, weight in pairs]
        found = [Gradients(site.n, site.k, weight.device) for site, weight in pairs]
        factors = [f for adapter in adapters for f in (adapter.a, adapter.b)]
        optimizer = torch.optim.Adam(factors, RATE)
        for sample in data:
            with only_these(model, ()):
                instead = {
                    site.name: adapter.beside(site, weight)
                    for adapter, (site, weight) in zip(adapters, pairs, strict=True)
                }
                value = evaluate(model, sample, loss, instead)
                got = torch.autograd.grad(value, factors, allow_unused=True)
            _step(adapters, found, got, optimizer)
        yield from zip(group, found, strict=True)


def _step(
    adapters: Sequence[Adapter],
    found: Sequence[Gradients],
    got: Sequence[Tensor | None],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Count every adapter's estimate, then move all adapters."""
    pairs = zip(got[::2], got[1::2], strict=True)
    for adapter, gradients, (of_a, of_b) in zip(adapters, found, pairs, strict=True):
        adapter.a.grad, adapter.b.grad = of_a, of_b
        if of_a is None or of_b is None:
            gradients.add(None)
        else:
            gradients.add(adapter.estimate(of_a, of_b))
    optimizer.step()
