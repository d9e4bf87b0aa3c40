"""sparsefx's own rows: random stored weights of any Format, run through the op."""

from __future__ import annotations

import statistics
import time
from functools import lru_cache, partial

import torch
from benchmarks.peers.base import SPREAD, Layer, Peer, random_bytes, random_scales
from torch import Tensor

from sparsefx.codegen.kernels import Problem, choose
from sparsefx.ir.bits import stream_bytes
from sparsefx.ir.codecs import Int
from sparsefx.ir.format import Format, Packed

CODES = (
    "int4g128", "bitmap@50%+int4g128", "2:4+int4g128", "tile1x16@50%+int4g128",
    "tile16x1@50%+int4g128", "tile16x1@75%+int4g128", "int3g128", "int2g128", "int8",
)  # fmt: skip
SPECS = [*(f"{c}+a8" for c in CODES), *CODES]
SPECS += ["int4g128+r32+a8", "bitmap@50%+bf16", "bitmap@50%+fp32"]
BRANCH = torch.float32
"""A branch has its model's dtype; x is fp32 here."""


@lru_cache(maxsize=2)
def _slabs(layout: str, rows: int, k: int, count: int) -> tuple[list[tuple[Tensor, ...]], int]:
    """Index buffers of `count` random patterns of (rows, k), and how many positions each keeps."""
    fmt = Format.parse(f"{layout}+bf16")
    torch.manual_seed(count)
    masks = [fmt.layout.select(torch.rand(rows, k)) for _ in range(count)]
    return [fmt.layout.index(mask) for mask in masks], int(masks[0].count_nonzero())


def random_packed(fmt: Format, n: int, k: int, seed: int) -> tuple[Packed, int]:
    """A stored (n, k) weight with random bytes for values, and how many values it stores.

    The index is a shuffled stack of 16 slabs of rows, each a random pattern written by the Layout.
    """
    count = 16 if n % 256 == 0 else 1
    slabs, kept = _slabs(str(fmt.layout), n // count, k, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    index = tuple(torch.cat([slabs[i][b] for i in order]) for b in range(len(slabs[0])))
    kept *= count
    codec = fmt.codec
    if not isinstance(codec, Int):
        dtype = codec.encode(torch.zeros(1, 1), codec.fit(torch.zeros(1, 1))).dtype
        generator = torch.Generator().manual_seed(seed)
        values = (torch.randn(kept, generator=generator) * SPREAD).to(dtype)
        return Packed(fmt, n, k, (*index, values)), kept
    values = random_bytes(stream_bytes(kept, codec.bits), seed)
    scales = random_scales((n, codec.groups(k)), seed).half()
    packed = Packed(fmt, n, k, (*index, values, scales))
    assert 8 * packed.stored_bytes == fmt.needed_bits(n, k, kept, 4), f"density of {fmt}"
    return packed, kept


def layer(spec: str, n: int, k: int, seed: int) -> Layer:
    """`torch.ops.sparsefx.linear` over a random weight of format `spec`, x fp32."""
    fmt = Format.parse(spec)
    packed, kept = random_packed(fmt, n, k, seed)
    buffers, name = list(packed.buffers), str(fmt)
    branch: list[Tensor] = []
    if fmt.rank:
        torch.manual_seed(seed)
        down, up = torch.randn(fmt.rank, k) * SPREAD, torch.randn(n, fmt.rank) * SPREAD
        branch = [t.to(BRANCH) for t in (down, up, torch.ones(fmt.rank))]

    def weight() -> Tensor:
        dense = packed.unpack()
        if branch:
            down, up, scale = (t.float() for t in branch)
            dense += (up * scale) @ down
        return dense

    return Layer(
        packed.stored_bytes + sum(t.numel() * t.element_size() for t in branch),
        lambda x: lambda: torch.ops.sparsefx.linear(x, buffers, None, branch, name, n),
        weight,
        products=kept / (n * k),
        unit="int8" if fmt.a8 else "bf16",
        packs=True,
        kernel=lambda m: choose(fmt, Problem(m, n, k, torch.float32, "cpu")).kernel.name,
    )


def overhead_us() -> float:
    """Microseconds of one op call on a 16×16 `int8+a8` weight, M=1, less an empty function's."""
    fmt = Format.parse("int8+a8")
    buffers = list(fmt.pack(torch.randn(16, 16)).buffers)
    x, name, op = torch.randn(1, 16), str(fmt), torch.ops.sparsefx.linear

    def empty(*_: object) -> None:
        return None

    def loop(call: object, count: int = 100) -> float:
        assert callable(call)
        start = time.perf_counter()
        for _ in range(count):
            call(x, buffers, None, [], name, 16)
        return (time.perf_counter() - start) / count * 1e6

    with torch.inference_mode():
        loop(op)
        return statistics.median(loop(op) - loop(empty) for _ in range(60))


OURS = [Peer(spec, partial(layer, spec), ours=True) for spec in SPECS]
