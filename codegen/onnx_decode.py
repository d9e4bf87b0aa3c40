"""Stored buffers decoded by ONNX operators: what a file holds is what the Format holds.

Everything here depends on initializers alone, so ONNX Runtime computes it once, when it loads a
model, as long as shapes are static and no NonZero takes part. Integer codes are looked up in
tables, whole bytes at a time where codes do not cross them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsefx.codegen.onnx_writer import Writer
from sparsefx.ir.codecs import Float, Fp8, Int
from sparsefx.ir.errors import ExportError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import NM, Layout, Tile

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Source:
    """Graph values of a Packed weight's buffers, by name, with their lengths."""

    format: Format
    n: int
    k: int
    values: Mapping[str, ir.Value]
    sizes: Mapping[str, int]

    @staticmethod
    def of(packed: Packed, values: list[ir.Value]) -> Source:
        """Raises ExportError for a codec that no lowering decodes."""
        names, codec = packed.format.buffers, packed.format.codec
        if not isinstance(codec, Float | Fp8 | Int):
            raise ExportError(f"codec '{codec}' has no ONNX form: use 'int8' or 'fp16' to export")
        sizes = {name: b.numel() for name, b in zip(names, packed.buffers, strict=True)}
        return Source(
            packed.format, packed.n, packed.k, dict(zip(names, values, strict=True)), sizes
        )

    @property
    def empty(self) -> bool:
        """Nothing is stored."""
        return not self.sizes["values"]


def fields(w: Writer, stream: ir.Value, size: int, bits: int, table: Tensor) -> ir.Value:
    """table[code] for the codes of `bits` bits in `size` bytes, at least as many as are meant."""
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits)
        codes = (torch.arange(256)[:, None] >> shifts) & ((1 << bits) - 1)
        index = w.cast(stream, w.types.INT32)
        return w.reshape(w.op("Gather", w.constant(table[codes]), index), size * 8 // bits)
    # A code lies in at most two bytes. ONNX Runtime adds int64 in double: no word of 56 bits here.
    groups = -(-size // bits)
    if pad := groups * bits - size:
        stream = w.op("Pad", stream, w.ints(0, pad))
    raw = w.reshape(w.cast(stream, w.types.INT32), groups, bits)
    start = torch.arange(8) * bits
    low = w.op("Gather", raw, w.constant(start // 8), axis=1)
    high = w.op("Gather", raw, w.constant((start // 8 + 1).clamp(max=bits - 1)), axis=1)
    pairs = w.op("Add", low, w.op("Mul", high, w.constant(torch.tensor(256, dtype=torch.int32))))
    codes_ = w.op("Div", pairs, w.constant((2 ** (start % 8)).int()))
    codes_ = w.op("Mod", codes_, w.constant(torch.tensor(1 << bits, dtype=torch.int32)))
    return w.reshape(w.op("Gather", w.constant(table), codes_), groups * 8)


def kept(w: Writer, source: Source) -> ir.Value | None:
    """Which positions are stored: bool (N·K,), None when all are."""
    layout, n, k = source.format.layout, source.n, source.k
    if not layout.buffers:
        return None
    index, size = source.values["index"], source.sizes["index"]
    yes = torch.tensor([False, True])
    if isinstance(layout, NM) and layout.as_mask:
        return w.head(fields(w, index, size, 1, yes), n * k)
    if isinstance(layout, NM):
        return _positions(w, layout, index, size, n * k // layout.m)
    if not isinstance(layout, Tile):
        raise _unknown(layout)
    rows, cols = -(-n // layout.rows), -(-k // layout.cols)
    cells = w.head(fields(w, index, size, 1, yes), rows * cols)
    if (layout.rows, layout.cols) == (1, 1):
        return cells
    wide = w.op(
        "Expand", w.reshape(cells, rows, 1, cols, 1), w.ints(rows, layout.rows, cols, layout.cols)
    )
    wide = w.reshape(wide, rows * layout.rows, cols * layout.cols)
    return w.reshape(w.head(w.head(wide, n), k, 1), n * k)


def _positions(w: Writer, layout: NM, index: ir.Value, size: int, runs: int) -> ir.Value:
    """The mask of `runs` runs from the positions kept in each."""
    bits = layout.position_bits
    where = fields(w, index, size, bits, torch.arange(1 << bits))
    where = w.reshape(w.head(where, runs * layout.n), runs, layout.n, 1)
    equal = w.op("Equal", where, w.constant(torch.arange(layout.m)))
    any_ = w.op("ReduceMax", w.cast(equal, w.types.UINT8), w.ints(1), keepdims=0)
    return w.reshape(w.cast(any_, w.types.BOOL), runs * layout.m)


def spread(w: Writer, source: Source, values: ir.Value, fill: ir.Value) -> ir.Value:
    """Stored `values` in their positions, `fill` (one value or N·K) elsewhere: (N·K,)."""
    count = source.n * source.k
    mask = kept(w, source)
    if mask is None:
        return w.head(values, count)
    if source.empty:
        return w.op("Expand", fill, w.ints(count))
    # The i-th stored value belongs where i positions were stored before; −1 is never taken.
    place = w.op("CumSum", w.cast(mask, w.types.INT32), w.constant(torch.tensor(0)))
    place = w.op("Sub", place, w.constant(torch.tensor(1, dtype=torch.int32)))
    return w.op("Where", mask, w.op("Gather", values, place), fill)


def per_group(w: Writer, source: Source, name: str, codec: Int | Fp8) -> ir.Value:
    """Scales (float32) or zero points (uint8) as (N, groups)."""
    shape = (source.n, codec.groups(source.k))
    if name == "scales":
        return w.reshape(w.cast(source.values[name], w.types.FLOAT), *shape)
    codes = torch.arange(1 << codec.bits, dtype=torch.uint8)
    stream = fields(w, source.values[name], source.sizes[name], codec.bits, codes)
    return w.reshape(w.head(stream, shape[0] * shape[1]), *shape)


def per_column(w: Writer, source: Source, grid: ir.Value, codec: Int | Fp8) -> ir.Value:
    """(N, groups) as (N, K), or (N, 1) where there is one group."""
    n, k, group, groups = source.n, source.k, codec.group(source.k), codec.groups(source.k)
    if groups == 1:
        return grid
    if k % group:
        return w.op("Gather", grid, w.constant(torch.arange(k) // group), axis=1)
    wide = w.op("Expand", w.reshape(grid, n, groups, 1), w.ints(n, groups, group))
    return w.reshape(wide, n, k)


def merge_codes(w: Writer, codes: ir.Value, bits: int, *shape: int) -> ir.Value:
    """uint8 codes below 2^bits as bytes of 8 / bits codes each, the first in the lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return w.reshape(codes, *shape)
    lanes = w.reshape(codes, -1, per_byte)
    out = w.op("Gather", lanes, w.constant(torch.tensor(0)), axis=1)
    for i in range(1, per_byte):
        lane = w.op("Gather", lanes, w.constant(torch.tensor(i)), axis=1)
        shift = w.constant(torch.tensor(i * bits, dtype=torch.uint8))
        out = w.op("BitwiseOr", out, w.op("BitShift", lane, shift, direction="LEFT"))
    return w.reshape(out, *shape)


def attributes_of(layout: Layout) -> list[int]:
    """How the node names a layout: [0] dense, [1, n, m], [2, rows, cols]."""
    if isinstance(layout, NM):
        return [1, layout.n, layout.m]
    if isinstance(layout, Tile):
        return [2, layout.rows, layout.cols]
    if layout.buffers:
        raise _unknown(layout)
    return [0]


def _unknown(layout: Layout) -> ExportError:
    return ExportError(f"layout '{layout}' has no ONNX form: use 'bitmap' or 'tile' to export")
