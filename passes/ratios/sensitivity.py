"""By sensitivity: the least sum of squared relative output errors, from a few probes per Site."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparsefx.ir.errors import SpecError
from sparsefx.ir.layouts import Layout
from sparsefx.passes.ratios.base import MOST, Need, check, with_share
from sparsefx.passes.statistics import Statistics, output_error

PROBES = (0.2, 0.4, 0.55, 0.7, 0.85, MOST)

Point = tuple[float, float]


def probe_errors(
    weight: Tensor, statistics: Statistics | None, layout: Layout, scores: Tensor
) -> tuple[float, ...]:
    """Squared relative output errors of masking by `scores` at every share of PROBES."""
    errors = []
    for share in PROBES:
        kept = torch.where(with_share(layout, share).select(scores), weight, 0)
        errors.append(output_error(weight, kept, statistics) ** 2)
    return tuple(errors)


def sensitivity(sites: Sequence[Need], share: float) -> list[float]:
    """Shares that minimise Σ errors, each taken as the convex lower hull of its Site's probes.

    Exact for those hulls: straight pieces are spent in order of error per weight removed.
    """
    check(sites, share)
    if bare := next((site for site in sites if len(site.numbers) != len(PROBES)), None):
        raise SpecError(f"{bare.name}: ratio 'sensitivity' was not measured; it needs probes")
    pieces = []
    for index, site in enumerate(sites):
        hull = lower_hull([(0.0, 0.0), *zip(PROBES, site.numbers, strict=True)])
        for order, ((x0, y0), (x1, y1)) in enumerate(pairwise(hull)):
            cost = (y1 - y0) / ((x1 - x0) * site.n * site.k)
            pieces.append((cost, order, index, x1 - x0))
    left = share * sum(site.n * site.k for site in sites)
    out = [0.0] * len(sites)
    for _, _, index, width in sorted(pieces):
        size = sites[index].n * sites[index].k
        step = min(width, left / size)
        out[index] = min(out[index] + step, MOST)
        left = max(left - step * size, 0.0)  # rounding may take it below
    return out


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points, sorted by x, that a string pulled tight from below would touch."""
    hull: list[Point] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
