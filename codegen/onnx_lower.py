"""How one packed weight becomes ONNX nodes: the table of lowerings, in order of preference.

Every lowering writes nodes that stock ONNX Runtime runs well, measured on 1.31.1: MatMulNBits for
integer codes whose groups are whole blocks, otherwise a weight that is dequantised by ordinary
operators over initializers, which ONNX Runtime folds into a plain float matrix at load.

`+a8`: MatMulNBits rounds activations per block, at least as finely as asked; the other lowerings
round them as `sparsefx::linear` does, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsefx.codegen.onnx_decode import (
    Source,
    fields,
    kept,
    merge_codes,
    per_column,
    per_group,
    spread,
)
from sparsefx.codegen.onnx_writer import Writer
from sparsefx.ir.codecs import Fp8, Int
from sparsefx.ir.format import Format

if TYPE_CHECKING:
    import onnx_ir as ir

ORT_DOMAIN = "com.microsoft"
BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes of the CPU MatMulNBits kernel; it throws at any other."""
RAGGED_BLOCK = 32
"""Block for one scale per row when no block divides K: least padding without the slow block 16."""


@dataclass(frozen=True)
class Problem:
    """What is asked for: a Format, the weight's shape, and whether products are float64."""

    format: Format
    n: int
    k: int
    double: bool = False


@dataclass(frozen=True)
class Stored:
    """A weight in the graph: node inputs and attributes of its product."""

    inputs: tuple[ir.Value, ...]
    attributes: Mapping[str, int] = field(default_factory=dict)
    """Of the product's node; for a matrix those of `round_rows`, empty: activations stay float."""
    note: str = ""
    """What is computed with more bits than are stored, and why."""
    cut: str = ""
    """What the nodes depend on besides Format, shape and the sizes of the buffers."""


@dataclass(frozen=True)
class Lowering:
    """A row of the table."""

    op: str
    rejects: Callable[[Problem], str | None]
    store: Callable[[Writer, Source], Stored]
    product: Callable[[Writer, ir.Value, Stored], ir.Value]


# --- MatMulNBits: integer codes in blocks along K ------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """The form in which MatMulNBits takes a Format: stored bits, block and accuracy level."""

    bits: int
    size: int
    accuracy: int
    note: str = ""


def plan_blocks(problem: Problem) -> Blocks | str:
    """The MatMulNBits form of `problem`, or why there is none."""
    codec = problem.format.codec
    if not isinstance(codec, Int):
        return "MatMulNBits holds integer codes"
    if problem.double:
        return "MatMulNBits has no float64 kernel"
    if not problem.n or not problem.k:
        return "the weight is empty"
    a8 = problem.format.a8
    if codec.bits > 4 and not a8:
        return (
            f"{codec.bits}-bit codes with float activations: MatMulNBits would dequantise the "
            "whole weight at every call; '+a8' or 4 bits would use it"
        )
    size = _block(codec, problem.format.a8_group, problem.k)
    if size is None:
        return _no_block(codec, problem.format.a8_group)
    bits = 8 if codec.bits > 4 else 4
    note = f"{codec.bits}-bit codes run as {bits}" if codec.bits != bits else ""
    if codec.bits == 2 and a8 and size >= 32:
        bits, note = 2, ""
    elif codec.bits == 2:
        why = "needs blocks of 32 or more" if a8 else "needs int8 activations ('+a8')"
        note += f": the fast 2-bit kernel {why}"
    return Blocks(bits, size, 4 if a8 else 1, note)


def _block(codec: Int, a8_group: int, k: int) -> int | None:
    one_scale = codec.groups(k) == 1
    group = k if one_scale else codec.group_size
    # Blocks that cross no activation group's border round at least as finely as was asked.
    inside = a8_group if a8_group < k else 0
    fits = [size for size in BLOCKS if gcd(group, inside) % size == 0]
    ragged = one_scale and inside % RAGGED_BLOCK == 0
    return fits[0] if fits else RAGGED_BLOCK if ragged else None


def _no_block(codec: Int, a8_group: int) -> str:
    groups = [f"group_size {codec.group_size}"] * bool(codec.group_size)
    groups += [f"the activation group of {a8_group}"] * bool(a8_group)
    return f"no block of {BLOCKS} divides {' and '.join(groups)}"


def nbits_rejects(problem: Problem) -> str | None:
    plan = plan_blocks(problem)
    return plan if isinstance(plan, str) else None


def store_blocks(w: Writer, source: Source) -> Stored:
    """B, scales and zero points; positions not stored hold the zero point: exactly zero."""
    plan = plan_blocks(Problem(source.format, source.n, source.k))
    codec, n, k = source.format.codec, source.n, source.k
    assert isinstance(plan, Blocks)
    assert isinstance(codec, Int)
    count = -(-k // plan.size)
    shape = (n, count, plan.size * plan.bits // 8)
    scales = _blocks_of(w, per_group(w, source, "scales", codec), codec, k, plan)
    zeros = None if codec.symmetric else per_group(w, source, "zero_points", codec)
    if not source.format.layout.buffers and codec.bits == plan.bits and k % plan.size == 0:
        b = source.values["values"]
        if codec.symmetric:  # two's complement to codes from 0: the highest bits flip
            b = w.op("BitwiseXor", b, w.constant(_high_bits(codec.bits)))
        inputs = [w.reshape(b, *shape), scales]
    else:
        codes = _codes(w, source, codec, plan, zeros)
        inputs = [merge_codes(w, codes, plan.bits, *shape), scales]
    if zeros is not None:
        inputs.append(block_zeros(w, _blocks_of(w, zeros, codec, k, plan), n, count, plan))
    attributes = {"K": k, "N": n, "bits": plan.bits, "block_size": plan.size}
    return Stored(tuple(inputs), {**attributes, "accuracy_level": plan.accuracy}, plan.note)


def _high_bits(bits: int) -> Tensor:
    return torch.tensor(sum(1 << (i + bits - 1) for i in range(0, 8, bits)), dtype=torch.uint8)


def _codes(w: Writer, source: Source, codec: Int, plan: Blocks, zeros: ir.Value | None) -> ir.Value:
    """MatMulNBits's unsigned codes (N, blocks · size), padding included."""
    n, k = source.n, source.k
    codes = stored_codes(w, source, codec, plan)
    fill = w.constant(torch.tensor([1 << (plan.bits - 1)], dtype=torch.uint8))
    if zeros is not None and source.format.layout.buffers:
        wide = w.op("Expand", per_column(w, source, zeros, codec), w.ints(n, k))
        fill = w.reshape(wide, n * k)
    codes = w.reshape(spread(w, source, codes, fill), n, k)
    if pad := -k % plan.size:
        last = fill
        if zeros is not None:
            last = w.op("Gather", zeros, w.ints(codec.groups(k) - 1), axis=1)
        codes = w.op("Concat", codes, w.op("Expand", last, w.ints(n, pad)), axis=1)
    return codes


def stored_codes(w: Writer, source: Source, codec: Int, plan: Blocks) -> ir.Value:
    """The stored codes as MatMulNBits counts them, from 0."""
    table = code_values(codec) + ((1 << (plan.bits - 1)) if codec.symmetric else 0)
    stream, size = source.values["values"], source.sizes["values"]
    return fields(w, stream, size, codec.bits, table.to(torch.uint8))


def _blocks_of(w: Writer, grid: ir.Value, codec: Int, k: int, plan: Blocks) -> ir.Value:
    """(N, groups) spread over the blocks along K."""
    groups = torch.arange(0, k, plan.size) // codec.group(k)
    if groups.tolist() == list(range(codec.groups(k))):
        return grid
    return w.op("Gather", grid, w.constant(groups), axis=1)


def block_zeros(w: Writer, zeros: ir.Value, n: int, count: int, plan: Blocks) -> ir.Value:
    """(n, count) zero points, one per block, as bytes."""
    per_byte = 8 // plan.bits
    if pad := -count % per_byte:
        zeros = w.op("Pad", zeros, w.ints(0, 0, 0, pad))
    return merge_codes(w, zeros, plan.bits, n, (count + pad) // per_byte)


def multiply_blocks(writer: Writer, x: ir.Value, weight: Stored) -> ir.Value:
    return writer.op("MatMulNBits", x, *weight.inputs, domain=ORT_DOMAIN, **weight.attributes)


# --- A dense matrix (K, N), dequantised at load --------------------------------------------------


def code_values(codec: Int | Fp8) -> Tensor:
    """What each stored code stands for, before zero point and scale: (2^bits,) numbers."""
    codes = torch.arange(1 << codec.bits)
    if isinstance(codec, Fp8):
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num()
    return torch.where(codes > codec.high, codes - (1 << codec.bits), codes)


def store_int_matrix(w: Writer, source: Source) -> Stored:
    """(code − zero point) · scale, zero where nothing is stored."""
    codec, n, k = source.format.codec, source.n, source.k
    assert isinstance(codec, Int | Fp8)
    table = code_values(codec).float()
    codes = fields(w, source.values["values"], source.sizes["values"], codec.bits, table)
    wide = w.reshape(spread(w, source, codes, w.constant(torch.zeros(1))), n, k)
    if not codec.symmetric:
        zeros = w.cast(per_group(w, source, "zero_points", codec), w.types.FLOAT)
        wide = w.op("Sub", wide, per_column(w, source, zeros, codec))
    wide = w.op("Mul", wide, per_column(w, source, per_group(w, source, "scales", codec), codec))
    mask = None if codec.symmetric else kept(w, source)
    if mask is not None:
        wide = w.op("Where", w.reshape(mask, n, k), wide, w.number(0.0))
    return _matrix(w, source, wide)


def store_float_matrix(w: Writer, source: Source) -> Stored:
    """The values in float32, or float64 if they are stored so."""
    values, types = source.values["values"], w.types
    to = types.DOUBLE if values.dtype == types.DOUBLE else types.FLOAT
    zero = torch.zeros(1, dtype=torch.float64 if to == types.DOUBLE else torch.float32)
    wide = spread(w, source, w.cast(values, to), w.constant(zero))
    return _matrix(w, source, w.reshape(wide, source.n, source.k), to)


def _matrix(w: Writer, source: Source, wide: ir.Value, dtype: ir.DataType | None = None) -> Stored:
    """(N, K) as the (K, N) that MatMul takes."""
    out = w.op("Transpose", wide, perm=[1, 0])
    out.dtype = dtype or w.types.FLOAT
    return Stored((out,), rounding(source))


def multiply_matrix(writer: Writer, x: ir.Value, weight: Stored) -> ir.Value:
    assert x.dtype is not None
    rows = round_rows(writer, x, **weight.attributes) if weight.attributes else x
    return writer.op("MatMul", rows, writer.cast(weight.inputs[0], x.dtype))


def rounding(source: Source) -> dict[str, int]:
    """Arguments of `round_rows`."""
    fmt, k = source.format, source.k
    return {"k": k, "group": fmt.a8_group or k} if fmt.a8 and k else {}


def round_rows(writer: Writer, x: ir.Value, k: int, group: int) -> ir.Value:
    """x (…, k) as `ir.op.round_activations` gives it, bit for bit; a scale per `group` columns."""
    assert x.dtype is not None
    shape, count = writer.op("Shape", x), -(-k // group)
    blocks = writer.cast(x, writer.types.FLOAT)
    if pad := count * group - k:
        blocks = writer.op("Reshape", blocks, writer.ints(-1, k))
        blocks = writer.op("Pad", blocks, writer.ints(0, 0, 0, pad))
    blocks = writer.op("Reshape", blocks, writer.ints(-1, count, group))
    reach = writer.op("ReduceMax", writer.op("Abs", blocks), writer.ints(2), keepdims=1)
    scales = writer.op("Div", reach, writer.number(127.0))
    # A scale of 0 stands for zeros, or for values so small that their codes times it are 0 too.
    zero = writer.op("Equal", scales, writer.number(0.0))
    scales = writer.op("Where", zero, writer.number(1.0), scales)
    codes = writer.op("Round", writer.op("Div", blocks, scales))
    codes = writer.op("Clip", codes, writer.number(-127.0), writer.number(127.0))
    rows = writer.op("Mul", codes, scales)
    if pad:
        rows = writer.op("Reshape", rows, writer.ints(-1, count * group))
        rows = writer.op("Slice", rows, writer.ints(0), writer.ints(k), writer.ints(1))
    rows = writer.op("Reshape", rows, shape, allowzero=1)
    rows.dtype = writer.types.FLOAT
    return writer.cast(rows, x.dtype)


# --- the table -----------------------------------------------------------------------------------

LOWERINGS: tuple[Lowering, ...] = (
    Lowering("MatMulNBits", nbits_rejects, store_blocks, multiply_blocks),
    Lowering(
        "MatMul, codes folded at load",
        lambda p: None if isinstance(p.format.codec, Int | Fp8) else "holds codes",
        store_int_matrix,
        multiply_matrix,
    ),
    Lowering("MatMul", lambda p: None, store_float_matrix, multiply_matrix),
)


def choose(problem: Problem, dense: bool = False) -> tuple[Lowering, str]:
    """The first lowering that accepts, and why better ones do not; `dense` wants the matrix."""
    notes: list[str] = []
    for row in LOWERINGS:
        if dense and row.product is not multiply_matrix:
            continue
        why = row.rejects(problem)
        if why is None:
            return row, "; ".join(notes)
        if isinstance(problem.format.codec, Int):
            notes.append(why)
    raise AssertionError("the last lowering serves every format")
