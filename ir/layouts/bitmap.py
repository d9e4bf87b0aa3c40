"""`bitmap@P%`: any pattern, one bit per position."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsefx.ir.layouts.base import Layout
from sparsefx.ir.layouts.tile import SHARE, Tile, read_share, show_share


@dataclass(frozen=True)
class Bitmap(Tile):
    """A tile of one element."""

    rows: int = 1
    cols: int = 1
    share: float = 0.5
    example: ClassVar[str] = "bitmap@50%"

    def __str__(self) -> str:
        return f"bitmap{show_share(self.share)}"

    @classmethod
    def parse(cls, token: str) -> Layout | None:
        found = re.fullmatch("bitmap" + SHARE, token)
        return cls(share=read_share(token, found[1])) if found else None

    def _sums(self, values: Tensor) -> Tensor:
        return values

    def _expand(self, cells: Tensor, n: int, k: int) -> Tensor:
        return cells
