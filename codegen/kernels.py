"""The kernel table: who multiplies by which Format, in order of preference, and why not.

`choose` returns the first row that accepts a problem and the reasons of those passed over. The
last row serves every format on every device. A faster kernel is one function and one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsefx.ir.codecs import Codec, Int
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import Dense, Layout
from sparsefx.ir.op import add_branch, quantize_rows, reference, use_runner


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


UNPACK = Kernel("unpack_then_dense", Layout, Codec, "*", reference)
KERNELS: list[Kernel] = [
    Kernel("int8_matmul", Dense, Int, "cpu", _int8_run, _int8_rejects),
    UNPACK,
]


@lru_cache(maxsize=4096)
def choose(fmt: Format, problem: Problem) -> Choice:
    """The first kernel that accepts, and why earlier ones of this layout and codec do not."""
    refused: list[str] = []
    for kernel in KERNELS:
        if not isinstance(fmt.layout, kernel.layout) or not isinstance(fmt.codec, kernel.codec):
            continue
        if kernel.device not in ("*", problem.device):
            refused.append(f"{kernel.name}: runs on {kernel.device}, not {problem.device}")
        elif (why := kernel.rejects(fmt, problem)) is not None:
            refused.append(f"{kernel.name}: {why}")
        else:
            return Choice(kernel, tuple(refused))
    raise LookupError(f"no kernel for {fmt}: {refused}")


def run(x: Tensor, packed: Packed, bias: Tensor | None, branch: Sequence[Tensor]) -> Tensor:
    """Compute `sparsefx::linear` with the kernel that the table names."""
    rows = x.numel() // max(x.shape[-1], 1)
    problem = Problem(rows, packed.n, packed.k, x.dtype, x.device.type)
    return choose(packed.format, problem).kernel.run(x, packed, bias, branch)


use_runner(run)
