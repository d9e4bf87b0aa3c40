"""Tiles that span many rows: which columns each row of tiles keeps, and x narrowed to them.

A row of tiles (a strip of the weight) keeps the same columns in all its rows, so its product is a
dense one over those columns. They are ordered as in the weight; where integer codes come in blocks,
every run of columns with one scale (a segment) is filled up to whole blocks with codes that stand
for zero. Which columns are kept is computed from the stored index when ONNX Runtime loads a model;
only how many are, by strip, is known to the function body.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.codegen.onnx_decode import Source, fields
from sparsefx.codegen.onnx_writer import Writer
from sparsefx.ir.format import Packed
from sparsefx.ir.layouts import Tile

if TYPE_CHECKING:
    import onnx_ir as ir

MOST_STRIPS = 16
"""More are not tried: the cost of gathering for each is never won back."""
WHOLE_RUN = 8
"""Kept columns that come in runs of so many or more are copied run by run."""
MARK = "sparsefx.columns"
"""Metadata of a Gather of kept columns: how many columns x has."""


@dataclass(frozen=True)
class Strip:
    """Rows of the weight that keep the same columns."""

    first: int
    rows: int
    before: int
    """Values stored before its first."""
    kept: int
    """Columns that are kept."""
    width: int
    """Columns that are multiplied: whole blocks, at least one."""


@dataclass(frozen=True)
class Cut:
    """How a weight is multiplied strip by strip; all that its nodes depend on but buffers."""

    k: int
    unit: int
    """Columns that are kept or dropped together; divides K, segment and any block above 1."""
    segment: int
    """Columns of which no others may share a block."""
    block: int
    strips: tuple[Strip, ...]

    @property
    def name(self) -> str:
        """Equal for equal cuts of weights of one Format and size."""
        strips = (f"{s.kept}of{s.width}" for s in self.strips)
        return "_".join([f"b{self.block}", *strips])

    @property
    def area(self) -> int:
        """Weights that are multiplied."""
        return sum(strip.rows * strip.width for strip in self.strips)


def kept_columns(packed: Packed) -> Tensor | str:
    """bool (strips, K): which columns each row of tiles keeps; or why there is no gathering."""
    layout, n, k = packed.format.layout, packed.n, packed.k
    if not isinstance(layout, Tile) or layout.rows == 1:
        return "only tiles share columns between rows"
    if not n or not k:
        return "the weight is empty"
    count = -(-n // layout.rows)
    if count > MOST_STRIPS:
        return f"{count} rows of tiles would each gather their columns; at most {MOST_STRIPS} may"
    mask = Tile(1, layout.cols, layout.share).mask((packed.buffers[0].cpu(),), count, k)
    assert mask is not None
    return mask


def cut(packed: Packed, kept: Tensor, segment: int, block: int) -> Cut:
    """The strips of `packed`, whose `kept` columns are filled up to blocks within segments.

    Block 1 asks for no filling.
    """
    layout, n, k = packed.format.layout, packed.n, packed.k
    assert isinstance(layout, Tile)
    unit = gcd(layout.cols, k, segment, block if block > 1 else 0)
    by_segment = F.pad(kept.int(), (0, -k % segment)).view(len(kept), -1, segment).sum(2)
    widths = (-(-by_segment // block) * block).sum(1).clamp(min=max(block, unit))
    strips: list[Strip] = []
    before = 0
    for i, (columns, width) in enumerate(zip(kept.sum(1).tolist(), widths.tolist(), strict=True)):
        rows = min(layout.rows, n - i * layout.rows)
        strips.append(Strip(i * layout.rows, rows, before, columns, width))
        before += rows * columns
    return Cut(k, unit, segment, block, tuple(strips))


# --- which columns, computed at load -------------------------------------------------------------


@dataclass(frozen=True)
class Picked:
    """The kept columns of one strip as graph values; fillers repeat the first of their block."""

    w: Writer
    cut: Cut
    strip: Strip
    units: ir.Value
    """int64 (width / unit,): which run of `unit` columns."""
    ranks: ir.Value
    """int64 (width / unit,): how many stored runs of the strip lie before it."""
    fillers: ir.Value
    """bool (width / unit,): not stored."""

    @cached_property
    def columns(self) -> ir.Value:
        """int64 (width,)"""
        return self._wide(self.units)

    def groups(self, size: int, by: int) -> ir.Value:
        """int64 (width / by,): which group of `size` columns every `by`-th column is from."""
        first = self.columns
        if by > 1:
            first = self.w.reshape(first, self.strip.width // by, by)
            first = self.w.reshape(self.w.head(first, 1, 1), self.strip.width // by)
        return self.w.op("Div", first, self.w.ints(size))

    def values(self, stored: ir.Value, fill: ir.Value) -> ir.Value:
        """All stored values (at least those of the strip) as (rows, width); `fill` in fillers."""
        w, strip = self.w, self.strip
        if not strip.kept:
            return w.op("Expand", fill, w.ints(strip.rows, strip.width))
        end = strip.before + strip.rows * strip.kept
        mine = w.op("Slice", stored, w.ints(strip.before), w.ints(end), w.ints(0))
        mine = w.reshape(mine, strip.rows, strip.kept)
        if strip.kept == strip.width:
            return mine
        wide = w.op("Gather", mine, self._wide(self.ranks), axis=1)
        return w.op("Where", self._repeat(self.fillers), fill, wide)

    def rows(self, grid: ir.Value) -> ir.Value:
        """The strip's rows of (N, …)."""
        first, end = self.strip.first, self.strip.first + self.strip.rows
        return self.w.op("Slice", grid, self.w.ints(first), self.w.ints(end), self.w.ints(0))

    def _wide(self, units: ir.Value) -> ir.Value:
        """Numbers of runs as numbers of columns."""
        w, unit = self.w, self.cut.unit
        if unit == 1:
            return units
        first = w.op("Mul", w.reshape(units, self.strip.width // unit, 1), w.ints(unit))
        return w.reshape(w.op("Add", first, w.constant(torch.arange(unit))), self.strip.width)

    def _repeat(self, flags: ir.Value) -> ir.Value:
        count, unit = self.strip.width // self.cut.unit, self.cut.unit
        if unit == 1:
            return flags
        wide = self.w.op("Expand", self.w.reshape(flags, count, 1), self.w.ints(count, unit))
        return self.w.reshape(wide, self.strip.width)


def pick(w: Writer, source: Source, cut: Cut) -> list[Picked]:
    """The columns of every strip.

    ONNX Runtime folds neither NonZero nor loops, so the positions of what is kept come out of a
    TopK over keys that fall with the position, with enough keys behind every segment for fillers.
    """
    kept = _kept_units(w, source, cut)
    return [_pick(w, cut, i, w.reshape(_row(w, kept, i), -1)) for i in range(len(cut.strips))]


def _row(w: Writer, rows: ir.Value, i: int) -> ir.Value:
    return w.op("Slice", rows, w.ints(i), w.ints(i + 1), w.ints(0))


def _kept_units(w: Writer, source: Source, cut: Cut) -> ir.Value:
    """int64 (strips, segments · units of a segment): 1 where stored, 0 behind K."""
    layout, count = source.format.layout, len(cut.strips)
    assert isinstance(layout, Tile)
    tiles, per_tile = -(-cut.k // layout.cols), layout.cols // cut.unit
    flags = fields(w, source.values["index"], source.sizes["index"], 1, torch.arange(2))
    flags = w.reshape(w.head(flags, count * tiles), count, tiles, 1)
    flags = w.op("Expand", flags, w.ints(count, tiles, per_tile))
    units = cut.k // cut.unit
    flags = w.head(w.reshape(flags, count, tiles * per_tile), units, 1)
    if pad := -units % (cut.segment // cut.unit):
        flags = w.op("Pad", flags, w.ints(0, 0, 0, pad))
    return flags


def _pick(w: Writer, cut: Cut, index: int, kept: ir.Value) -> Picked:
    """The columns of one strip from its `kept` units (segments · units of a segment,)."""
    strip, per_block = cut.strips[index], max(cut.block // cut.unit, 1)
    length, segments = cut.segment // cut.unit, -(-cut.k // cut.segment)
    taken, stored, spare = kept, kept, per_block - 1
    if spare:  # behind each segment stand as many fillers as may be needed, taken as needed
        grid = w.reshape(kept, segments, length)
        count = w.op("ReduceSum", grid, w.ints(1), keepdims=1)
        lack = w.op("Mod", w.op("Neg", count), w.ints(per_block))
        fill = w.cast(w.op("Less", w.constant(torch.arange(spare)), lack), w.types.INT64)
        none = w.op("Expand", w.ints(0), w.ints(segments, spare))
        taken = w.reshape(w.op("Concat", grid, fill, axis=1), -1)
        stored = w.reshape(w.op("Concat", grid, none, axis=1), -1)
    units = strip.width // cut.unit
    ends = (segments * (length + spare), 0, -1)
    keys = w.op("Mul", taken, w.op("Range", *(w.constant(torch.tensor(end)) for end in ends)))
    _, found = w.tape.op_multi_out("TopK", [keys, w.ints(units)], num_outputs=2)
    fillers = w.op("Equal", w.op("Gather", stored, found), w.ints(0))
    if spare:
        segment, offset = (w.op(o, found, w.ints(length + spare)) for o in ("Div", "Mod"))
        found = w.op("Add", w.op("Mul", segment, w.ints(length)), offset)
        blocks = w.reshape(found, units // per_block, per_block)
        first = w.op("Expand", w.head(blocks, 1, 1), w.ints(units // per_block, per_block))
        found = w.op("Where", fillers, w.reshape(first, units), found)
    ranks = w.op("Sub", w.op("CumSum", kept, w.constant(torch.tensor(0))), w.ints(1))
    return Picked(w, cut, strip, found, w.op("Gather", ranks, found), fillers)


# --- x, at every call ----------------------------------------------------------------------------


def gather(w: Writer, x: ir.Value, picked: Sequence[Picked]) -> list[ir.Value]:
    """x (…, K) as (…, width) for every strip.

    ONNX Runtime copies a Gather along the last axis float by float, four times slower than
    transposing, gathering whole rows and transposing back.
    """
    assert x.shape is not None
    cut, rank = picked[0].cut, x.shape.rank()
    if cut.unit >= WHOLE_RUN:
        shape = (*[0] * (rank - 1), cut.k // cut.unit, cut.unit)  # 0: as it is
        runs = w.op("Reshape", x, w.ints(*shape))
        parts = [_gathered(w, runs, p.units, rank - 1, cut.k) for p in picked]
        return [
            w.op("Reshape", part, w.ints(*[0] * (rank - 1), p.strip.width))
            for part, p in zip(parts, picked, strict=True)
        ]
    turned = w.op("Transpose", x, perm=[rank - 1, *range(rank - 1)])
    parts = [_gathered(w, turned, p.columns, 0, cut.k) for p in picked]
    return [w.op("Transpose", part, perm=[*range(1, rank), 0]) for part in parts]


def _gathered(w: Writer, x: ir.Value, index: ir.Value, axis: int, columns: int) -> ir.Value:
    out = w.op("Gather", x, index, axis=axis)
    node = out.producer()
    assert node is not None
    node.metadata_props[MARK] = str(columns)
    return out
