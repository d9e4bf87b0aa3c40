"""Rows that share no columns but store them in runs of 16 or more, such as GQSA's `tile1x16`.

Rows are sorted by how many runs they store and 64 of a kind become a strip, filled up to its
longest row, so that uneven rows cost little and one kernel serves (arXiv 2412.17560 balances the
same unevenness over tasks).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.codegen.triton_pack import Columns, Dense2D, by_strip, parts_of, words
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import Tile

ROWS, SLICE = 64, 16
NONE = -SLICE
"""Start of a slice that is padding."""


def lanes_rejects(fmt: Format, k: int) -> str | None:
    """Why no strip of single rows holds this format."""
    tile = fmt.layout
    if not isinstance(tile, Tile) or tile.rows >= 16 or tile.cols % SLICE:
        return f"layout '{tile}' does not store single rows in runs of {SLICE} columns"
    group = fmt.codec.group(k)
    if group < k and group % SLICE:
        return f"scale groups of {group} columns are no whole slices of {SLICE}"
    return None


def lanes(packed: Packed) -> Columns:
    """`packed` in strips of rows with columns of their own."""
    fmt, n, k = packed.format, packed.n, packed.k
    dense = Dense2D.of(packed)
    assert dense.mask is not None
    parts = parts_of(fmt)
    runs = F.pad(dense.mask, (0, -k % SLICE)).view(n, -(-k // SLICE), SLICE).any(-1)
    counts = runs.sum(1)
    order = counts.argsort(descending=True, stable=True)
    order = F.pad(order, (0, -n % ROWS), value=n)
    per_strip = F.pad(counts, (0, 1))[order].view(-1, ROWS).amax(1)
    blocks = -(-per_strip // parts)
    starts = _starts(F.pad(runs, (0, 0, 0, 1))[order], blocks, parts)
    rows = order.view(-1, ROWS).repeat_interleave(blocks, 0)
    stored = dense.grid.scales, dense.grid.zero_points
    grid = [None if g is None else F.pad(g, (0, 0, 0, 1))[order] for g in stored]
    kind = torch.int16 if k < 2**15 else torch.int32
    return Columns(
        fmt, n, k, _codes(dense, fmt, starts, rows, n, k),
        by_strip(grid[0], ROWS, torch.float16), by_strip(grid[1], ROWS, torch.uint8),
        ROWS, SLICE, parts, 3, starts.to(kind).contiguous(), order.to(torch.int32),
        tuple(blocks.tolist()),
    )  # fmt: skip


def _starts(runs: Tensor, blocks: Tensor, parts: int) -> Tensor:
    """First columns (blocks, parts, ROWS) of the runs that sorted rows (strips · ROWS, …) store."""
    column = torch.arange(runs.shape[1], device=runs.device)
    # Stored runs first, in their order; what is behind a row's last one is padding.
    found = torch.where(runs, column, runs.shape[1]).sort(1).values
    longest = int(blocks.max()) * parts if len(blocks) else 0
    found = F.pad(found, (0, max(longest - found.shape[1], 0)), value=runs.shape[1])
    wide = found[:, :longest].reshape(len(blocks), ROWS, longest // parts, parts)
    wide = torch.where(wide == runs.shape[1], NONE, wide * SLICE).permute(0, 2, 3, 1)
    used = torch.arange(wide.shape[1], device=runs.device) < blocks[:, None]
    return wide[used]


def _codes(
    dense: Dense2D, fmt: Format, starts: Tensor, rows: Tensor, n: int, k: int
) -> tuple[Tensor, ...]:
    """Words (blocks, ROWS, SLICE) of each plane; `rows` (blocks, ROWS) of the weight, N for none.

    Padding reads as any code, x is 0 there.
    """
    codes = F.pad(dense.codes, (0, -k % SLICE, 0, 1)).view(n + 1, -(-k // SLICE), SLICE)
    picked = codes[rows[:, None, :], starts.clamp(min=0) // SLICE]  # (blocks, parts, ROWS, SLICE)
    return words(picked, fmt)
