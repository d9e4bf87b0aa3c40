"""`fp8`: float8_e4m3fn values (OCP 8-bit floats: 4 exponent, 3 mantissa bits) times fp16 scales."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefx.ir.codecs.base import SCALE, Grid, Grouped, fp16_scales
from sparsefx.ir.errors import WeightError

VALUE = torch.float8_e4m3fn
LARGEST = 448.0
STRETCH = (1.0, 1.125, 1.25, 1.5, 1.75)
"""Scales tried: within an octave they lay the mantissa's steps elsewhere; the least error wins."""


@dataclass(frozen=True)
class Fp8(Grouped):
    """value = e4m3 · scale, one fp16 scale per row and `group_size` columns of K (0: per row).

    A group of zeros has scale 1 and no NaN is ever stored. Values are kept as bytes, which no cast
    of a module's floats changes.
    """

    group_size: int = 0
    bits: ClassVar[int] = 8
    symmetric: ClassVar[bool] = True
    example: ClassVar[str] = "fp8g128"

    def __str__(self) -> str:
        return "fp8" + self.suffix

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("values", "scales")

    @classmethod
    def parse(cls, token: str) -> Fp8 | None:
        found = re.fullmatch(r"fp8(?:g(\d{1,5}))?", token)
        return cls(cls.size_in(token, found[1])) if found else None

    def fit(self, weight: Tensor) -> Grid:
        n, k = weight.shape
        if not n * k:
            return Grid(weight.new_ones((n, self.groups(k)), dtype=torch.float32))
        blocks = self.blocks(weight)
        least = blocks.abs().amax(-1) / LARGEST
        best, error = torch.ones_like(least), torch.full_like(least, torch.inf)
        for stretch in STRETCH:
            scales = fp16_scales(least * stretch)
            wide = Grid(scales[..., None])
            got = (self.decode(self.encode(blocks, wide), wide) - blocks).square_().sum(-1)
            best = torch.where(got < error, scales, best)
            error = torch.minimum(got, error)
        return Grid(best)

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """float32 numbers that e4m3 holds; beyond its range they become the largest (never NaN)."""
        assert grid.scales is not None
        codes = (weight.float() / grid.scales).clamp_(-LARGEST, LARGEST)
        if bool(codes.isnan().any()):
            raise WeightError("the weight holds NaN: 'fp8' stores finite values only")
        return codes.to(VALUE).float().add_(0.0)  # −0 becomes 0

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        assert grid.scales is not None
        return (codes * grid.scales).add_(0.0)

    def write(self, codes: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        assert grid.scales is not None
        values = codes.reshape(-1).to(VALUE).view(torch.uint8)
        return values.clone(), grid.scales.to(SCALE).contiguous()

    def read(self, buffers: tuple[Tensor, ...], count: int, n: int, k: int) -> tuple[Tensor, Grid]:
        codes = buffers[0][:count].view(VALUE).float()
        return codes, Grid(buffers[1].float().view(n, self.groups(k)))

    def value_bits(self, n: int, k: int, count: int, itemsize: int) -> int:
        return count * 8 + n * self.groups(k) * 8 * SCALE.itemsize
