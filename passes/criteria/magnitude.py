"""|W|: needs no data."""

from __future__ import annotations

from torch import Tensor

from sparsefx.passes.gradients import Gradients
from sparsefx.passes.statistics import Statistics


def magnitude(
    weight: Tensor, statistics: Statistics | None, gradients: Gradients | None, seed: int
) -> Tensor:
    """|W| (N, K)."""
    return weight.float().abs()
