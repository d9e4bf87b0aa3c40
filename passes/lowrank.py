"""The branch `+rN`: the best rank-N correction of what packing lost.

With a Hessian the error is weighted by the activations that will meet it (as in CorDA, arXiv
2406.05223), without one by nothing (LQER, arXiv 2402.02446).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.ir.format import Packed


def lowrank(weight: Tensor, packed: Packed, hessian: Tensor | None) -> tuple[Tensor, ...]:
    """(down (r, K), up (N, r), scale (r,)) such that unpack(packed) + up · diag(scale) · down ≈ W.

    Empty when the format has no branch. `scale` holds ones: strength is a run-time argument.
    down and up have 16 bits: they correct an error of some percent, and half the bytes are half the
    time. bfloat16 cannot overflow, and matrix units multiply it.
    """
    rank = packed.format.rank
    if rank == 0:
        return ()
    error = weight.detach().float() - packed.unpack()
    if hessian is None:
        u, s, vt = torch.linalg.svd(error, full_matrices=False)
        down = vt[:rank]
    else:
        root, inverse = _roots(hessian.float())
        u, s, vt = torch.linalg.svd(error @ root, full_matrices=False)
        down = vt[:rank] @ inverse
    up = u[:, :rank] * s[:rank]
    dtype = weight.dtype if weight.element_size() == 2 else torch.bfloat16
    return down.to(dtype).contiguous(), up.to(dtype).contiguous(), torch.ones(rank, dtype=dtype)


def _roots(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root of the damped Hessian and its inverse."""
    values, vectors = torch.linalg.eigh(hessian)
    values = values.clamp(min=float(values.max()) * 1e-4 + 1e-12)
    root = (vectors * values.sqrt()) @ vectors.T
    return root, (vectors / values.sqrt()) @ vectors.T
