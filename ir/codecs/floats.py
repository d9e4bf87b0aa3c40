"""`fp32`, `fp16`, `bf16`: values as they are; no token at all keeps the weight's own dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefx.ir.codecs.base import Codec, Grid
from sparsefx.ir.errors import WeightError

DTYPES = {"": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Float(Codec):
    """Values rounded to `name`'s dtype; the empty name stores them unrounded."""

    name: str = ""
    example: ClassVar[str] = "bf16"

    def __str__(self) -> str:
        return self.name

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("values",)

    @classmethod
    def parse(cls, token: str) -> Float | None:
        return cls(token) if token in DTYPES else None

    def group(self, k: int) -> int:
        return max(k, 1)

    def fit(self, weight: Tensor) -> Grid:
        return Grid()

    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        codes = weight.to(DTYPES[self.name] or weight.dtype)
        if not torch.isfinite(codes).all():
            raise WeightError(f"a value overflows {self.name}; use 'bf16' or 'fp32'")
        return codes

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        return codes

    def write(self, codes: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        return (codes.reshape(-1).clone(),)

    def read(self, buffers: tuple[Tensor, ...], count: int, n: int, k: int) -> tuple[Tensor, Grid]:
        return buffers[0][:count], Grid()

    def value_bits(self, n: int, k: int, count: int, itemsize: int) -> int:
        dtype = DTYPES[self.name]
        return count * 8 * (dtype.itemsize if dtype else itemsize)
