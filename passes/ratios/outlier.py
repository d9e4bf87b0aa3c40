"""OWL: layers with more outliers keep more. Source: Yin et al., arXiv 2310.05175."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsefx.ir.errors import SpecError
from sparsefx.ir.layouts import Layout
from sparsefx.passes.criteria.wanda import wanda_layer
from sparsefx.passes.ratios.base import MOST, Need, check, meet
from sparsefx.passes.statistics import Statistics

TIMES = 5.0
"""A score counts as an outlier above so many times its Site's mean (the paper's M)."""
REACH = 0.08
"""No Site's share differs from the share of all by more (the paper's λ)."""


def outlier_share(
    weight: Tensor, statistics: Statistics | None, layout: Layout, scores: Tensor
) -> tuple[float, ...]:
    """The share of outliers among |W|·‖x‖, whatever criterion `scores` are of."""
    found = wanda_layer(weight, statistics, None, 0)
    return (float((found > TIMES * found.mean()).float().mean()),)


def outlier(sites: Sequence[Need], share: float) -> list[float]:
    """Shares fall with the outliers over a span of 2·REACH, within ±REACH of `share`."""
    check(sites, share)
    if bare := next((site for site in sites if len(site.numbers) != 1), None):
        raise SpecError(f"{bare.name}: ratio 'outlier' was not measured; it needs calibration=…")
    found = [site.numbers[0] for site in sites]
    if not found:
        return []
    span = max(found) - min(found)
    keep = [2 * REACH * (x - min(found)) / span if span else 0.0 for x in found]
    low, high = max(share - REACH, 0.0), min(share + REACH, MOST)

    def shares(shift: float) -> list[float]:
        return [min(max(share - x - shift, low), high) for x in keep]

    return meet(sites, share, shares, -3 * REACH, 3 * REACH)
