"""The kernel table: who multiplies by which Format, in order of preference, and why not.

`choose` returns the first row that accepts a problem and the reasons of those passed over. The
last row serves every format on every device. A faster kernel is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from sparsefx.codegen import crossover, native, triton
from sparsefx.codegen.prepared import PRODUCTS, Product
from sparsefx.ir.codecs import Codec, Float, Int
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import Dense, Layout
from sparsefx.ir.op import add_branch, quantize_rows, reference, stored, use_kernel
from sparsefx.ir.plugins import Plugged


@dataclass(frozen=True)
class Problem:
    """One product: x (m, k) · Wᵀ (k, n); `m` None stands for any number of rows."""

    m: int | None
    n: int
    k: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Kernel:
    """A row of the table: a Layout and a Codec class; `device` "*" serves every device."""

    name: str
    layout: type[Any]
    codec: type[Any]
    device: str
    run: Callable[[Tensor, Packed, Tensor | None, Sequence[Tensor]], Tensor]
    rejects: Callable[[Format, Problem], str | None] = lambda fmt, problem: None
    details: Callable[[Sequence[Tensor]], tuple[str, int]] = lambda buffers: ("", 0)
    """Of the weight in `buffers`: how it is served, and the bytes of the kernel's own copy."""


@dataclass(frozen=True)
class Choice:
    """The kernel that serves a problem, and why each one before it does not."""

    kernel: Kernel
    refused: tuple[str, ...]


def _int8_rejects(fmt: Format, problem: Problem) -> str | None:
    codec = fmt.codec
    assert isinstance(codec, Int)
    if not fmt.a8:
        return "needs int8 activations; ask with '+a8'"
    if 0 < fmt.a8_group < problem.k:
        return f"needs one activation scale per row, not one per {fmt.a8_group} columns"
    if (codec.bits, codec.group_size, codec.symmetric) != (8, 0, True):
        return f"needs codec 'int8' (one symmetric scale per row), not '{codec}'"
    if problem.k < 2:  # torch._int_mm returns garbage for K=1 (torch 2.13, CPU)
        return f"K is {problem.k}"
    return None


def _int8_run(x: Tensor, packed: Packed, bias: Tensor | None, branch: Sequence[Tensor]) -> Tensor:
    """Exact int32 products of int8 codes (oneDNN), then one scale per row and column."""
    values, scales = packed.buffers
    codes, row_scales = quantize_rows(x.reshape(-1, packed.k))
    weight = values.view(torch.int8).view(packed.n, packed.k)
    sums = torch._int_mm(codes, weight.T)
    y = sums.float().mul_(row_scales).mul_(scales.float().view(1, -1))
    if bias is not None:
        y += bias.float()
    return add_branch(y.to(x.dtype).reshape(*x.shape[:-1], packed.n), x, branch)


def _native_rejects(fmt: Format, problem: Problem) -> str | None:
    if isinstance(fmt.layout, Dense) and isinstance(fmt.codec, Float):
        return "dense floats: torch multiplies them best"
    if not isinstance(fmt.codec, Float | Int):
        return f"holds integer codes and plain floats, not '{fmt.codec}'"
    if problem.dtype not in native.TYPES:
        return f"computes in float32, not {problem.dtype}"
    if not problem.n * problem.k:
        return "the weight is empty"
    if (problem.m or 0) >= crossover.LEAST and (problem.m or 0) >= _native_rows(fmt, problem)[0]:
        rows, rival = _native_rows(fmt, problem)
        return f"{rival} is faster from {rows} rows on, as measured here once"
    return native.why_missing() or None


def _native_rows(fmt: Format, problem: Problem) -> tuple[int, str]:
    """The number of rows from which on another kernel is faster, and its name."""
    engine, rival = native.engine(), UNPACK
    if engine is None:
        return crossover.NEVER, ""
    if isinstance(fmt.layout, Dense) and isinstance(fmt.codec, Int):
        rival = UNPACK if _int8_rejects(fmt, problem) else INT8
    plain = replace(fmt, rank=0)
    return crossover.rows(plain, problem.dtype, engine, rival.name, rival.run), rival.name


def prepared(engine: native.Engine, packed: Packed) -> Product:
    """The weight in the engine's order, brought into it where that was not done before."""
    return PRODUCTS.get(
        packed.buffers,
        lambda current: Product(engine, packed, current, crossover.LEAST),
        lambda found: found.packs(packed),
    )


def _native_run(x: Tensor, packed: Packed, bias: Tensor | None, branch: Sequence[Tensor]) -> Tensor:
    """The CPU engine (`runtime/native/`) over the weight in its own order."""
    engine = native.engine()
    assert engine is not None
    product = prepared(engine, packed)
    if x.numel() >= crossover.LEAST * packed.k:
        problem = Problem(None, packed.n, packed.k, x.dtype, "cpu")
        product.serve(*_native_rows(packed.format, problem))
    y = product.any_rows(x, packed.buffers, bias, branch, str(packed.format), packed.n)
    assert y is not None, "the weight was edited while it was multiplied by"
    return y


def _native_details(buffers: Sequence[Tensor]) -> tuple[str, int]:
    """Family and instruction set; family and copy are there from the first product on."""
    engine = native.engine()
    if engine is None:
        return "", 0
    held = PRODUCTS.find(buffers) if buffers else None
    if held is None:
        return engine.isa, 0
    text = f"{held.weight.family} {engine.isa}"
    if held.rival and held.rows != crossover.NEVER:
        text += f", {held.rival} from {held.rows} rows on (measured)"
    return text, held.weight.bytes


def _triton(order: str) -> Kernel:
    def rejects(fmt: Format, problem: Problem) -> str | None:
        why = triton.rejects(order, fmt, problem.k if problem.n else 0, problem.m, problem.dtype)
        return why or triton.why_missing() or None

    return Kernel(
        f"triton_{order}", Layout, Codec, "cuda",
        partial(triton.run, order), rejects, partial(triton.describe, order),
    )  # fmt: skip


INT8 = Kernel("int8_matmul", Dense, Int, "cpu", _int8_run, _int8_rejects)
NATIVE = Kernel("cpu_native", Layout, Codec, "cpu", _native_run, _native_rejects, _native_details)
UNPACK = Kernel("unpack_then_dense", Layout, Codec, "*", reference)


def _kernel(row: Any) -> str | None:
    return None if isinstance(row, Kernel) else f"{row!r} is no Kernel"


OURS = (NATIVE, INT8, *map(_triton, triton.ORDERS), UNPACK)
KERNELS: Plugged[Kernel] = Plugged("sparsefx.kernels", _kernel, (), OURS)
"""Rows of other packages (entry points `sparsefx.kernels`) are asked first."""


@lru_cache(maxsize=4096)
def choose(fmt: Format, problem: Problem) -> Choice:
    """The first kernel of this device, layout and codec that accepts; why earlier ones do not."""
    refused: list[str] = []
    for kernel in KERNELS:
        if not isinstance(fmt.layout, kernel.layout) or not isinstance(fmt.codec, kernel.codec):
            continue
        if kernel.device not in ("*", problem.device):
            continue
        if (why := kernel.rejects(fmt, problem)) is not None:
            refused.append(f"{kernel.name}: {why}")
        else:
            return Choice(kernel, tuple(refused))
    raise LookupError(f"no kernel for {fmt}: {refused}")


ENTRIES = PRODUCTS.entries


def linear(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, branch: list[Tensor], format: str, n: int
) -> Tensor:
    """`sparsefx::linear`: at once where the engine holds the weight, else by the table."""
    entry = ENTRIES.get(id(weight[0]))
    if entry is not None:
        y = entry.value.linear(x, weight, bias, branch, format, n)
        if y is not None:
            return y
    packed = stored(x, weight, format, n)
    problem = Problem(x.numel() // max(packed.k, 1), n, packed.k, x.dtype, x.device.type)
    return choose(packed.format, problem).kernel.run(x, packed, bias, branch)


use_kernel(linear)


def describe(kernel: Kernel, buffers: Sequence[Tensor]) -> tuple[str, int]:
    """The kernel's name with what it says of the weight, and the bytes of its own copy."""
    details, size = kernel.details(buffers)
    return " ".join(part for part in (kernel.name, details) if part), size
