"""Solvers and after-treatments: how kept weights become codes. A new one is one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from sparsefx.ir.format import Format, Packed
from sparsefx.passes.descend import descend
from sparsefx.passes.dsnot import dsnot
from sparsefx.passes.refit import refit
from sparsefx.passes.round_to_nearest import round_to_nearest
from sparsefx.passes.sparsegpt import sparsegpt
from sparsefx.passes.statistics import Statistics

Solver = Callable[[Tensor, Format, Tensor | None, Statistics | None, float], Packed]
"""(weight (N, K), format, mask or None, statistics, damping) → what is stored."""
After = Callable[[Tensor, Packed, Statistics], Packed]
"""(weight (N, K), what is stored, statistics) → perhaps something better, of the same format."""


def _refit(weight: Tensor, packed: Packed, statistics: Statistics) -> Packed:
    mask = packed.mask()
    if mask is None:
        return packed
    return packed.format.pack(refit(weight, mask, statistics), mask)


def _dsnot(weight: Tensor, packed: Packed, statistics: Statistics) -> Packed:
    mask = packed.mask()
    if mask is None:
        return packed
    return packed.format.pack(weight, dsnot(weight, mask, statistics, packed.format.layout))


def _descend(weight: Tensor, packed: Packed, statistics: Statistics) -> Packed:
    return packed if statistics.second is None else descend(weight, packed, statistics.second)


SOLVERS: Mapping[str, Solver] = {"nearest": round_to_nearest, "sweep": sparsegpt}
AFTER: Mapping[str, After] = {"dsnot": _dsnot, "refit": _refit, "descend": _descend}
