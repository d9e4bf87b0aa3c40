"""`n:m`: exactly n stored positions in every run of m along K (2:4 is NVIDIA's)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefx.ir.bits import pack_bits, unpack_bits
from sparsefx.ir.errors import SpecError
from sparsefx.ir.layouts.base import Layout


@dataclass(frozen=True)
class NM(Layout):
    """The index holds n positions of ceil(log2 m) bits per run, or m mask bits where that is less.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378.
    """

    n: int
    m: int
    example: ClassVar[str] = "2:4"

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= 256:
            raise SpecError(f"layout '{self}': n:m needs 1 <= n < m <= 256, e.g. '2:4' or '1:16'")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, token: str) -> NM | None:
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", token)
        return cls(int(found[1]), int(found[2])) if found else None

    @property
    def position_bits(self) -> int:
        return (self.m - 1).bit_length()

    @property
    def as_mask(self) -> bool:
        return self.m <= self.n * self.position_bits

    def rejects(self, n: int, k: int) -> str | None:
        if k % self.m:
            return f"K={k} is not a multiple of m={self.m}; use 'bitmap' or 'tile' there"
        return None

    def select(self, scores: Tensor) -> Tensor:
        runs = scores.reshape(scores.shape[0], scores.shape[1] // self.m, self.m)
        best = runs.topk(self.n, dim=-1).indices
        keep = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, best, True)
        return keep.view_as(scores)

    def violation(self, mask: Tensor) -> str | None:
        counts = mask.reshape(mask.shape[0], mask.shape[1] // self.m, self.m).sum(-1)
        worst = int(counts.max()) if counts.numel() else 0
        if worst > self.n:
            row, run = divmod(int(counts.argmax()), counts.shape[1])
            return f"row {row}, columns {run * self.m}…{run * self.m + self.m - 1} keep {worst}"
        return None

    def index(self, mask: Tensor) -> tuple[Tensor, ...]:
        runs = mask.reshape(-1, self.m)
        order = runs.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        first = order[:, : self.n].sort(dim=-1).values
        if not self.as_mask:
            return (pack_bits(first, self.position_bits),)
        full = torch.zeros_like(runs).scatter_(-1, first, True)
        return (pack_bits(full, 1),)

    def mask(self, index: tuple[Tensor, ...], n: int, k: int) -> Tensor | None:
        if self.as_mask:
            return unpack_bits(index[0], 1, n * k).view(torch.bool).view(n, k)
        runs = n * k // self.m
        where = unpack_bits(index[0], self.position_bits, runs * self.n).view(runs, self.n)
        keep = torch.zeros(runs, self.m, dtype=torch.bool, device=index[0].device)
        return keep.scatter_(-1, where.long(), True).view(n, k)

    def index_bits(self, n: int, k: int) -> int:
        per_run = self.m if self.as_mask else self.n * self.position_bits
        return n * k // self.m * per_run

    @property
    def step(self) -> int:
        return self.m
