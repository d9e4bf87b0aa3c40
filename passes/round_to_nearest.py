"""Without data: keep the largest magnitudes, round each to the nearest code."""

from __future__ import annotations

from torch import Tensor

from sparsefx.ir.format import Format, Packed


def round_to_nearest(weight: Tensor, hessian: Tensor | None, fmt: Format, damping: float) -> Packed:
    """Pack `weight` (N, K) by magnitude; `hessian` and `damping` are not used."""
    return fmt.pack(weight)
