"""Coordinate descent on what is stored: codes one column at a time, then all scales at once.

GPTQ's sweep decides every column once, before it knows what the later ones lose. Here each column
is decided again with all others as they are: output errors of four SmolLM2 layers fell by 6 to
18 % over five formats, on the calibration inputs.
Sources: Behdin et al., "QuantEase", arXiv 2309.01885; Nair & Suggala, "CDQuant", arXiv 2406.17542.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.ir.codecs import Codec, Grid
from sparsefx.ir.format import Packed

BLOCK = 128
"""Columns whose changes are gathered before all others hear of them."""
CELLS = 1 << 22
"""Numbers of the normal equations of scales that are held at once."""


def descend(weight: Tensor, packed: Packed, moments: Tensor, rounds: int = 2) -> Packed:
    """Lower tr((W − Ŵ) · M · (W − Ŵ)ᵀ) of what is stored for `weight` (N, K); the pattern stays.

    `moments` M (K, K) is the sum of xᵀx. Every round is two sweeps over the columns and one fit of
    the scales. Returns a Packed of the same format.
    """
    fmt, k = packed.format, packed.k
    _, mask, grid = packed.read()
    keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    values = packed.unpack().T.contiguous()
    target, kept = weight.detach().float().T.contiguous(), keep.T.contiguous()
    wanted = moments @ target
    for _ in range(rounds):
        pull = wanted - moments @ values
        for _ in range(2):
            _sweep(values, kept, pull, moments, fmt.codec, _columns(grid, fmt.codec, k))
        if grid.scales is not None:
            grid = fit_scales(wanted.T, values.T, grid, fmt.codec, moments)
            wide = grid.columns(0, k, fmt.codec.group(k))
            codes = fmt.codec.encode(values.T, wide)
            values = (fmt.codec.decode(codes, wide) * keep).T.contiguous()
    return fmt.pack(values.T, mask, grid)


def _columns(grid: Grid, codec: Codec, k: int) -> Grid:
    """Scales and zero points per column, (K, N)."""
    wide = grid.columns(0, k, codec.group(k))
    return Grid(*(None if t is None else t.T.contiguous() for t in (wide.scales, wide.zero_points)))


def _sweep(
    values: Tensor, kept: Tensor, pull: Tensor, moments: Tensor, codec: Codec, grid: Grid
) -> None:
    """Set every column of `values` (K, N) to the best code, the others being as they are.

    `pull` (K, N) is M · (W − Ŵ)ᵀ, kept so.
    """
    diagonal = moments.diagonal().clamp(min=1e-12).tolist()
    dead = (moments.diagonal() == 0).tolist()
    for start in range(0, len(values), BLOCK):
        stop = min(start + BLOCK, len(values))
        before = values[start:stop].clone()
        inner, near = moments[start:stop, start:stop], pull[start:stop].clone()
        for j in range(start, stop):
            if dead[j]:
                continue
            row = values[j]
            at = Grid(*(None if t is None else t[j] for t in (grid.scales, grid.zero_points)))
            want = near[j - start].div(diagonal[j]).add_(row)
            new = codec.decode(codec.encode(want, at), at).mul_(kept[j])
            ahead = j + 1 - start
            near[ahead:].addr_(inner[ahead:, j - start], new - row, alpha=-1)
            values[j] = new
        pull.addmm_(moments[:, start:stop], values[start:stop] - before, alpha=-1)


def fit_scales(wanted: Tensor, stored: Tensor, grid: Grid, codec: Codec, moments: Tensor) -> Grid:
    """The scales with the least output error for the codes of `stored` (N, K), which stay.

    `wanted` (N, K) is W · M for the weight W that is stood for. One system of normal equations per
    row: groups × groups.
    """
    assert grid.scales is not None
    n, k = stored.shape
    size = codec.group(k)
    count = grid.scales.shape[1]
    wide = grid.columns(0, k, size)
    units = stored / wide.scales  # type: ignore[operator]
    if count * size != k:
        units = torch.nn.functional.pad(units, (0, count * size - k))
        wanted = torch.nn.functional.pad(wanted, (0, count * size - k))
    scales = grid.scales.clone()
    step = max(CELLS // max(count * count, k), 1)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        scales[rows] = _solve(units[rows], wanted[rows], moments, scales[rows], size)
    return Grid(codec.store_scales(scales, grid.scales), grid.zero_points)


def _solve(units: Tensor, wanted: Tensor, moments: Tensor, old: Tensor, size: int) -> Tensor:
    """Least-squares scales (rows, groups); groups without a code keep the old one."""
    rows, count = old.shape
    k = len(moments)
    grouped = units.view(rows, count, size)
    right = (grouped * wanted.reshape(rows, count, size)).sum(-1)
    left = torch.empty(rows, count, count, device=units.device)
    for g in range(count):
        first, last = g * size, min((g + 1) * size, k)
        reach = units[:, first:last] @ moments[first:last, first:]  # it is symmetric
        reach = (
            torch.nn.functional.pad(reach, (0, count * size - k)) if count * size != k else reach
        )
        left[:, g, g:] = (reach.view(rows, count - g, size) * grouped[:, g:]).sum(-1)
        left[:, g + 1 :, g] = left[:, g, g + 1 :]
    diagonal = left.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    damping = 1e-4 * diagonal.mean(1, keepdim=True) + empty.float()
    right = right + damping * old
    diagonal += damping
    found: Tensor = torch.linalg.solve(left, right)
    return torch.where(empty | ~found.isfinite(), old, found)
