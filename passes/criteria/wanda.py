"""Wanda: |W|·‖x‖₂. Source: Sun et al., arXiv 2306.11695."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.passes.criteria.base import given_inputs
from sparsefx.passes.gradients import Gradients
from sparsefx.passes.statistics import Statistics


def wanda(
    weight: Tensor, statistics: Statistics | None, gradients: Gradients | None, seed: int
) -> Tensor:
    """|W|·‖x‖ with the same ladder of values in every row, so that rows lose equally many weights.

    The paper compares within an output row, `Layout.select` within the matrix. Each row's r-th
    smallest score becomes the mean of all rows' r-th smallest (quantile normalisation): order
    within rows stays, every row has as many scores above any threshold, and means over tiles keep
    their scale. Rows differ only where that mean is the same for several r (inputs that are 0).
    """
    scores = wanda_layer(weight, given_inputs(statistics, "wanda"), gradients, seed)
    values, order = scores.sort(dim=1, stable=True)
    ladder = values.double().mean(0).cummax(0).values.float()
    return torch.empty_like(scores).scatter_(1, order, ladder.expand_as(scores))


def wanda_layer(
    weight: Tensor, statistics: Statistics | None, gradients: Gradients | None, seed: int
) -> Tensor:
    """|W|·‖x‖ (N, K), compared across the whole matrix."""
    return weight.float().abs() * given_inputs(statistics, "wanda_layer").norms
