"""Refit the kept weights of a mask to the calibration outputs: least squares, row by row.

Exact with one Cholesky factor per row while K is small; by ADMM with one factor for all rows
beyond. Source: Boža, "Fast and optimal weight update for pruned LLMs", arXiv 2401.02938.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.ir.errors import WeightError
from sparsefx.passes.statistics import Statistics

EXACT = 512
"""Largest K solved exactly: factors cost N·K³, ADMM N·K² a step."""
BUDGET = 128 << 20
"""Bytes of matrices that are factored together."""
STEPS = 40


def refit(weight: Tensor, mask: Tensor, statistics: Statistics, damping: float = 0.01) -> Tensor:
    """Ŵ (N, K) float32, 0 outside the boolean `mask`, of least ‖x·(W − Ŵ)ᵀ‖² + λ·‖(W − Ŵ)·mask‖².

    λ is `damping` times the mean diagonal of the sum of xᵀx. No row's output error is above the
    masked row's: one that would be keeps its weights. Raises WeightError without second moments.
    """
    if statistics.second is None:
        raise WeightError("refit needs second moments of the inputs; calibrate with moments")
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise WeightError(f"the mask must be bool {tuple(weight.shape)}, not {mask.dtype}")
    moments = statistics.second.to(weight.device)
    weight = weight.detach().float()
    masked = torch.where(mask, weight, 0)
    ridge = damping * float(moments.diagonal().mean())
    if not len(weight) or not float(moments.diagonal().max()) > 0:
        return masked
    damped = moments.clone()
    damped.diagonal().add_(ridge)
    solve = _exact if weight.shape[1] <= EXACT else _admm
    found = solve(weight, mask, damped)
    better = row_energies(weight - found, moments) < row_energies(weight - masked, moments)
    return torch.where(better[:, None], found, masked)


def row_energies(lost: Tensor, moments: Tensor) -> Tensor:
    """‖x·dᵀ‖² of every row d of `lost` (N, K): (N,) float64."""
    return ((lost @ moments).double() * lost).sum(1)


def _exact(weight: Tensor, mask: Tensor, damped: Tensor) -> Tensor:
    """Solve the kept columns' own normal equations of every row."""
    missing = torch.where(mask, 0, weight) @ damped
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    found = torch.where(mask, weight, 0)
    width = max(int(mask.sum(1).max()), 1)
    rows = max(1, BUDGET // (8 * width * width))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        columns = order[part, :width]
        kept = mask[part].gather(1, columns)
        matrices = damped[columns[:, :, None], columns[:, None, :]]
        matrices *= kept[:, :, None] & kept[:, None, :]
        matrices.diagonal(dim1=1, dim2=2).add_(~kept)
        factor, bad = torch.linalg.cholesky_ex(matrices)
        right = missing[part].gather(1, columns) * kept
        change = torch.cholesky_solve(right[..., None], factor)[..., 0]
        # A row without a factor keeps its masked weights.
        change = torch.where(kept & (bad == 0)[:, None], change, 0)
        found[part] = found[part].scatter_add(1, columns, change)
    return found


def _admm(weight: Tensor, mask: Tensor, damped: Tensor) -> Tensor:
    """Alternate the unmasked least squares and the projection on the mask.

    Columns are scaled to a unit diagonal, where a penalty of 1 suits every layer.
    """
    scale = damped.diagonal().clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    unit = damped / scale / scale[:, None]
    lower = torch.linalg.cholesky(unit + torch.eye(len(unit), device=unit.device))
    inverse = torch.cholesky_inverse(lower)
    scaled = weight * scale
    target = scaled @ unit @ inverse
    found = torch.where(mask, scaled, 0)
    dual = torch.zeros_like(found)
    for _ in range(STEPS):
        free = torch.addmm(target, found - dual, inverse)
        found = torch.where(mask, free + dual, 0)
        dual += free - found
    return found / scale
