"""The solver without error feedback: every kept weight goes to its nearest code."""

from __future__ import annotations

from torch import Tensor

from sparsefx.ir.format import Format, Packed
from sparsefx.passes.statistics import Statistics


def round_to_nearest(
    weight: Tensor, fmt: Format, mask: Tensor | None, statistics: Statistics | None, damping: float
) -> Packed:
    """Pack `weight` (N, K) by `mask`, by magnitude without one; scales have the best clipping."""
    return fmt.pack(weight, mask)
