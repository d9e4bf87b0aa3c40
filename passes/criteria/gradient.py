"""Criteria that read the loss's gradient weight by weight."""

from __future__ import annotations

from torch import Tensor

from sparsefx.passes.criteria.base import given_gradients
from sparsefx.passes.gradients import Gradients
from sparsefx.passes.statistics import Statistics


def taylor(
    weight: Tensor, statistics: Statistics | None, gradients: Gradients | None, seed: int
) -> Tensor:
    """|w·E[g]| (N, K): first-order change of the loss (Molchanov et al., arXiv 1611.06440)."""
    return (weight.float() * given_gradients(gradients, "taylor").mean).abs()


def fisher(
    weight: Tensor, statistics: Statistics | None, gradients: Gradients | None, seed: int
) -> Tensor:
    """w²·E[g²] (N, K): second-order change with the empirical Fisher's diagonal as Hessian."""
    return weight.float().square() * given_gradients(gradients, "fisher").square
