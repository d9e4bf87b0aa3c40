"""`sparsefx::linears` and `sparsefx::fused` by the CPU engine: one call for all weights.

The weights are those of `codegen.prepared`, which single products share: none is held twice. Where
a weight or what is asked for is not the engine's, the op's meaning serves, product by product.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from typing import TypeAlias

import torch
from torch import Tensor

from sparsefx.codegen import native, norm, rotary, triton_fused  # noqa: F401  (their kernels)
from sparsefx.codegen.active_ranks import PLAIN, REST
from sparsefx.codegen.kernels import NATIVE, Problem, choose, prepared
from sparsefx.codegen.native import ACTIVATIONS, TYPES
from sparsefx.codegen.prepared import CALL, JOINED, Current, Product, vector
from sparsefx.ir import fused as meaning
from sparsefx.ir.codecs import Int
from sparsefx.ir.errors import WeightError
from sparsefx.ir.fused import FUSED, LINEARS, parts_of
from sparsefx.ir.op import stored

Optional: TypeAlias = Sequence[Tensor | None]
Call: TypeAlias = Callable[..., list[Tensor] | None]
"""(x, weight, bias, branch, format, n, gated, activation, multiply, residual) → the results, None
where the engine does not compute them."""
PART = struct.Struct("PP24sPq")
"""`sfx_part`; in the middle down, up and branch_scale as `Branches.call` writes them."""
WHERE = slice(16, 40)
"""The place of those three in what `Branches.call` returns."""
NO_BRANCH = bytes(24)
OPERANDS = struct.Struct("PP")
"""multiply and residual, with which that begins."""
BEHIND = slice(16, None)


def _refuse(*_: object) -> None:
    return None


def _join(x: Tensor, weight: Sequence[Tensor], format: str, n: list[int], current: Current) -> Call:
    """A call for these weights, whatever x comes."""
    engine, products = native.engine(), []
    for part in parts_of(weight, [], [], format, n):
        packed = stored(x, part.weight, part.format, part.n)
        problem = Problem(1, part.n, packed.k, torch.float32, "cpu")
        if engine is None or choose(packed.format, problem).kernel is not NATIVE:
            return _refuse
        products.append(prepared(engine, packed))
    rounds = [p.format.a8 for p in products]
    if any(rounds) and not all(p.format.a8 and isinstance(p.format.codec, Int) for p in products):
        return _refuse  # the call rounds x for all of its weights or for none
    if len(products) == 1:
        return _single(products[0], format, current)
    return _caller(products, format, current)


def _operands(y: Tensor, *given: Tensor | None) -> tuple[list[int], list[Tensor]] | None:
    """Addresses of what results like y meet, and what lies there; None where it is not like y."""
    at, held = [0] * len(given), []
    for i, other in enumerate(given):
        if other is not None:
            if other.dtype is not y.dtype or other.shape != y.shape:
                return None
            held.append(other := other.contiguous())
            at[i] = other.data_ptr()
    return at, held


def _single(product: Product, text: str, current: Current) -> Call:
    """A closure for one weight: what `prepared.linear_by` does, and where the operands are."""
    engine, own_n, k, a8 = product.weight.engine, product.n, product.k, product.format.a8
    run, handle, error = engine.run, c_void_p(product.weight.handle), engine.error
    kinds, threads, first = TYPES.get, torch.get_num_threads, OPERANDS.pack
    branch_call = product.branches.call

    def call(
        x: Tensor, weight: Sequence[Tensor], bias: Optional, branch: Optional, format: str,
        n: list[int], gated: bool, activation: int, multiply: Tensor | None,
        residual: Tensor | None,
    ) -> list[Tensor] | None:  # fmt: skip
        shape, kind = x.shape, kinds(x.dtype)
        if kind is None or shape[-1] != k or n[0] != own_n or format != text:
            return None
        m = x.numel() // k
        if m >= product.rows or not current(weight):
            return None
        y = x.new_empty(*shape[:-1], own_n)
        bias_at, rest, held, operands = 0, PLAIN, None, _operands(y, multiply, residual)
        if operands is None:
            return None
        if bias and (b := bias[0]) is not None:
            b = vector(b, own_n, x.dtype)
            bias_at = b.data_ptr()
        if branch and branch[0] is not None:
            rest, held = branch_call(branch, False)  # type: ignore[arg-type]
            if held is None:
                return None
        rows = x if x.is_contiguous() else x.contiguous()
        head = CALL(
            rows.data_ptr(), y.data_ptr(), m, k, own_n, kind, a8, activation, threads(), bias_at
        )
        if run(handle, head + first(*operands[0]) + rest[BEHIND], error):
            raise WeightError(f"the CPU engine refuses: {error.value.decode()}")
        return [y]

    return call


def _caller(products: Sequence[Product], text: str, current: Current) -> Call:
    """A closure, as `prepared.linear_by`: it runs at every step of every layer."""
    engine, k, a8 = products[0].weight.engine, products[0].k, products[0].format.a8
    handles, own_n = [p.weight.handle for p in products], [p.n for p in products]
    run, error, count = engine.run_parts, engine.error, len(products)
    kinds, threads, pack = TYPES.get, torch.get_num_threads, PART.pack
    branch_calls = [p.branches.call for p in products]

    def call(
        x: Tensor, weight: Sequence[Tensor], bias: Optional, branch: Optional, format: str,
        n: list[int], gated: bool, activation: int, multiply: Tensor | None,
        residual: Tensor | None,
    ) -> list[Tensor] | None:  # fmt: skip
        shape, kind = x.shape, kinds(x.dtype)
        if kind is None or shape[-1] != k or n != own_n or format != text:
            return None
        m = x.numel() // k
        if m >= min([p.rows for p in products]) or not current(weight):
            return None
        ys = [x.new_empty((*shape[:-1], width)) for width in (n[:1] if gated else n)]
        operands = _operands(ys[0], multiply, residual)
        if operands is None:
            return None
        parts, held = b"", list[object]()
        for i, handle in enumerate(handles):
            bias_at, low = 0, NO_BRANCH
            if bias and (b := bias[i]) is not None:
                held.append(b := vector(b, n[i], x.dtype))
                bias_at = b.data_ptr()
            if branch and branch[3 * i] is not None:
                rest, keep = branch_calls[i](branch[3 * i : 3 * i + 3], False)  # type: ignore[arg-type]
                if keep is None:
                    return None
                held.append(keep)
                low = rest[WHERE]
            y = ys[0] if gated else ys[i]
            parts += pack(handle, bias_at, low, y.data_ptr(), n[i])
        rows = x if x.is_contiguous() else x.contiguous()
        head = CALL(rows.data_ptr(), 0, m, k, 0, kind, a8, activation, threads(), 0)
        if run(parts, count, gated, head + REST(*operands[0], 0, 0, 0, 0, 0), error):
            raise WeightError(f"the CPU engine refuses: {error.value.decode()}")
        return ys

    return call


def _products(
    x: Tensor, weight: Sequence[Tensor], bias: Optional, branch: Optional, format: str,
    n: list[int], *epilogue: object,
) -> list[Tensor] | None:  # fmt: skip
    """By the engine: at once where it holds the weights, else after a look at them."""
    arguments = (x, weight, bias, branch, format, n, *epilogue)
    entry = JOINED.entries.get(id(weight[0]))
    if entry is not None and (ys := entry.value(*arguments)) is not None:
        return ys
    if x.dtype not in TYPES or not x.numel() or JOINED.find(weight) is not None:
        return None
    return JOINED.get(weight, lambda now: _join(x, weight, format, n, now), bool)(*arguments)


ENTRIES = JOINED.entries


def linears(
    x: Tensor, weight: list[Tensor], bias: list[Tensor | None], branch: list[Tensor | None],
    format: str, n: list[int],
) -> list[Tensor]:  # fmt: skip
    """`sparsefx::linears` on CPUs."""
    ys = _products(x, weight, bias, branch, format, n, False, 0, None, None)
    return meaning.linears(x, weight, bias, branch, format, n) if ys is None else ys


def fused(
    x: Tensor, weight: list[Tensor], bias: list[Tensor | None], branch: list[Tensor | None],
    format: str, n: list[int], activation: str, multiply: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`sparsefx::fused` on CPUs."""
    gated, number = len(n) == 2, ACTIVATIONS[activation]
    entry = ENTRIES.get(id(weight[0]))  # at once, as `kernels.linear`
    ys = None
    if entry is not None:
        ys = entry.value(x, weight, bias, branch, format, n, gated, number, multiply, residual)
    if ys is None:
        ys = _products(x, weight, bias, branch, format, n, gated, number, multiply, residual)
    if ys is not None:
        return ys[0]
    return meaning.fused(x, weight, bias, branch, format, n, activation, multiply, residual)


meaning.use(LINEARS, linears)
meaning.use(FUSED, fused)
