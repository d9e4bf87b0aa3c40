"""Products over the kept columns only, for tiles that span many rows.

Stock ONNX Runtime knows no sparse weights. But a row of tiles (a strip) keeps the same columns in
all its rows, so its product is a dense one over them: Gather, MatMulNBits or MatMul, and Concat
where there are several strips. The row of `LOWERINGS` that serves the Format stays the same; this
narrows it wherever the cost model says that it wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING

import torch

from sparsefx.codegen.onnx_columns import WHOLE_RUN, Cut, Picked, cut, gather, kept_columns, pick
from sparsefx.codegen.onnx_decode import Source, fields, merge_codes, per_group
from sparsefx.codegen.onnx_lower import (
    BLOCKS,
    Blocks,
    Lowering,
    Problem,
    Stored,
    block_zeros,
    code_values,
    multiply_matrix,
    plan_blocks,
    round_rows,
    rounding,
    stored_codes,
)
from sparsefx.codegen.onnx_writer import Writer
from sparsefx.ir.codecs import Fp8, Int
from sparsefx.ir.format import Packed
from sparsefx.ir.layouts import Tile

if TYPE_CHECKING:
    import onnx_ir as ir

GAIN = 0.95
"""Share of the plain product's time that gathering must stay below, or the file stays plain."""
RATES: Mapping[int, Mapping[int, tuple[float, float]]] = {
    4: {256: (0.05, 3.0), 128: (0.05, 3.0), 64: (0.055, 4.4), 32: (0.065, 5.1), 16: (0.09, 6.2)},
    1: {256: (0.16, 6.2), 128: (0.16, 6.2), 64: (0.16, 6.2), 32: (0.16, 6.2), 16: (0.22, 6.2)},
    0: {1: (0.4, 5.0)},
}
"""Nanoseconds per weight for 1 row of x and for 128, by accuracy level (0: a float matrix) and
block. Measured on ONNX Runtime 1.31.1 on one core with AVX-512 VNNI, weights in memory."""
NODES = 5000.0
"""Nanoseconds that the nodes of one more strip take, whatever their sizes."""
COPIED = {True: (2.0, 700.0), False: (10.0, 900.0)}
"""Nanoseconds per gathered column, likewise, in runs or one by one: the copy, and what the product
does with x before it multiplies."""


@dataclass(frozen=True)
class Strips(Stored):
    """A weight in strips; `attributes` are those of `round_rows` for all of x, or empty."""

    inputs: tuple[ir.Value, ...] = ()
    parts: tuple[Stored, ...] = ()
    picked: tuple[Picked, ...] = ()


def share(plan: Cut, area: int, accuracy: int, block: int) -> float:
    """Time of the gathered product over that of `area` weights in `block`s, at the worse of 1 and
    128 rows of x.
    """
    columns, rates = sum(strip.width for strip in plan.strips), RATES[accuracy]
    ours, theirs, copied = rates[plan.block], rates[block], COPIED[plan.unit >= WHOLE_RUN]
    return max(
        (plan.area * o + columns * c + NODES * len(plan.strips)) / (area * t)
        for o, t, c in zip(ours, theirs, copied, strict=True)
    )


def plan_gather(problem: Problem, row: Lowering, packed: Packed) -> Cut | str:
    """The fastest way for `row` to multiply kept columns only, or why it is not worth it."""
    fmt, k, kept = problem.format, problem.k, kept_columns(packed)
    if isinstance(kept, str):
        return kept
    accuracy, block, segment, sizes = 0, 1, k, [1]
    plan = plan_blocks(problem)
    if row.product is not multiply_matrix:
        assert isinstance(plan, Blocks)
        assert isinstance(fmt.codec, Int)
        accuracy, block = plan.accuracy, plan.size
        inside = fmt.a8_group if fmt.a8_group < k else 0
        segment = gcd(fmt.codec.group_size, inside) if fmt.codec.groups(k) > 1 else inside or k
        sizes = [size for size in BLOCKS if size >= 32 or plan.bits != 2]
    cuts = [cut(packed, kept, segment, size) for size in sizes]
    shares = [share(c, packed.n * k, accuracy, block) for c in cuts]
    least = min(shares)
    if least > GAIN:
        return f"gathering the kept columns would take {least:.0%} of the time of multiplying all"
    return cuts[shares.index(least)]


# --- the weight of every strip -------------------------------------------------------------------


def strip_blocks(w: Writer, source: Source, picked: list[Picked]) -> list[Stored]:
    """`store_blocks` of every strip; a block lies in one group, as segments do."""
    plan = plan_blocks(Problem(source.format, source.n, source.k))
    codec, size = source.format.codec, picked[0].cut.block
    assert isinstance(plan, Blocks)
    assert isinstance(codec, Int)
    plan, group = replace(plan, size=size), codec.group(source.k)
    codes, scales = stored_codes(w, source, codec, plan), per_group(w, source, "scales", codec)
    zeros = None if codec.symmetric else per_group(w, source, "zero_points", codec)
    middle = w.constant(torch.tensor([1 << (plan.bits - 1)], dtype=torch.uint8))
    parts: list[Stored] = []
    for p in picked:
        n, k, count = p.strip.rows, p.strip.width, p.strip.width // size
        of_blocks, more, fill = p.groups(group, size), [], middle
        if zeros is not None:
            fill = w.op("Gather", p.rows(zeros), p.groups(group, 1), axis=1)
            more = [w.op("Gather", p.rows(zeros), of_blocks, axis=1)]
            more = [block_zeros(w, more[0], n, count, plan)]
        b = merge_codes(w, p.values(codes, fill), plan.bits, n, count, size * plan.bits // 8)
        of_block = w.op("Gather", p.rows(scales), of_blocks, axis=1)
        if not p.strip.kept:  # else the kernel leaves the rounding of subtracted zero points
            of_block = w.op("Expand", w.number(0.0), w.ints(n, count))
        inputs = (b, of_block, *more)
        attributes = {"K": k, "N": n, "bits": plan.bits, "block_size": size}
        parts.append(Stored(inputs, {**attributes, "accuracy_level": plan.accuracy}, plan.note))
    return parts


def strip_matrices(w: Writer, source: Source, picked: list[Picked]) -> list[Stored]:
    """(width, rows) of every strip, as `store_int_matrix` and `store_float_matrix` give it."""
    codec, types, stream = source.format.codec, w.types, source.values["values"]
    to = types.DOUBLE if stream.dtype == types.DOUBLE else types.FLOAT
    zero = torch.zeros(1, dtype=torch.float64 if to == types.DOUBLE else torch.float32)
    if isinstance(codec, Int | Fp8):
        table = code_values(codec).float()
        stored = fields(w, stream, source.sizes["values"], codec.bits, table)
    else:
        stored = w.cast(stream, to)
    parts: list[Stored] = []
    for p in picked:
        wide = p.values(stored, w.constant(zero))
        if isinstance(codec, Int | Fp8) and p.strip.kept:
            if not codec.symmetric:
                zeros = w.cast(per_group(w, source, "zero_points", codec), types.FLOAT)
                wide = w.op("Sub", wide, _of_columns(w, p, zeros, codec))
            scales = per_group(w, source, "scales", codec)
            wide = w.op("Mul", wide, _of_columns(w, p, scales, codec))
        out = w.op("Transpose", wide, perm=[1, 0])
        out.dtype = to
        parts.append(Stored((out,)))
    return parts


def _of_columns(w: Writer, picked: Picked, grid: ir.Value, codec: Int | Fp8) -> ir.Value:
    """(N, groups) as (rows, width), or (rows, 1) where there is one group."""
    mine, k = picked.rows(grid), picked.cut.k
    if codec.groups(k) == 1:
        return mine
    return w.op("Gather", mine, picked.groups(codec.group(k), 1), axis=1)


# --- the product ---------------------------------------------------------------------------------


def narrowed(problem: Problem, row: Lowering, packed: Packed) -> tuple[Lowering, str]:
    """`row` over the kept columns only where that is faster, else `row` and why it is not."""
    layout = problem.format.layout
    if not isinstance(layout, Tile) or layout.rows == 1:
        return row, ""
    plan = plan_gather(problem, row, packed)
    return (row, plan) if isinstance(plan, str) else (gathered(row, plan), "")


def gathered(row: Lowering, plan: Cut) -> Lowering:
    """`row` over the columns that `plan` keeps."""
    matrix = row.product is multiply_matrix

    def store(w: Writer, source: Source) -> Stored:
        picked = pick(w, source, plan)
        parts = (strip_matrices if matrix else strip_blocks)(w, source, picked)
        share = f"{plan.area / (source.n * source.k):.0%} of the weight is multiplied"
        note = "; ".join(part for part in (share, parts[0].note) if part)
        return Strips(
            attributes=rounding(source) if matrix else {}, note=note, cut=plan.name,
            parts=tuple(parts), picked=tuple(picked),
        )  # fmt: skip

    def product(w: Writer, x: ir.Value, weight: Stored) -> ir.Value:
        assert isinstance(weight, Strips)
        rows = round_rows(w, x, **weight.attributes) if weight.attributes else x
        rows.shape = x.shape
        done: list[ir.Value] = []
        for narrow, part in zip(gather(w, rows, weight.picked), weight.parts, strict=True):
            narrow.type = x.type
            done.append(row.product(w, narrow, part))
        return done[0] if len(done) == 1 else w.op("Concat", *done, axis=-1)

    return Lowering(f"Gather, {row.op}", row.rejects, store, product)
