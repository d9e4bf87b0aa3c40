"""Erdős–Rényi-kernel: narrow weights keep more. Source: Evci et al., arXiv 1911.11134."""

from __future__ import annotations

from collections.abc import Sequence

from sparsefx.passes.ratios.base import MOST, Need, check, meet


def erk(sites: Sequence[Need], share: float) -> list[float]:
    """What each Site keeps is proportional to (N + K) / (N·K), between 1 − MOST and all."""
    check(sites, share)
    raw = [(site.n + site.k) / (site.n * site.k) for site in sites]
    if not raw:
        return []

    def shares(scale: float) -> list[float]:
        return [min(max(1 - scale * x, 0.0), MOST) for x in raw]

    return meet(sites, share, shares, 0.0, 1 / min(raw))
