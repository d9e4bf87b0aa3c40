"""Packed weights in the orders that the Triton kernels read.

Two orders serve every format. `Columns`: rows that store the same columns form a strip, whose
columns lie one behind another; dense weights are one strip. `Masked`: every row's stored codes one
behind another, with a mask bit per cell of columns. Integer codes are cut into planes of 8, 4, 2 or
1 bits (3 = 2 + 1), so that every width loads whole words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.ir.codecs import Codec, Fp8, Grid, Int
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import Dense, Layout, Tile

WORDS = {8: torch.int32, 4: torch.int32, 2: torch.int16, 1: torch.int8}
"""The word that holds the codes of one plane in all slices of a block."""
STEP = 512
"""Columns, at least, between two places where a task of the mask kernel may begin."""
Task = tuple[int, int, int, int]
"""Strip, first row in it, first block, block after the last."""


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes, lowest bits first."""
    return (8,) if bits == 8 else tuple(w for w in (4, 2, 1) if bits & w)


def bits_of(codec: Codec) -> int:
    """Bits of a stored code that a scale multiplies; 0 for values that stand for themselves."""
    return codec.bits if isinstance(codec, Int) else 8 if isinstance(codec, Fp8) else 0


def parts_of(fmt: Format) -> int:
    """Slices of a block: the codes that a word of the widest plane holds."""
    return {0: 1, 8: 4}.get(bits_of(fmt.codec), 8)


def power(count: int) -> int:
    """The power of two that is `count` or the next above it; 1 for 0."""
    return 1 << (max(count, 1) - 1).bit_length()


@dataclass(frozen=True)
class Dense2D:
    """Every position of a weight: codes of 0 or more or float values (N, K), the mask, the grid."""

    codes: Tensor
    mask: Tensor | None
    grid: Grid

    @staticmethod
    def of(packed: Packed) -> Dense2D:
        """Codes count from `low`; what is not stored has the code of zero."""
        codec, n, k = packed.format.codec, packed.n, packed.k
        values, mask, grid = packed.read()
        if isinstance(codec, Fp8):
            values = codec.write(values, grid)[0].to(torch.int32)
        if not isinstance(codec, Int):
            full = values.new_zeros(n, k) if mask is not None else values.view(n, k)
            return Dense2D(full if mask is None else full.masked_scatter_(mask, values), mask, grid)
        codes = values.to(torch.int32) - codec.low
        if mask is None:
            return Dense2D(codes.view(n, k), mask, grid)
        full = codes.new_full((n, k), -codec.low)
        zeros = grid.columns(0, k, codec.group(k)).zero_points
        if zeros is not None:
            full = zeros.to(torch.int32)
        return Dense2D(full.masked_scatter(mask, codes), mask, grid)


@dataclass(frozen=True)
class Prepared:
    """What both orders have; `planes` are as `order_names` of the subclass says."""

    format: Format
    n: int
    k: int
    planes: tuple[Tensor, ...]
    scales: Tensor | None
    zeros: Tensor | None

    @property
    def widths(self) -> tuple[int, ...]:
        bits = bits_of(self.format.codec)
        return planes(bits) if bits else (0,)

    @property
    def offset(self) -> int:
        codec = self.format.codec
        return -codec.low if isinstance(codec, Int) else 0

    @property
    def tensors(self) -> list[Tensor]:
        return [v for v in (*self.planes, self.scales, self.zeros) if v is not None]

    @cached_property
    def bytes(self) -> int:
        """Bytes that a product with one row of x reads."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


@dataclass(frozen=True)
class Columns(Prepared):
    """Strips of `rows` rows; a block is `parts` slices of `slice` stored columns.

    planes: words (blocks, slice, rows), strip after strip; scales and zeros (strips, groups, rows);
    `columns`: None, slice starts (blocks, parts) or columns (blocks, parts, slice), padding < 0;
    `counts`: blocks of every strip. `triton_lanes` has rows with columns of their own: slice starts
    (blocks, parts, rows), words (blocks, rows, slice), and `order`, the row of the weight (N for
    none) that stands at (strips, rows).
    """

    rows: int
    slice: int
    parts: int
    gather: int
    columns: Tensor | None
    order: Tensor | None
    counts: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, *(t for t in (self.columns, self.order) if t is not None)]

    def row_blocks(self, size: int) -> list[Task]:
        """Blocks of `size` results, each with all blocks of columns it needs."""
        begins = accumulate(self.counts, initial=0)
        return [
            (strip, row, begin, begin + count)
            for strip, (begin, count) in enumerate(zip(begins, self.counts, strict=False))
            for row in range(0, min(self.rows, self.n - strip * self.rows), size)
        ]


@dataclass(frozen=True)
class Masked(Prepared):
    """Streams of codes in int32 words (values for floats), one row behind another.

    mask (mask rows, words) int32, a bit per `cell` columns; begins (N,) int64: a row's first code;
    starts (N, steps) int32: codes of the row before every `step_words` words; scales, zeros
    (N, groups).
    """

    mask: Tensor
    begins: Tensor
    starts: Tensor
    cell: int
    mask_rows: int
    step_words: int

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, self.mask, self.begins, self.starts]

    def row_blocks(self, size: int) -> list[Task]:
        """Blocks of `size` results with all steps of columns."""
        return [(0, row, 0, self.starts.shape[1]) for row in range(0, self.n, size)]


# --- Columns -------------------------------------------------------------------------------------


def columns_rejects(fmt: Format, k: int, a8: bool) -> str | None:
    """Why no `Columns` order holds this format."""
    if not isinstance(fmt.layout, Dense | Tile):
        return f"rows of layout '{fmt.layout}' share no columns"
    if isinstance(fmt.layout, Tile) and fmt.layout.rows < 16:
        return f"{fmt.layout.rows} rows share columns: too few for tensor cores"
    group, least = fmt.codec.group(k), 32 if a8 else 16
    if group < k and group % least:
        return f"scale groups of {group} columns are no whole slices of {least}"
    return None


def columns(packed: Packed, a8: bool) -> Columns:
    """`packed` in strips; `a8`: for int8 activations, whose slices have 32 columns or more."""
    fmt, n, k = packed.format, packed.n, packed.k
    dense = Dense2D.of(packed)
    tile = fmt.layout if isinstance(fmt.layout, Tile) else None
    rows = min(tile.rows, max(n, 1)) if tile else max(n, 1)
    parts = parts_of(fmt)
    group = fmt.codec.group(k)
    stored = _stored(dense, rows, n, k)
    size = 32 if a8 else 16
    flat, lengths = _order(stored, size, parts, group)
    strips = torch.arange(len(lengths), device=flat.device).repeat_interleave(lengths)
    gather = 0 if tile is None else 2 if tile.cols % size else 1
    table = None if not gather else flat.view(-1, parts, size).to(torch.int32)
    if gather == 1 and table is not None:
        table = table[:, :, 0].where(table[:, :, 0] >= 0, -size).contiguous()
    cells = _gathered(dense, fmt, flat, strips, rows, n, k).view(-1, parts, size, rows)
    return Columns(
        fmt, n, k, words(cells, fmt), by_strip(dense.grid.scales, rows, torch.float16),
        by_strip(dense.grid.zero_points, rows, torch.uint8),
        rows, size, parts, gather, table, None, tuple((lengths // (size * parts)).tolist()),
    )  # fmt: skip


def _stored(dense: Dense2D, rows: int, n: int, k: int) -> Tensor:
    """(strips, K) bool: the columns that each strip of `rows` rows stores."""
    if dense.mask is None:
        return torch.ones(1, k, dtype=torch.bool, device=dense.codes.device)
    count = -(-n // rows)
    return F.pad(dense.mask, (0, 0, 0, count * rows - n)).view(count, rows, k).any(1)


def _room(stored: Tensor, size: int, parts: int, group: int) -> tuple[Tensor, Tensor]:
    """Columns that every scale group (strips, groups) and every strip (strips,) takes up.

    Groups are filled up to whole slices, strips to whole blocks.
    """
    strips, k = stored.shape
    counts = F.pad(stored, (0, -k % group)).view(strips, -(-k // group), group).sum(-1)
    room = -(-counts // size) * size
    return room, -(-room.sum(1) // (size * parts)) * (size * parts)


def _order(stored: Tensor, size: int, parts: int, group: int) -> tuple[Tensor, Tensor]:
    """Every strip's columns behind each other, −1 for padding, and the strips' lengths."""
    room, lengths = _room(stored, size, parts, group)
    begins = (lengths.cumsum(0) - lengths)[:, None] + room.cumsum(1) - room
    cells = F.pad(stored, (0, -stored.shape[1] % group)).view(*room.shape, group)
    rank = cells.cumsum(-1, dtype=torch.int32) - 1
    flat = begins.new_full((int(lengths.sum()),), -1)
    column = torch.arange(room.shape[1] * group, device=flat.device).view(1, -1, group)
    flat[(begins[..., None] + rank)[cells]] = column.expand_as(cells)[cells]
    return flat, lengths


def _gathered(
    dense: Dense2D, fmt: Format, flat: Tensor, strips: Tensor, rows: int, n: int, k: int
) -> Tensor:
    """Codes (stored columns, rows): padding holds the code of zero."""
    count = -(-n // rows) if n else 1
    codes = F.pad(dense.codes, (0, 0, 0, count * rows - n)).view(count, rows, k)
    if not k:
        return dense.codes.new_zeros(flat.numel(), rows)
    return codes.permute(0, 2, 1)[strips, flat.clamp(min=0)]


def words(cells: Tensor, fmt: Format) -> tuple[Tensor, ...]:
    """(blocks, parts, slice, rows) codes as one tensor of words per plane."""
    if not (bits := bits_of(fmt.codec)):
        return (cells[:, 0].contiguous(),)
    out, low = [], 0
    for width in planes(bits):
        part = ((cells >> low) & ((1 << width) - 1)).to(torch.int64)
        word = torch.zeros_like(part[:, 0])
        for i in range(cells.shape[1]):
            word |= part[:, i] << (i * width)
        out.append(_narrow(word, WORDS[width]))
        low += width
    return tuple(out)


def _narrow(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The low bits of int64 words as `dtype`, wrapping round."""
    bits = torch.iinfo(dtype).bits
    return torch.where(words >= 1 << (bits - 1), words - (1 << bits), words).to(dtype).contiguous()


def by_strip(grid: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor | None:
    """(N, groups) as (strips, groups, rows)."""
    if grid is None:
        return None
    n, groups = grid.shape
    count = -(-n // rows)
    wide = F.pad(grid, (0, 0, 0, count * rows - n)).view(count, rows, groups)
    return wide.permute(0, 2, 1).to(dtype).contiguous()


# --- Masked --------------------------------------------------------------------------------------


def masked_rejects(fmt: Format, k: int) -> str | None:
    """Why no `Masked` order holds this format."""
    if not fmt.layout.buffers:
        return "every position is stored: there is no mask"
    group = fmt.codec.group(k)
    if group < k and group % 32:
        return f"scale groups of {group} columns are no multiple of 32"
    return None


def masked(packed: Packed) -> Masked:
    """`packed` under its mask."""
    fmt, n, k = packed.format, packed.n, packed.k
    dense = Dense2D.of(packed)
    assert dense.mask is not None
    cell = _cell(fmt.layout)
    mask_rows = fmt.layout.rows if isinstance(fmt.layout, Tile) else 1
    per_row = -(-k // (32 * cell))
    cells = F.pad(dense.mask, (0, -k % (32 * cell))).view(n, 32 * per_row, cell).any(-1)
    step = max(STEP // (32 * cell), 1)
    wide = cells.repeat_interleave(cell, 1)
    counts = F.pad(wide, (0, -wide.shape[1] % (32 * cell * step)))
    per_step = counts.view(n, -(-per_row // step), 32 * cell * step).sum(-1)
    starts = per_step.cumsum(1) - per_step
    total = per_step.sum(1)
    room = -(-total // 32) * 32  # every row begins in a new word of every plane
    begins = room.cumsum(0) - room
    return Masked(
        fmt, n, k, _streams(dense, fmt, wide, begins, int(room.sum())),
        None if dense.grid.scales is None else dense.grid.scales.half().contiguous(),
        None if dense.grid.zero_points is None else dense.grid.zero_points.to(torch.uint8),
        _mask_words(cells[::mask_rows]), begins.contiguous(), starts.to(torch.int32).contiguous(),
        cell, mask_rows, step,
    )  # fmt: skip


def _cell(layout: Layout) -> int:
    """Columns per mask bit: a power of two up to 32."""
    cols = layout.cols if isinstance(layout, Tile) else 1
    return max(c for c in (1, 2, 4, 8, 16, 32) if cols % c == 0)


def _mask_words(cells: Tensor) -> Tensor:
    """(rows, words) int32 of bits (rows, words · 32)."""
    bits = cells.view(cells.shape[0], cells.shape[1] // 32, 32).to(torch.int64)
    shifts = torch.arange(32, device=cells.device)
    return _narrow((bits << shifts).sum(-1), torch.int32)


def _streams(
    dense: Dense2D, fmt: Format, wide: Tensor, begins: Tensor, total: int
) -> tuple[Tensor, ...]:
    """Codes of every row behind each other, cut into planes of int32 words."""
    k = dense.codes.shape[1]
    codes = F.pad(dense.codes, (0, wide.shape[1] - k))
    rank = wide.cumsum(1) - 1
    place = (begins[:, None] + rank)[wide]
    flat = codes.new_zeros(total)
    flat[place] = codes[wide]
    if not (bits := bits_of(fmt.codec)):
        return (flat,)
    out, low = [], 0
    for width in planes(bits):
        part = ((flat >> low) & ((1 << width) - 1)).to(torch.int64).view(-1, 32 // width)
        shifts = width * torch.arange(32 // width, device=flat.device)
        out.append(_narrow((part << shifts).sum(-1), torch.int32))
        low += width
    return tuple(out)
