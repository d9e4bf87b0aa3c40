"""`dense`: every position is stored, nothing is indexed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefx.ir.layouts.base import Layout


@dataclass(frozen=True)
class Dense(Layout):
    """All of the weight."""

    example: ClassVar[str] = "dense"
    buffers: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        return "dense"

    @classmethod
    def parse(cls, token: str) -> Dense | None:
        return cls() if token == "dense" else None

    def rejects(self, n: int, k: int) -> str | None:
        return None

    def select(self, scores: Tensor) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)

    def violation(self, mask: Tensor) -> str | None:
        return None

    def index(self, mask: Tensor) -> tuple[Tensor, ...]:
        return ()

    def mask(self, index: tuple[Tensor, ...], n: int, k: int) -> Tensor | None:
        return None

    def index_bits(self, n: int, k: int) -> int:
        return 0

    @property
    def step(self) -> int:
        return 1
