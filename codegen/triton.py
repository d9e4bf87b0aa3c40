"""Triton's rows of the kernel table: which formats they take, and one product by them.

triton is imported at the first product, never by `import sparsefx`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from sparsefx.codegen import triton_tune
from sparsefx.codegen.prepared import Store
from sparsefx.codegen.triton_lanes import lanes, lanes_rejects
from sparsefx.codegen.triton_launch import Config, Product
from sparsefx.codegen.triton_pack import (
    Columns,
    Masked,
    bits_of,
    columns,
    columns_rejects,
    masked,
    masked_rejects,
)  # fmt: skip
from sparsefx.ir.codecs import Int
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.fused import ACTIVATIONS
from sparsefx.ir.layouts import Dense
from sparsefx.ir.op import reference

TYPES = (torch.float16, torch.bfloat16)
ORDERS: Mapping[str, Callable[[Packed], Columns | Masked]] = {
    "columns": lambda packed: columns(packed, packed.format.a8), "lanes": lanes, "masked": masked,
}  # fmt: skip
PRODUCTS: dict[str, Store[Product]] = {order: Store() for order in ORDERS}
"""Weights in each kernel's order, for as long as their packed tensors live."""


def why_missing() -> str:
    """Why Triton cannot be used here; empty where it can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "torch finds no GPU here"
    return ""


def rejects(order: str, fmt: Format, k: int, m: int | None, dtype: torch.dtype) -> str | None:
    """Why the kernel over `order` (of `ORDERS`) does not multiply by this format."""
    codec = fmt.codec
    if dtype not in TYPES:
        return f"computes in float16 and bfloat16, not {dtype}"
    if fmt.a8 and not isinstance(codec, Int):
        return f"'+a8' needs integer codes, not '{codec or 'floats'}'"
    if fmt.a8_group:
        return f"needs one activation scale per row, not one per {fmt.a8_group} columns"
    if fmt.a8 and isinstance(codec, Int) and codec.bits == 8 and not codec.symmetric:
        return "uint8 codes minus zero points are no int8"
    if isinstance(fmt.layout, Dense) and not bits_of(codec):
        return "dense floats: torch multiplies them best"
    if not k:
        return "the weight is empty"
    if order == "masked":
        return masked_rejects(fmt, k)
    if order == "columns":
        return columns_rejects(fmt, k, fmt.a8)
    if (m or 0) > 4 or fmt.a8:
        what = "int8 activations" if fmt.a8 else f"{m} rows of x"
        return f"it multiplies without tensor cores, which {what} need"
    return lanes_rejects(fmt, k)


def run(
    order: str, x: Tensor, packed: Packed, bias: Tensor | None, branch: Sequence[Tensor],
    activation: str = "none", multiply: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(`sparsefx::linear`) ⊙ multiply + residual by the kernel over `order`, or densely where
    that was measured faster. multiply and residual are (…, N) in x's type.
    """
    product = prepared(order, packed)
    m = x.numel() // packed.k
    config = configuration(product, packed, m, x.dtype)
    if config is None:
        y = ACTIVATIONS[activation](reference(x, packed, bias, branch))
        y = y if multiply is None else y * multiply
        return y if residual is None else y + residual
    bias = None if bias is None else bias.to(x.dtype)
    return product.linear(x, config, bias, branch, activation, multiply, residual)


def prepared(order: str, packed: Packed) -> Product:
    """The weight in a kernel's order, made at its first product."""
    from sparsefx.codegen import triton_kernels

    def make(_: object) -> Product:
        return Product(ORDERS[order](packed), triton_kernels)

    shape = (packed.format, packed.n, packed.k)
    return PRODUCTS[order].get(
        packed.buffers, make, lambda p: shape == (p.weight.format, p.weight.n, p.weight.k)
    )


def configuration(product: Product, packed: Packed, m: int, dtype: torch.dtype) -> Config | None:
    """What `triton_tune` chooses for `m` rows."""
    device = product.weight.planes[0].device
    work = triton_tune.Work(
        product.weight, triton_tune.bucket(m), packed.format.a8, _processors(str(device))
    )
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = (work.bucket, dtype)
    if key not in product.configs:
        measure = _measure(product, packed, work.bucket, dtype)
        found = triton_tune.choose(work, measure, f"{_name(str(device))} {dtype}", capturing)
        if capturing:
            return found or triton_tune.default(work)
        product.configs[key] = found
    # Unpacking waits for the device, which a CUDA graph cannot record.
    return product.configs[key] or (triton_tune.default(work) if capturing else None)


def _measure(product: Product, packed: Packed, m: int, dtype: torch.dtype) -> triton_tune.Measure:
    """Median seconds with the second-level cache flushed before every run."""

    def measure(config: Config | None) -> float:
        from triton.testing import do_bench

        x = torch.randn(m, packed.k, device=packed.buffers[0].device, dtype=dtype)
        call: Callable[[], Tensor] = (
            partial(reference, x, packed, None, ())
            if config is None
            else partial(product.linear, x, config)
        )
        with torch.inference_mode():
            return float(do_bench(call, warmup=5, rep=20, return_mode="median")) / 1e3

    return measure


@lru_cache(maxsize=16)
def _processors(device: str) -> int:
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=16)
def _name(device: str) -> str:
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return device
    return str(torch.cuda.get_device_name(device))


def describe(order: str, buffers: Sequence[Tensor]) -> tuple[str, int]:
    """The configuration chosen per number of rows so far, and the bytes of the kernel's order."""
    product = PRODUCTS[order].find(buffers) if buffers else None
    if product is None:
        return "(configured at the first product)", 0
    known = [
        f"M≤{b}: {c or 'unpacked, densely: measured faster'}"
        for (b, _), c in sorted(product.configs.items(), key=str)
    ]
    return "; ".join(known), product.weight.bytes
