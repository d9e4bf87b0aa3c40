"""The engines of the GPU benchmark: what each does with one (N, K) weight, ours among them.

A new peer is a function and a line in `PEERS`. One that is missing here raises, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.codegen.kernels import Choice, Problem, choose
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import add_branch, quantize_rows

Call = Callable[[], Tensor]
GROUP = 128
"""Columns that share a scale in the 4-bit peers."""
OURS = (
    "int4g128", "tile64x16@50%+int4g128", "int8", "int8+a8", "tile1x16@50%+int4g128", "2:4+bf16",
    "2:4+int4g128", "bitmap@50%+int4g128", "tile64x16@50%+bf16", "int4g128+r32", "int8+r32+a8",
    "int3g128", "int2g128", "tile16x1@50%+int4g128", "tile16x16@50%+int4g128+a8",
)  # fmt: skip
"""Formats, those of the goals first."""
REFERENCE = "cuBLAS bf16"
GEMLITE = "gemlite int4 g128 fp16"
APART = ", branch as torch products"


@dataclass(frozen=True)
class Layer:
    """One linear layer with weights of its own on the device."""

    bytes: int
    """Bytes of weight (codes, scales, index, branch) that a product reads."""
    bind: Callable[[Tensor], Call]
    """From x (M, K) to a call that computes y (M, N); what needs no weight is prepared."""
    again: Callable[[], Layer]
    """The same layer in other memory."""
    rows: Callable[[Tensor], Tensor] | None = None
    """Rows of the dense weight that the stored form stands for, float64; None: not checked."""
    products: float = 1.0
    """Share of the N · K products that the stored form needs."""
    unit: str = "bf16"
    """The peak that bounds it: products of "int8" or of floats ("bf16")."""
    kernel: Callable[[int], str] = lambda m: ""
    """The kernel that serves M rows and how it is configured, where the engine tells."""


@dataclass(frozen=True)
class Peer:
    """An engine; `layer(weight)` builds it from a float32 (N, K) weight, or raises the reason."""

    name: str
    layer: Callable[[Tensor], Layer]
    ours: bool = False
    rows: tuple[int, ...] = ()
    """The numbers of rows it is measured at; empty: all."""


def copies(first: Layer, least: int) -> list[Layer]:
    """`first` and as many others as `least` bytes take, one at least unless `least` is 0."""
    count = max(-(-least // first.bytes), 2) if least else 1
    return [first, *(first.again() for _ in range(count - 1))]


# --- ours ----------------------------------------------------------------------------------------


def ours(text: str, dtype: torch.dtype, apart: bool, weight: Tensor) -> Layer:
    """`weight` stored as Format `text`; `apart`: its branch as two products of torch."""
    fmt = Format.parse(text)
    packed = fmt.pack(weight)
    mask = packed.read()[1]
    share = 1.0 if mask is None else int(mask.count_nonzero()) / max(mask.numel(), 1)
    branch: list[Tensor] = []
    if fmt.rank:
        n, k = weight.shape
        torch.manual_seed(0)
        parts = torch.randn(fmt.rank, k) * k**-0.5, torch.randn(n, fmt.rank) * 0.02
        branch = [t.to(weight.device, dtype) for t in (*parts, torch.ones(fmt.rank))]
    return _ours(packed, branch, share, dtype, apart)


def _ours(
    packed: Packed, branch: list[Tensor], share: float, dtype: torch.dtype, apart: bool
) -> Layer:
    fmt = packed.format

    def chosen(m: int) -> Choice:
        return choose(fmt, Problem(m, packed.n, packed.k, dtype, "cuda"))

    def bind(x: Tensor) -> Call:
        run = chosen(x.shape[0]).kernel.run
        if apart:
            return lambda: add_branch(run(x, packed, None, ()), x, branch)
        return lambda: run(x, packed, None, branch)

    def again() -> Layer:
        buffers = tuple(b.clone() for b in packed.buffers)
        other = replace(packed, buffers=buffers)
        return _ours(other, [t.clone() for t in branch], share, dtype, apart)

    def rows(index: Tensor) -> Tensor:
        dense = packed.unpack()[index].double()
        if branch:
            down, up, scale = (t.double() for t in branch)
            dense += (up[index] * scale) @ down
        return dense

    def kernel(m: int) -> str:
        choice = chosen(m)
        details = choice.kernel.details(packed.buffers)[0] or "; ".join(choice.refused)
        return f"{choice.kernel.name} {details}"

    size = packed.stored_bytes + sum(t.numel() * t.element_size() for t in branch)
    return Layer(size, bind, again, rows, share, "int8" if fmt.a8 else "bf16", kernel)


# --- torch ---------------------------------------------------------------------------------------


def cublas(weight: Tensor) -> Layer:
    """`F.linear` in bf16."""
    return _floats(weight.bfloat16(), F.linear)


def compiled(weight: Tensor) -> Layer:
    """`torch.compile` of `F.linear` in bf16, one compilation per shape."""
    dynamo: Any = import_module("torch._dynamo")
    dynamo.config.recompile_limit = 64
    return _floats(weight.bfloat16(), torch.compile(_linear, dynamic=False))


def _linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def _floats(w: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Layer:
    return Layer(
        w.numel() * w.element_size(),
        lambda x: lambda: product(x.to(w.dtype), w),
        lambda: _floats(w.clone(), product),
        lambda index: w[index].double(),
    )


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0…15 (N, K) uint8, 8 being zero, and scales (N, K / 128), of `weight`."""
    wide = weight.view(len(weight), -1, GROUP)
    scales = (wide.abs().amax(-1) / 7).clamp(min=1e-8)
    codes = (wide / scales[..., None]).round_().add_(8).clamp_(0, 15)
    return codes.to(torch.uint8).view_as(weight), scales


def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    wide = codes.double().view(len(codes), -1, GROUP) - 8
    return (wide * scales.double()[..., None]).view_as(codes)


def int4pack(weight: Tensor) -> Layer:
    """`_weight_int4pack_mm` (tinygemm), groups of 128, bf16."""
    codes, scales = _codes(weight)
    scales = scales.bfloat16()
    nibbles = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    grid = torch.stack((scales.T, torch.zeros_like(scales.T)), -1).contiguous()
    return _int4pack(packed, grid, lambda index: _decoded(codes[index], scales[index]))


def _int4pack(packed: Tensor, grid: Tensor, rows: Callable[[Tensor], Tensor]) -> Layer:
    product = torch.ops.aten._weight_int4pack_mm
    return Layer(
        packed.numel() * packed.element_size() + 2 * grid.numel(),
        lambda x: lambda: product(x, packed, GROUP, grid),
        lambda: _int4pack(packed.clone(), grid.clone(), rows),
        rows,
    )


def int_mm(weight: Tensor) -> Layer:
    """`torch._int_mm` over int8 codes of x: the int32 sums alone, without rounding and scaling."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return _int_mm((weight / scales).round_().to(torch.int8))


def _int_mm(codes: Tensor) -> Layer:
    def bind(x: Tensor) -> Call:
        # It needs more than 16 rows, and counts of 8.
        wide = F.pad(x, (0, 0, 0, max(32 - len(x), -len(x) % 8)))
        ints = quantize_rows(wide)[0]
        return lambda: torch._int_mm(ints, codes.T)

    return Layer(codes.numel(), bind, lambda: _int_mm(codes.clone()), unit="int8")


def semi_structured(weight: Tensor) -> Layer:
    """`to_sparse_semi_structured` in bf16, the larger two of every four weights."""
    packed = Format.parse("2:4+bf16").pack(weight)
    dense = packed.unpack(torch.bfloat16)

    def build() -> Layer:
        sparse: Any = torch.sparse.to_sparse_semi_structured(dense)
        return Layer(
            dense.numel() + dense.numel() // 8,
            lambda x: lambda: F.linear(x, sparse),
            build,
            lambda index: dense[index].double(),
            products=0.5,
        )

    return build()


# --- packages ------------------------------------------------------------------------------------


def gemlite(tuning: str, weight: Tensor) -> Layer:
    """gemlite's 4-bit layer in float16, for which it ships most configurations."""
    make = _gemlite(tuning).A16Wn(device=str(weight.device), dtype=torch.float16)
    codes, scales = _codes(weight)
    scales = scales.half()

    def build() -> Layer:
        module = make.from_weights(codes, scales, torch.full_like(scales, 8), 4, GROUP)

        def bind(x: Tensor) -> Call:
            half = x.half()
            return lambda: module(half)

        size = codes.numel() // 2 + 4 * scales.numel()
        return Layer(size, bind, build, lambda index: _decoded(codes[index], scales[index]))

    return build()


@lru_cache(maxsize=1)
def _gemlite(tuning: str) -> Any:
    """gemlite's helpers, once told how to tune: that loads its kernels anew."""
    library: Any = import_module("gemlite")
    if tuning != "default":
        library.set_autotune(tuning)
    return import_module("gemlite.helper")


def bitsandbytes(weight: Tensor) -> Layer:
    """bitsandbytes' 4-bit product: NF4, blocks of 64, bf16."""
    library: Any = import_module("bitsandbytes")
    codes, state = library.functional.quantize_4bit(
        weight.bfloat16(), blocksize=64, quant_type="nf4"
    )

    def build(codes: Tensor) -> Layer:
        dequantize = library.functional.dequantize_4bit
        return Layer(
            codes.numel() * codes.element_size() + 4 * state.absmax.numel(),
            lambda x: lambda: library.matmul_4bit(x, codes.t(), quant_state=state),
            lambda: build(codes.clone()),
            lambda index: dequantize(codes, state)[index].double(),
        )

    return build(codes)


def peers(dtype: torch.dtype, tuning: str) -> list[Peer]:
    """Every engine, in the order in which they are kept when time is short."""
    own = {text: Peer(text, partial(ours, text, dtype, False), True) for text in OURS}
    apart = [
        Peer(text + APART, partial(ours, text, dtype, True), True) for text in OURS if "+r" in text
    ]
    return [
        Peer(REFERENCE, cublas),
        *own.values(),
        *apart,
        Peer("torch 2:4 bf16", semi_structured),
        Peer("torch int4pack g128", int4pack),
        Peer("torch int8 sums", int_mm),
        Peer("bitsandbytes NF4", bitsandbytes),
        Peer("torch.compile bf16", compiled, rows=(1, 16, 256)),
        Peer(GEMLITE, partial(gemlite, tuning), rows=(1, 16)),
    ]
