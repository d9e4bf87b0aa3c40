"""Format = Layout × Codec (+ branch rank, + int8 activations): a frozen value with a text form.

`"tile16x1@50%+int4g128+r32+a8g128"` parses to a Format and prints back as the same text. Packing is
exact: `unpack(pack(W))` is the masked, quantised W bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsefx.ir.codecs import CODECS, Codec, Float, Grid
from sparsefx.ir.errors import SpecError, WeightError, nearest
from sparsefx.ir.layouts import LAYOUTS, Dense, Layout

ORDER = "[layout+]codec[+rRANK][+a8[gGROUP]]"


@dataclass(frozen=True)
class Format:
    """How one weight is stored and multiplied."""

    layout: Layout = Dense()
    codec: Codec = Float()
    rank: int = 0
    """Rank of the low-rank branch added to the product; 0 is none."""
    a8: bool = False
    """Activations are rounded to int8 before the product, with one scale per row and group."""
    a8_group: int = 0
    """Columns of K that share an activation scale (the last group may be shorter); 0 is the row."""

    def __post_init__(self) -> None:
        if self.a8_group and not self.a8:
            raise SpecError("a8_group is the group of int8 activations: it needs a8=True")
        if self.a8_group and not 8 <= self.a8_group <= 65536:
            raise SpecError(
                f"'a8g{self.a8_group}': the activation group must be 8 to 65536, e.g. 'a8g128'"
            )

    def __str__(self) -> str:
        parts = [str(self.layout), str(self.codec)]
        if isinstance(self.layout, Dense) and parts[1]:
            del parts[0]
        parts += [f"r{self.rank}"] * (self.rank > 0)
        if self.a8:
            parts.append(f"a8g{self.a8_group}" if self.a8_group else "a8")
        return "+".join(part for part in parts if part)

    @property
    def is_dense(self) -> bool:
        """Nothing is asked for: the weight stays as it is."""
        return self == Format()

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of the packed buffers, in the order the op takes them."""
        return self.layout.buffers + self.codec.buffers

    @property
    def float_activations(self) -> Format:
        """This Format without int8 activations."""
        return replace(self, a8=False, a8_group=0)

    @staticmethod
    def parse(text: str) -> Format:
        """The Format `text` spells. Raises SpecError naming the token and the nearest valid one."""
        return _parse(text)

    def rejects(self, n: int, k: int) -> str | None:
        """Why an (n, k) weight cannot be stored so, or None."""
        if self.rank > min(n, k):
            return f"rank {self.rank} is more than min(N, K) = {min(n, k)}; use a smaller '+r…'"
        return self.layout.rejects(n, k)

    def needed_bits(self, n: int, k: int, kept: int, itemsize: int) -> int:
        """Bits the stored form needs: index, `kept` values, scales and zero points."""
        return self.layout.index_bits(n, k) + self.codec.value_bits(n, k, kept, itemsize)

    def pack(self, weight: Tensor, mask: Tensor | None = None, grid: Grid | None = None) -> Packed:
        """Store `weight` (N, K): prune by magnitude unless `mask` is given, round to nearest unless
        `grid` is. Raises WeightError when shape, mask or values do not fit the format.
        """
        n, k = weight.shape
        if why := self.rejects(n, k):
            raise WeightError(f"format '{self}': {why}")
        if mask is None:
            mask = self.layout.select(weight.abs())
        elif why := self.layout.violation(mask):
            raise WeightError(f"format '{self}': the mask is not {self.layout}: {why}")
        kept = torch.where(mask, weight, 0)
        if grid is None:
            grid = self.codec.fit(kept)
        codes = self.codec.encode(kept, grid.columns(0, k, self.codec.group(k)))
        index = self.layout.index(mask)
        stored = self.layout.mask(index, n, k)
        flat = codes.reshape(-1) if stored is None else codes[stored]
        return Packed(self, n, k, index + self.codec.write(flat, grid))


@dataclass(frozen=True)
class Packed:
    """A stored weight: its Format, its dense shape (N, K) and the buffers that hold it."""

    format: Format
    n: int
    k: int
    buffers: tuple[Tensor, ...]

    def read(self) -> tuple[Tensor, Tensor | None, Grid]:
        """Stored codes (count,) in row-major order, the mask (N, K) or None, and the grid."""
        fmt, split = self.format, len(self.format.layout.buffers)
        mask = fmt.layout.mask(self.buffers[:split], self.n, self.k)
        count = self.n * self.k if mask is None else int(mask.count_nonzero())
        codes, grid = fmt.codec.read(self.buffers[split:], count, self.n, self.k)
        return codes, mask, grid

    def mask(self) -> Tensor | None:
        """Which positions (N, K) are stored; None stands for all."""
        split = len(self.format.layout.buffers)
        return self.format.layout.mask(self.buffers[:split], self.n, self.k)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense (N, K) weight that this stands for, rounded once to `dtype`."""
        codes, mask, grid = self.read()
        if mask is None:
            return self._decode(codes.view(self.n, self.k), grid).to(dtype)
        full = torch.zeros(self.n, self.k, dtype=codes.dtype, device=codes.device)
        values = self._decode(full.masked_scatter_(mask, codes), grid)
        if grid.zero_points is not None:
            values.mul_(mask).add_(0.0)
        return values.to(dtype)

    def _decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Values of (N, K) codes, a group at a time along a broadcast axis if groups are even."""
        group = self.format.codec.group(self.k)
        if grid.scales is None or self.k % group or not codes.numel():
            return self.format.codec.decode(codes, grid.columns(0, self.k, group))
        per_group = Grid(
            *(t if t is None else t[..., None] for t in (grid.scales, grid.zero_points))
        )
        shape = (self.n, self.k // group, group)
        return self.format.codec.decode(codes.view(shape), per_group).view(self.n, self.k)

    @property
    def stored_bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / max(self.n * self.k, 1)


def vocabulary() -> list[str]:
    """One example of every kind of token."""
    extra = ["tile1x16@50%", "int8", "uint4g128", "fp16", "fp32", "int3g128", "int2g64"]
    examples = [c.example for c in LAYOUTS] + [c.example for c in CODECS]
    return examples + extra + ["r32", "a8", "a8g128"]


@lru_cache(maxsize=4096)
def _parse(text: str) -> Format:
    fmt, seen = Format(), -1
    if len(text) > 200:
        raise SpecError(f"format text of {len(text)} characters; the longest valid one is shorter")
    for token in text.replace(" ", "").split("+"):
        part, value = _token(token, text)
        if part <= seen:
            raise SpecError(
                f"format '{text}': '{token}' is repeated or out of order; write {ORDER}"
            )
        seen = part
        fmt = replace(fmt, **value)
    return fmt


def _token(token: str, text: str) -> tuple[int, dict[str, Any]]:
    """Rank of the token's part in `ORDER`, and the field it sets."""
    for layout in LAYOUTS:
        if (found := layout.parse(token)) is not None:
            return 0, {"layout": found}
    for codec in CODECS:
        if token and (value := codec.parse(token)) is not None:
            return 1, {"codec": value}
    if rank := re.fullmatch(r"r(\d{1,5})", token):
        if int(rank[1]) == 0:
            raise SpecError(f"format '{text}': rank 0 is no branch; leave out 'r0'")
        return 2, {"rank": int(rank[1])}
    if a8 := re.fullmatch(r"a8(?:g(\d{1,5}))?", token):
        if a8[1] and int(a8[1]) == 0:
            raise SpecError(f"format '{text}': group 0; leave out 'g0' for one scale per row")
        return 3, {"a8": True, "a8_group": int(a8[1] or 0)}
    raise SpecError(f"format '{text}': unknown token '{token}'{nearest(token, vocabulary())}")
