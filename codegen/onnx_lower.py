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
from torch.nn import functional as F

from sparsefx.ir.bits import pack_bits
from sparsefx.ir.codecs import Int
from sparsefx.ir.format import Format, Packed

if TYPE_CHECKING:
    import onnx_ir as ir

ORT_DOMAIN = "com.microsoft"
BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes of the CPU MatMulNBits kernel; it throws at any other."""
RAGGED_BLOCK = 32
"""Block for one scale per row when no block divides K: least padding without the slow block 16."""


class Writer:
    """New nodes and initializers for one weight or product."""

    def __init__(self, name: str) -> None:
        import onnx_ir

        self.name = name
        self.tape = onnx_ir.tape.Tape()
        self.types = onnx_ir.DataType

    def constant(self, suffix: str, tensor: Tensor) -> ir.Value:
        """An initializer called after the layer."""
        import onnx_ir

        name = f"{self.name}/{suffix}"
        data = onnx_ir.tensor_adapters.TorchTensor(tensor.detach().cpu().contiguous(), name=name)
        return self.tape.initializer(data)

    def op(
        self, kind: str, *inputs: ir.Value, domain: str = "", **attributes: float | list[int]
    ) -> ir.Value:
        """One node's only output."""
        return self.tape.op(kind, inputs, attributes, domain=domain)

    def ints(self, *values: int) -> ir.Value:
        """A constant vector."""
        return self.op("Constant", value_ints=list(values))

    def number(self, value: float) -> ir.Value:
        """A constant float32 scalar."""
        return self.op("Constant", value_float=value)

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """`value` as `to`; no node when it already is."""
        if value.dtype == to:
            return value
        out = self.op("Cast", value, to=to.value)
        out.dtype = to
        return out


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
    """What had to be stored wider than asked for, and why."""


@dataclass(frozen=True)
class Lowering:
    """A row of the table."""

    op: str
    suffix: str
    """Part of the initializers' names."""
    rejects: Callable[[Problem], str | None]
    store: Callable[[Writer, Packed], Stored]
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
    note = f"{codec.bits}-bit codes stored in {bits}" if codec.bits != bits else ""
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


def store_blocks(writer: Writer, packed: Packed) -> Stored:
    """B, scales and zero points; positions not stored hold the zero point: exactly zero."""
    plan = plan_blocks(Problem(packed.format, packed.n, packed.k))
    assert isinstance(plan, Blocks)
    codes, scales, zeros = grid_of(packed, 1 << (plan.bits - 1))
    count = -(-packed.k // plan.size)
    if zeros is not None:
        padding = zeros[:, -1:].expand(-1, count * plan.size - packed.k)
    else:
        padding = codes.new_full((packed.n, count * plan.size - packed.k), 1 << (plan.bits - 1))
    stream = pack_bits(torch.cat([codes, padding], 1), plan.bits)
    b = writer.constant("values", stream.view(packed.n, count, plan.size * plan.bits // 8))
    inputs = [b, _block_scales(writer, _repeat(scales, packed, count, plan.size), plan)]
    if zeros is not None:
        per_byte = 8 // plan.bits
        rows = F.pad(_repeat(zeros, packed, count, plan.size), (0, -count % per_byte))
        packed_zeros = pack_bits(rows, plan.bits).view(packed.n, -1)
        inputs.append(writer.constant("zero_points", packed_zeros))
    attributes = {"K": packed.k, "N": packed.n, "bits": plan.bits, "block_size": plan.size}
    return Stored(tuple(inputs), {**attributes, "accuracy_level": plan.accuracy}, plan.note)


def _block_scales(writer: Writer, scales: Tensor, plan: Blocks) -> ir.Value:
    # At accuracy level 4 ONNX Runtime silently returns zeros unless the scales are an initializer
    # (1.31.1 with optimisation off, where a Cast is not folded): there they cost four bytes.
    if plan.accuracy == 4:
        return writer.constant("scales", scales)
    return writer.cast(writer.constant("scales", scales.half()), writer.types.FLOAT)


def _repeat(per_group: Tensor, packed: Packed, count: int, size: int) -> Tensor:
    """(N, groups) spread over the blocks of `size` columns: (N, count)."""
    starts = torch.arange(count, device=per_group.device) * size
    return per_group[:, starts // packed.format.codec.group(packed.k)]


def multiply_blocks(writer: Writer, x: ir.Value, weight: Stored) -> ir.Value:
    return writer.op("MatMulNBits", x, *weight.inputs, domain=ORT_DOMAIN, **weight.attributes)


# --- A dense matrix (K, N), dequantised at load --------------------------------------------------


def store_int_matrix(writer: Writer, packed: Packed) -> Stored:
    """8-bit codes, Cast and Mul: not DequantizeLinear, which ONNX Runtime would not fold."""
    codec = packed.format.codec
    codes, scales, zeros = grid_of(packed, 0)
    count, size = scales.shape[1], codec.group(packed.k)
    if count == 1:
        size = packed.k
    padded = F.pad(codes, (0, count * size - packed.k)).T.reshape(count, size, packed.n)
    wide = writer.cast(writer.constant("values", padded), writer.types.FLOAT)
    if zeros is not None:
        zero = writer.constant("zero_points", zeros.T.reshape(count, 1, packed.n))
        wide = writer.op("Sub", wide, writer.cast(zero, writer.types.FLOAT))
    scale = writer.constant("scales", scales.half().T.reshape(count, 1, packed.n))
    wide = writer.op("Mul", wide, writer.cast(scale, writer.types.FLOAT))
    shape = writer.constant("shape", torch.tensor([count * size, packed.n]))
    matrix = writer.op("Reshape", wide, shape, allowzero=1)
    if count * size != packed.k:
        ends = [writer.constant(s, torch.tensor([v])) for s, v in (("from", 0), ("to", packed.k))]
        matrix = writer.op("Slice", matrix, *ends)
    matrix.dtype = writer.types.FLOAT
    assert isinstance(codec, Int)
    note = f"{codec.bits}-bit codes stored in 8" * (codec.bits < 8)
    return Stored((matrix,), _rounding(packed), note)


def store_float_matrix(writer: Writer, packed: Packed) -> Stored:
    """The values in their stored type."""
    values = packed.unpack(packed.buffers[-1].dtype)
    return Stored((writer.constant("values", values.T),), _rounding(packed))


def multiply_matrix(writer: Writer, x: ir.Value, weight: Stored) -> ir.Value:
    assert x.dtype is not None
    rows = round_rows(writer, x, **weight.attributes) if weight.attributes else x
    return writer.op("MatMul", rows, writer.cast(weight.inputs[0], x.dtype))


def _rounding(packed: Packed) -> dict[str, int]:
    """Arguments of `round_rows`."""
    fmt = packed.format
    return {"k": packed.k, "group": fmt.a8_group or packed.k} if fmt.a8 and packed.k else {}


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


def grid_of(packed: Packed, offset: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (N, K), scales (N, groups) and zero points of an integer weight.

    Symmetric codes are shifted by `offset` and are uint8, or int8 when it is 0. Positions that
    are not stored hold the code that decodes to zero.
    """
    fmt, split = packed.format, len(packed.format.layout.buffers)
    mask = fmt.layout.mask(packed.buffers[:split], packed.n, packed.k)
    count = packed.n * packed.k if mask is None else int(mask.sum())
    codes, grid = fmt.codec.read(packed.buffers[split:], count, packed.n, packed.k)
    assert grid.scales is not None
    zeros = grid.zero_points
    dtype = torch.int8 if zeros is None and not offset else torch.uint8
    stored = (codes if zeros is not None else codes + offset).to(dtype)
    if mask is None:
        full = stored.view(packed.n, packed.k)
    else:
        wide = grid.columns(0, packed.k, fmt.codec.group(packed.k)).zero_points
        full = torch.full_like(mask, offset, dtype=dtype) if wide is None else wide.to(dtype)
        full[mask] = stored
    return full, grid.scales, None if zeros is None else zeros.to(torch.uint8)


# --- the table -----------------------------------------------------------------------------------

LOWERINGS: tuple[Lowering, ...] = (
    Lowering("MatMulNBits", "blocks", nbits_rejects, store_blocks, multiply_blocks),
    Lowering(
        "MatMul, codes folded at load",
        "codes",
        lambda p: None if isinstance(p.format.codec, Int) else "holds integer codes",
        store_int_matrix,
        multiply_matrix,
    ),
    Lowering("MatMul", "floats", lambda p: None, store_float_matrix, multiply_matrix),
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
