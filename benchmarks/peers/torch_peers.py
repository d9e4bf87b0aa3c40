"""What PyTorch itself offers for one linear layer on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.peers.base import Call, Layer, grouped, random_bytes, random_scales, random_weight
from torch import Tensor, nn
from torch.nn import functional as F


def fp32(n: int, k: int, seed: int) -> Layer:
    """`F.linear`."""
    w = random_weight(n, k, seed)
    return Layer(4 * n * k, lambda x: lambda: F.linear(x, w), lambda: w)


def bf16(n: int, k: int, seed: int) -> Layer:
    """`F.linear` with weights and activations in bf16."""
    w = random_weight(n, k, seed).bfloat16()

    def bind(x: Tensor) -> Call:
        half = x.bfloat16()
        return lambda: F.linear(half, w)

    return Layer(2 * n * k, bind, lambda: w.float())


def dynamic_int8(n: int, k: int, seed: int) -> Layer:
    """`quantize_dynamic` of an `nn.Linear`, with torch's default engine."""
    dense = nn.Linear(k, n, bias=False)
    dense.weight = nn.Parameter(random_weight(n, k, seed), requires_grad=False)
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(nn.Sequential(dense), {nn.Linear})
    module = model[0]
    return Layer(
        n * k,
        lambda x: lambda: module(x),
        lambda: module.weight().dequantize(),
        unit="int8",
    )


def int4pack(n: int, k: int, seed: int) -> Layer:
    """`_weight_int4pack_mm_for_cpu`: 4-bit codes in groups of 128 (64), bf16 activations."""
    group = 128 if k % 128 == 0 else 64
    codes = random_bytes(n * k, seed).bitwise_and_(15).view(n, k)
    scales = random_scales((k // group, n), seed).bfloat16()
    zeros = torch.zeros_like(scales)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    both = torch.stack((scales, zeros), -1).contiguous()
    del codes

    def bind(x: Tensor) -> Call:
        half = x.bfloat16()
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, packed, group, both)

    def weight() -> Tensor:
        again = random_bytes(n * k, seed).bitwise_and_(15).view(n, k)
        return grouped(again.float() - 8, scales.T.float().contiguous())

    return Layer(n * k // 2 + 2 * both.numel(), bind, weight)


def fbgemm_sparse(n: int, k: int, seed: int) -> Layer:
    """`sparse::qlinear`: int8, half of the 1×4 blocks removed, uint8 activations of a known range
    (fbgemm has no dynamic form). Rounding x is part of the call, dequantising y too."""
    torch.manual_seed(seed)
    keep = torch.zeros(n * k // 4, dtype=torch.bool)
    keep[torch.randperm(keep.numel())[: keep.numel() // 2]] = True
    dense = random_weight(n, k, seed) * keep.view(n, k // 4).repeat_interleave(4, 1)
    stored = torch.quantize_per_tensor(dense, float(dense.abs().max()) / 127, 0, torch.qint8)
    engine, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    try:
        packed = torch.ops.sparse.qlinear_prepack(stored, None, 1, 4)
    finally:
        torch.backends.quantized.engine = engine

    def bind(x: Tensor) -> Call:
        reach_x = float(x.abs().max())
        reach_y = 1.05 * float(F.linear(x, dense_of(stored)).abs().max())

        def call() -> Tensor:
            rounded = torch.quantize_per_tensor(x, reach_x / 127, 128, torch.quint8)
            y = torch.ops.sparse.qlinear(rounded, packed, reach_y / 127, 128)
            return y.dequantize()  # type: ignore[no-any-return]

        return call

    # Half of the values, and a 4-byte column per block of four.
    size = n * k // 2 + 4 * (n * k // 8)
    return Layer(size, bind, lambda: dense_of(stored), products=0.5, unit="int8")


def dense_of(stored: Tensor) -> Tensor:
    return stored.dequantize()


def read_only(n: int, k: int, seed: int) -> Layer:
    """As many bytes as 4-bit codes take, read as an fp32 matrix: how fast memory is in between."""
    rows, ones = torch.full((n * k // 4096, 512), 1.0 + seed), torch.ones(512)
    return Layer(n * k // 2, lambda x: lambda: rows @ ones, None, products=0.0)
