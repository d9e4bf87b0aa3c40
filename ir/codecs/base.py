"""What every codec answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.ir.errors import SpecError, WeightError

SCALE = torch.float16
"""How scales are stored."""


@dataclass(frozen=True)
class Grid:
    """The values a codec can represent, per row and group of K.

    `scales` and `zero_points` are float32 of shape (N, groups), None where the codec has none.
    """

    scales: Tensor | None = None
    zero_points: Tensor | None = None

    def columns(self, start: int, stop: int, group_size: int) -> Grid:
        """The grid of columns start…stop, one entry per column: shape (N, stop - start)."""
        if self.scales is None:
            return self
        first, last = start // group_size, -(-stop // group_size)
        offset = start - first * group_size

        def spread(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            wide = t[:, first:last].repeat_interleave(group_size, 1)
            return wide[:, offset : offset + stop - start]

        return Grid(spread(self.scales), spread(self.zero_points))


class Codec(ABC):
    """How stored values are written. Subclasses are frozen dataclasses with a text form."""

    example: ClassVar[str]
    """A valid token, shown when a spec is misspelt."""

    @property
    @abstractmethod
    def buffers(self) -> tuple[str, ...]:
        """Names of the buffers that `write` returns."""

    @classmethod
    @abstractmethod
    def parse(cls, token: str) -> Codec | None:
        """The codec this token spells, None when it is another's."""

    @abstractmethod
    def group(self, k: int) -> int:
        """Columns that share one scale in a weight of K columns (K where there is none)."""

    @abstractmethod
    def fit(self, weight: Tensor) -> Grid:
        """The grid with the least squared error per group of `weight` (N, K); zeros cost nothing.

        Raises WeightError when a scale leaves the range of its stored type.
        """

    @abstractmethod
    def encode(self, weight: Tensor, grid: Grid) -> Tensor:
        """Codes of `weight`; `grid` is per column (`Grid.columns`)."""

    @abstractmethod
    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Values of codes, exactly as they will be multiplied; inverts `encode` on its range."""

    def store_scales(self, scales: Tensor, old: Tensor) -> Tensor:
        """`scales` as fp16 stores them; `old` ones where it cannot."""
        out = scales.to(SCALE).float()
        return torch.where(out.isfinite() & (out != 0), out, old)

    @abstractmethod
    def write(self, codes: Tensor, grid: Grid) -> tuple[Tensor, ...]:
        """Buffers of the stored codes (flat, in order) and the whole grid."""

    @abstractmethod
    def read(self, buffers: tuple[Tensor, ...], count: int, n: int, k: int) -> tuple[Tensor, Grid]:
        """Codes (count,) and grid; inverse of `write`."""

    @abstractmethod
    def value_bits(self, n: int, k: int, count: int, itemsize: int) -> int:
        """Bits that `count` stored values and the grid need; `itemsize` of the dense weight."""


class Grouped(Codec):
    """A codec with one fp16 scale per row and `group_size` columns of K (0: per row).

    Groups run over the weight's own columns, stored or not; the last one may be shorter.
    """

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size and not 8 <= self.group_size <= 65536:
            raise SpecError(f"codec '{self}': group_size must be 8 to 65536, e.g. '…g128'")

    @property
    def suffix(self) -> str:
        """How a token ends: "g128", "" for one scale per row."""
        return f"g{self.group_size}" if self.group_size else ""

    @staticmethod
    def size_in(token: str, digits: str | None) -> int:
        """The group_size that these digits of `token` spell."""
        if digits and int(digits) == 0:
            raise SpecError(f"codec '{token}': group_size 0; leave out 'g0' for one scale per row")
        return int(digits or 0)

    def group(self, k: int) -> int:
        return self.group_size or max(k, 1)

    def groups(self, k: int) -> int:
        return -(-k // self.group(k))

    def blocks(self, weight: Tensor) -> Tensor:
        """`weight` (N, K) as float32 (N, groups, columns of a group), zeros after the last."""
        n, k = weight.shape
        size, count = self.group(k), self.groups(k)
        return F.pad(weight.float(), (0, count * size - k)).view(n, count, size)


NEGLIGIBLE = 2.0**-16
"""Scales below this share of a weight's greatest are of rows that training left dead: all they hold
is less than a hundredth of what rounding one other weight to 8 bits loses."""


LEAST = 2.0**-24
"""The least fp16 above 0."""


def fp16_scales(scales: Tensor) -> Tensor:
    """`scales` as fp16 stores them, in float32; 1, so that codes are 0, for 0 and what is
    NEGLIGIBLE and no fp16; LEAST for others that are less, beside one of 16 LEAST: it rounds the
    weight no worse than that one by a factor of 16. Raises WeightError beyond fp16's range."""
    size = scales.abs()
    most = float(size.amax()) if size.numel() else 0.0
    lost = scales.to(SCALE) == 0
    dead = lost & (size <= NEGLIGIBLE * most)
    low = lost & ~dead & (most >= 16 * LEAST)
    out = torch.where(low, torch.copysign(torch.full_like(scales, LEAST), scales), scales)
    out = torch.where(dead, 1.0, out).to(SCALE).float()
    if bool((out == 0).any()) or not bool(torch.isfinite(out).all()):
        worst = scales[(out == 0) | ~torch.isfinite(out)].flatten()[0]
        raise WeightError(
            f"a scale of {float(worst):.3g} leaves the range of fp16 (6e-8 … 65504); "
            "rescale the weight or use 'bf16' or 'fp32'"
        )
    return out
