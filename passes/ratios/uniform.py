"""The same share everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from sparsefx.passes.ratios.base import Need, check


def uniform(sites: Sequence[Need], share: float) -> list[float]:
    """`share` for every Site."""
    check(sites, share)
    return [share] * len(sites)
