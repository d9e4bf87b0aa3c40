"""`tileRxC@P%`: whole R×C tiles are stored or dropped; the kept count may differ per tile row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.ir.bits import pack_bits, unpack_bits
from sparsefx.ir.errors import SpecError
from sparsefx.ir.layouts.base import Layout

SHARE = r"(?:@(\d{1,2}(?:\.\d{1,4})?)%)?"


def read_share(token: str, percent: str | None) -> float:
    """The share removed, 0 < share < 1. Raises SpecError when it is missing or zero."""
    share = float(percent) / 100 if percent else 0.0
    if share == 0.0:
        raise SpecError(f"layout '{token}' does not say how much to remove; write '{token}@50%'")
    return share


def show_share(share: float) -> str:
    return f"@{share * 100:.4f}".rstrip("0").rstrip(".") + "%"


@dataclass(frozen=True)
class Tile(Layout):
    """One bit per tile. `tile1x16` is GQSA's group (arXiv 2412.17560), `tile16x1` a column shared
    by 16 outputs, `tile64x64` a block. Tiles at a ragged edge are cut, not padded.
    """

    rows: int
    cols: int
    share: float
    example: ClassVar[str] = "tile16x1@50%"

    def __post_init__(self) -> None:
        if not (1 <= self.rows <= 4096 and 1 <= self.cols <= 4096):
            raise SpecError(f"layout '{self}': tile sides must be between 1 and 4096")

    def __str__(self) -> str:
        return f"tile{self.rows}x{self.cols}{show_share(self.share)}"

    @classmethod
    def parse(cls, token: str) -> Layout | None:
        found = re.fullmatch(r"tile(\d{1,4})x(\d{1,4})" + SHARE, token)
        if not found:
            return None
        return cls(int(found[1]), int(found[2]), read_share(token, found[3]))

    def _cells(self, n: int, k: int) -> tuple[int, int]:
        return -(-n // self.rows), -(-k // self.cols)

    def _expand(self, cells: Tensor, n: int, k: int) -> Tensor:
        wide = cells.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)
        return wide[:n, :k]

    def _sums(self, values: Tensor) -> Tensor:
        n, k = values.shape
        tile_rows, tile_cols = self._cells(n, k)
        padded = F.pad(values, (0, tile_cols * self.cols - k, 0, tile_rows * self.rows - n))
        return padded.view(tile_rows, self.rows, tile_cols, self.cols).sum((1, 3))

    def rejects(self, n: int, k: int) -> str | None:
        return None

    def select(self, scores: Tensor) -> Tensor:
        mean = self._sums(scores.float()) / self._sums(torch.ones_like(scores, dtype=torch.float32))
        keep = mean.numel() - int(mean.numel() * self.share)
        cells = torch.zeros(mean.numel(), dtype=torch.bool, device=scores.device)
        cells[mean.flatten().topk(keep, sorted=False).indices] = True
        return self._expand(cells.view_as(mean), *scores.shape)

    def violation(self, mask: Tensor) -> str | None:
        return None

    def index(self, mask: Tensor) -> tuple[Tensor, ...]:
        return (pack_bits(self._sums(mask.float()) > 0, 1),)

    def mask(self, index: tuple[Tensor, ...], n: int, k: int) -> Tensor | None:
        tile_rows, tile_cols = self._cells(n, k)
        cells = unpack_bits(index[0], 1, tile_rows * tile_cols).view(torch.bool)
        return self._expand(cells.view(tile_rows, tile_cols), n, k)

    def index_bits(self, n: int, k: int) -> int:
        tile_rows, tile_cols = self._cells(n, k)
        return tile_rows * tile_cols

    @property
    def step(self) -> int:
        return self.cols
