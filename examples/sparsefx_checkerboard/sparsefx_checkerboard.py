"""A layout and a graph pass that sparsefx finds through entry points."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefx.ir.bits import pack_bits, unpack_bits
from sparsefx.ir.errors import SpecError
from sparsefx.ir.layouts import Layout
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass


@dataclass(frozen=True)
class Checker(Layout):
    """Every second column is stored; one bit per row and run of `run` columns says which."""

    run: int
    example: ClassVar[str] = "checker16"

    def __post_init__(self) -> None:
        if not 2 <= self.run <= 4096 or self.run % 2:
            raise SpecError(f"layout '{self}': the run must be even, 2 to 4096")

    def __str__(self) -> str:
        return f"checker{self.run}"

    @classmethod
    def parse(cls, token: str) -> Checker | None:
        found = re.fullmatch(r"checker(\d{1,4})", token)
        return cls(int(found[1])) if found else None

    def rejects(self, n: int, k: int) -> str | None:
        return f"K={k} is not a multiple of {self.run}" if k % self.run else None

    def select(self, scores: Tensor) -> Tensor:
        n, k = scores.shape
        pairs = scores.reshape(n, k // self.run, self.run // 2, 2)
        odd = pairs.sum(2).argmax(-1)
        return self._mask(odd, n, k)

    def violation(self, mask: Tensor) -> str | None:
        same = torch.equal(mask, self.mask(self.index(mask), *mask.shape))
        return None if same else "it is not every second column of each run"

    def index(self, mask: Tensor) -> tuple[Tensor, ...]:
        n, k = mask.shape
        return (pack_bits(mask.reshape(n, k // self.run, self.run)[:, :, 1], 1),)

    def mask(self, index: tuple[Tensor, ...], n: int, k: int) -> Tensor:
        odd = unpack_bits(index[0], 1, n * k // self.run)
        return self._mask(odd.view(n, k // self.run), n, k)

    def _mask(self, odd: Tensor, n: int, k: int) -> Tensor:
        column = torch.arange(self.run, device=odd.device) % 2
        return (odd[:, :, None] == column).view(n, k)

    def index_bits(self, n: int, k: int) -> int:
        return n * k // self.run

    @property
    def step(self) -> int:
        return self.run


@graph_pass(never_slower=True)
def double_negation(traced: Traced) -> bool:
    """-(-x) is x."""
    negative = (operator.neg, torch.neg, torch.ops.aten.neg.default)
    changed = False
    for node in traced.graph.nodes:
        inner = node.args[0] if node.target in negative else None
        if isinstance(inner, torch.fx.Node) and inner.target in negative:
            node.replace_all_uses_with(inner.args[0])
            changed = True
    return changed
