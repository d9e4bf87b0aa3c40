"""The branch `+rN`: the best rank-N matrix next to another, in the metric of the inputs.

With second moments the difference is weighted by the activations that will meet it (as in CorDA,
arXiv 2406.05223), without them by nothing (LQER, arXiv 2402.02446).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsefx.ir.format import Packed

DAMPING = 1e-4
"""Least eigenvalue of the second moments, as a share of the greatest."""

Branch = tuple[Tensor, ...]
"""(down (r, K), up (N, r), scale (r,)), all 16 bits: + up · diag(scale) · down. Empty: none."""


def lowrank(weight: Tensor, packed: Packed, moments: Tensor | None) -> Branch:
    """The Branch with unpack(packed) + up · diag(scale) · down ≈ W; empty when there is no rank."""
    rank = packed.format.rank
    if rank == 0:
        return ()
    fit = fitter(moments, rank, dtype_for(weight))
    return fit(weight.detach().float() - packed.unpack())


def dtype_for(weight: Tensor) -> torch.dtype:
    """16 bits: a branch corrects an error of some percent, and half the bytes are half the time.

    bfloat16 cannot overflow, and matrix units multiply it.
    """
    return weight.dtype if weight.element_size() == 2 else torch.bfloat16


def fitter(
    moments: Tensor | None, rank: int, dtype: torch.dtype
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A function to the Branch nearest to a matrix (N, K), outputs weighted by `moments` (K, K).

    `scale` holds ones: strength is a run-time argument.
    """
    root = inverse = None
    if moments is not None:
        values, vectors = torch.linalg.eigh(moments.float())
        values = values.clamp(min=float(values.max()) * DAMPING + 1e-12).sqrt()
        root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T

    def fit(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vt = largest(matrix if root is None else matrix @ root, rank)
        # Half of each singular value on either side: both factors keep the same range in 16 bits.
        half = s.sqrt()
        down = half[:, None] * (vt if inverse is None else vt @ inverse)
        up = u * half
        ones = torch.ones(rank, dtype=dtype, device=matrix.device)
        return down.to(dtype).contiguous(), up.to(dtype).contiguous(), ones

    return fit


def largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triples (N, r), (r,), (r, K) of a matrix (N, K), float32.

    From the eigenvectors of the smaller Gram matrix: projecting on them is exact to rounding even
    where small singular values are not, and takes a fraction of a whole decomposition.
    """
    n, k = matrix.shape
    wide = matrix if n <= k else matrix.T
    vectors = torch.linalg.eigh(wide @ wide.T)[1].flip(1)[:, :rank]
    other = vectors.T @ wide
    s = other.norm(dim=1)
    other = other / s.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return (vectors, s, other) if n <= k else (other.T, s, vectors.T)


def product(branch: Branch) -> Tensor:
    """up · diag(scale) · down (N, K) in float32."""
    down, up, scale = (t.float() for t in branch)
    return (up * scale) @ down
