"""A branch's ranks in use, packed for the CPU engine: a rank whose scale is 0 costs nothing.

Adapters occupy ranks of one padded branch and are switched by editing its scale in place, so the
sets of ranks that were in use before are kept: going back to one packs nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import string_at
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefx.codegen import native

SETS = 64
"""Sets of ranks, and vectors of scales, that one branch keeps."""
NOTHING = torch.empty(0)
REST = struct.Struct("PPPPPPP").pack
"""What follows bias in `native.Call`: multiply, residual, down, up, branch_scale, then 2 more."""
PLAIN = REST(*[0] * 7)


@dataclass(frozen=True)
class Active:
    """down (a, K) and up (N, a) as the engine holds them and the float32 scale (a,) of the a ranks
    in use; `pair` None where none is."""

    pair: tuple[native.Weight, native.Weight] | None
    scale: Tensor
    rest: bytes = PLAIN
    """The end of a call that adds this branch; valid while the object lives."""


class Ranks:
    """What the engine holds of one branch, by the values of its scale."""

    def __init__(self, engine: native.Engine) -> None:
        self.engine = engine
        self.by_values: dict[bytes, Active] = {}
        self.pairs: dict[tuple[int, ...], tuple[native.Weight, native.Weight] | None] = {}
        self.last: tuple[Tensor | None, int, int, Active] = None, 0, 0, Active(None, NOTHING)
        """A scale, its version and place, and what was found for it: one object, for threads."""
        self.last_rows: tuple[Tensor | None, int, int, Any] = None, 0, 0, None
        """The same of scales by rows (`runtime.adapter_add_rows`)."""

    def active(self, branch: Sequence[Tensor]) -> Active:
        """The ranks of (down, up, scale) in use; `down` and `up` are the same at every call."""
        scale = branch[2]
        held, version, place, found = self.last
        if scale is held and scale._version == version and scale.data_ptr() == place:
            return found
        rank = branch[0].shape[0]
        plain = scale.dtype is torch.float32 and scale.shape == (rank,) and scale.is_contiguous()
        values = scale if plain else scale.detach().to(torch.float32).expand(rank).contiguous()
        found = self.of(string_at(values.data_ptr(), 4 * rank), branch)  # 10 times numpy's speed
        if not scale.is_inference():  # those count no edits
            self.last = scale, scale._version, scale.data_ptr(), found
        return found

    def of(self, key: bytes, branch: Sequence[Tensor]) -> Active:
        """Of (down, up, …), where the bytes of the float32 scale (rank,) are `key`."""
        return self.by_values.get(key) or self._make(key, branch)

    def _make(self, key: bytes, branch: Sequence[Tensor]) -> Active:
        values = torch.frombuffer(bytearray(key), dtype=torch.float32)
        ranks = tuple(i for i, value in enumerate(values.tolist()) if value)
        for kept in (self.by_values, self.pairs):
            if len(kept) >= SETS:
                kept.clear()
        used = torch.tensor(ranks, dtype=torch.int64)
        pair = self.pairs.get(ranks) or self._pack(branch, used)
        self.pairs[ranks] = pair
        scale = values[used]
        rest = PLAIN
        if pair is not None:
            rest = REST(0, 0, pair[0].handle, pair[1].handle, scale.data_ptr(), 0, 0)
        self.by_values[key] = active = Active(pair, scale, rest)
        return active

    def _pack(
        self, branch: Sequence[Tensor], used: Tensor
    ) -> tuple[native.Weight, native.Weight] | None:
        down, up = branch[:2]
        if not len(used):
            return None
        if len(used) < len(down):
            down, up = down[used], up[:, used]
        return native.branch_weights(self.engine, (down, up, used))[:2]
