"""What a ratio is, and how shares of Sites are made to meet the share of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from sparsefx.ir.errors import SpecError
from sparsefx.ir.layouts import Dense, Layout, Tile
from sparsefx.passes.statistics import Statistics

MOST = 0.95
"""The largest share any Site loses."""


@dataclass(frozen=True)
class Need:
    """What is known of one Site: its size and the numbers its `Ratio.measure` gave."""

    name: str
    n: int
    k: int
    numbers: tuple[float, ...] = ()


Measure = Callable[[Tensor, Statistics | None, Layout, Tensor], tuple[float, ...]]


def nothing(
    weight: Tensor, statistics: Statistics | None, layout: Layout, scores: Tensor
) -> tuple[float, ...]:
    """No numbers: the ratio reads sizes only."""
    return ()


@dataclass(frozen=True)
class Ratio:
    """`shares(sites, share)`: the share each Site loses, in the order given.

    Shares lie in [0, MOST] and their mean, weighted by n·k, is `share`. `measure(weight,
    statistics, layout, scores)` gives one Site's numbers, so that no two weights need be held at
    once; `weight` and the criterion's `scores` are (N, K) float32. Raises SpecError.
    """

    name: str
    shares: Callable[[Sequence[Need], float], list[float]]
    measure: Measure = nothing
    needs: Literal["", "inputs"] = ""


def with_share(layout: Layout, share: float) -> Layout:
    """`layout` with this share removed, to the 0.0001 % its text shows; `dense` for nothing.

    Raises SpecError for a layout whose share is part of its pattern.
    """
    if not isinstance(layout, Tile):
        raise SpecError(
            f"layout '{layout}' keeps the same share everywhere, so layers cannot get shares of "
            "their own; use 'bitmap@50%' or 'tile16x1@50%', or the ratio 'uniform' on its own"
        )
    if not 0 <= share < 1:
        raise SpecError(f"share {share:g} of '{layout}': a layer loses from 0 up to, not all, of 1")
    shown = min(float(f"{100 * share:.4f}"), 99.9999) / 100
    return replace(layout, share=shown) if shown else Dense()


def check(sites: Sequence[Need], share: float) -> None:
    """Raises SpecError when no shares in [0, MOST] can have this mean."""
    if not 0 <= share <= MOST:
        raise SpecError(f"share {share:g} of all weights: ratios meet shares from 0 to {MOST:g}")
    if empty := next((site for site in sites if site.n * site.k == 0), None):
        raise SpecError(f"{empty.name}: a weight of shape ({empty.n}, {empty.k}) has no share")


def meet(
    sites: Sequence[Need],
    share: float,
    shares: Callable[[float], list[float]],
    low: float,
    high: float,
) -> list[float]:
    """`shares(t)` at the t in [low, high] where the mean is `share`; it must not rise with t."""
    total = sum(site.n * site.k for site in sites)
    for _ in range(200):  # doubles hold no more halvings of an interval
        middle = (low + high) / 2
        mean = sum(s.n * s.k * x for s, x in zip(sites, shares(middle), strict=True)) / total
        low, high = (middle, high) if mean > share else (low, middle)
    return shares((low + high) / 2)
