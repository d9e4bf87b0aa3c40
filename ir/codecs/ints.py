"""`int2`…`int8` (symmetric) and `uint2`…`uint8` (with zero points), per channel or group."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefx.ir.bits import pack_bits, stream_bytes, unpack_bits
from sparsefx.ir.codecs.base import SCALE, Grid, Grouped, fp16_scales
from sparsefx.ir.errors import SpecError

SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76)
"""Shares of a group's range tried as clipping points below 6 bits; the least error wins."""
AT_ONCE = 1 << 16
"""Values up to which all clipping points are tried by one operator each: for small weights the
calls are what takes time, for others memory would.
"""


@dataclass(frozen=True)
class Int(Grouped):
    """value = (code − zero_point) · scale, one fp16 scale per row and `group_size` columns of K.

    Symmetric codes are two's complement with zero point 0, so 8-bit codes are plain int8; `uint`
    codes are unsigned with one `bits`-wide zero point per scale.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    example: ClassVar[str] = "int4g128"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(f"codec '{self}': integers have 2 to 8 bits, e.g. 'int4g128'")
        super().__post_init__()

    def __str__(self) -> str:
        return f"{'' if self.symmetric else 'u'}int{self.bits}{self.suffix}"

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("values", "scales") if self.symmetric else ("values", "scales", "zero_points")

    @classmethod
    def parse(cls, token: str) -> Int | None:
        found = re.fullmatch(r"(u?)int(\d{1,2})(?:g(\d{1,5}))?", token)
        if not found:
            return None
        return cls(int(found[2]), cls.size_in(token, found[3]), not found[1])

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1

    # --- the grid ------------------------------------------------------------------------------

    def fit(self, weight: Tensor) -> Grid:
        blocks = self.blocks(weight)
        tried = self._candidates(blocks)
        count = len(tried[0])
        step = count if count * blocks.numel() <= AT_ONCE else 1
        error = torch.full(blocks.shape[:2], torch.inf, device=weight.device)
        best = torch.zeros_like(error, dtype=torch.int64)
        for first in range(0, count, step):
            wide = Grid(*(t[first : first + step, ..., None] for t in tried))
            got = self.decode(self.encode(blocks, wide), wide)
            least, place = (got - blocks).square_().sum(-1).min(0)
            best = torch.where(least < error, place + first, best)
            error = torch.minimum(least, error)
        return Grid(*(t.gather(0, best[None])[0] for t in tried))

    def _candidates(self, blocks: Tensor) -> list[Tensor]:
        """Scales, and zero points where there are any, of every grid to try: (C, N, groups)."""
        if blocks.shape[-1] == 0:
            blocks = blocks.new_zeros(*blocks.shape[:-1], 1)
        lo, hi = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        clips = SHRINK if self.bits < 6 else (1.0,)
        shrink = torch.tensor(clips, device=blocks.device)[:, None, None]
        if not self.symmetric:
            low, high = lo * shrink, hi * shrink
            scales = fp16_scales((high - low) / self.high)
            return [scales, (-low / scales).round().clamp(0, self.high)]
        scales = torch.maximum(-lo, hi) * shrink / self.high
        if self.bits < 6:
            # The widest code is −2^(b−1): a scale of either sign lets the extreme value use it
            # (Q4_0).
            extreme = torch.where(-lo > hi, lo, hi)
            scales = torch.cat((scales, extreme * shrink / self.low))
        return [fp16_scales(scales)]

    # --- codes ---------------------------------------------------------------------------------

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        assert grid.scales is not None
        codes = (weight.float() / grid.scales).round_()
        if grid.zero_points is not None:
            codes += grid.zero_points
        return codes.clamp_(self.low, self.high)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        assert grid.scales is not None
        if grid.zero_points is not None:
            codes = codes - grid.zero_points
        # 0 times a negative scale is −0; adding 0 makes it the 0 that is meant.
        return (codes * grid.scales).add_(0.0)

    def write(self, codes: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        assert grid.scales is not None
        values = pack_bits(codes.to(torch.int16) & 255, self.bits)
        out = (values, grid.scales.to(SCALE).contiguous())
        if grid.zero_points is None:
            return out
        return (*out, pack_bits(grid.zero_points.to(torch.uint8), self.bits))

    def read(self, buffers: tuple[Tensor, ...], count: int, n: int, k: int) -> tuple[Tensor, Grid]:
        codes = unpack_bits(buffers[0], self.bits, count, self.symmetric)
        shape = (n, self.groups(k))
        scales = buffers[1].float().view(shape)
        if self.symmetric:
            return codes, Grid(scales)
        zeros = unpack_bits(buffers[2], self.bits, shape[0] * shape[1]).float().view(shape)
        return codes, Grid(scales, zeros)

    def value_bits(self, n: int, k: int, count: int, itemsize: int) -> int:
        grid = n * self.groups(k) * 8 * SCALE.itemsize
        zeros = 0 if self.symmetric else 8 * stream_bytes(n * self.groups(k), self.bits)
        return count * self.bits + grid + zeros
