"""Modules with a slot for adapters: `SparseLinear`, `SparseConv1x1` and `nn.Linear`.

A module gets its slot by a change of class, so one without costs nothing, and hooks, names and
`state_dict` stay. What a slot holds are buffers of fixed shape, edited in place: a switch is no
recompilation, no new address, and nothing is packed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.codecs import Float
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import Dense
from sparsefx.ir.op import LINEAR, add_branch
from sparsefx.runtime.adapter_add_rows import add_rows
from sparsefx.runtime.adapter_delta import add_delta, rows_of
from sparsefx.runtime.modules import SparseConv1x1, SparseLinear

BRANCH = ("adapter_down", "adapter_up", "adapter_scale")
DELTA = ("delta_starts", "delta_columns", "delta_values")


class Slot(nn.Module):
    """What every module with a slot has; R is the base branch's rank plus the declared maximum."""

    adapter_down: Tensor
    """(R, K); the first ranks are the base's own branch."""
    adapter_up: Tensor
    """(N, R)"""
    adapter_scale: Tensor
    """(R,) float32; 0 where no adapter is on."""
    adapter_rows: Tensor | None
    """(batch, R - base) float32 while every row has an adapter of its own, else None."""
    base_rank: int
    adapter_ranks: int
    """Ranks from 0 that any loaded adapter occupies, the base's included."""
    adapter_flags: bytearray
    """Of all slots of the model: 1 where an adapter that is on names the module."""
    adapter_index: int
    """The place of this slot in it."""

    def add_rows(self, y: Tensor, x: Tensor) -> Tensor:
        """y plus the branch of each row's adapter; x (batch, …, K) or (batch · t, K)."""
        b: Any = self._buffers
        out: Tensor = add_rows(y, x, b["adapter_down"], b["adapter_up"], b["adapter_rows"])
        return out


class AdaptedSparseLinear(SparseLinear, Slot):
    """A `SparseLinear` with a slot."""

    def forward(self, x: Tensor) -> Tensor:
        b = self._buffers
        # in this order: no guard on the flag
        on = torch.compiler.is_compiling() or self.adapter_flags[self.adapter_index]
        branch = self.branch if self.has_branch else []
        if on and b["adapter_rows"] is None:
            branch = [b["adapter_down"], b["adapter_up"], b["adapter_scale"]]  # type: ignore[list-item]
        y: Tensor = LINEAR(x, self.buffer_list, self.bias, branch, self.format, self.n)
        if b["adapter_rows"] is not None:
            y = self.add_rows(y, x)
        if b["delta_values"] is None:
            return y
        out: Tensor = add_delta(y, x, b["delta_starts"], b["delta_columns"], b["delta_values"])
        return out


class AdaptedSparseConv1x1(SparseConv1x1, AdaptedSparseLinear):
    """A `SparseConv1x1` with a slot: `super().forward` there is the linear's here."""


class AdaptedLinear(nn.Linear, Slot):
    """A dense linear with a slot; sparse deltas are written into its weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.adapter_rows is not None:
            return self.add_rows(y, x)
        if torch.compiler.is_compiling():
            return add_branch(y, x, [self.adapter_down, self.adapter_up, self.adapter_scale])
        if not self.adapter_flags[self.adapter_index]:
            return y
        end = self.adapter_ranks
        down, up = self.adapter_down[:end], self.adapter_up[:, :end]
        return add_branch(y, x, [down, up, self.adapter_scale[:end]])


KINDS: dict[type[nn.Module], type[Slot]] = {
    SparseLinear: AdaptedSparseLinear,
    SparseConv1x1: AdaptedSparseConv1x1,
    nn.Linear: AdaptedLinear,
}
"""Classes that can have a slot, exactly these: a subclass may compute something else."""


def sizes(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a module that has a slot or can have one."""
    if isinstance(module, SparseLinear):
        return module.n, module.k
    weight: Any = module.weight
    return int(weight.shape[0]), int(weight.shape[1])


def add_slot(module: nn.Module, ranks: int, density: float, dtype: torch.dtype) -> None:
    """Give `module`, of a class in KINDS, a slot of `ranks` and of `density` · N · K positions."""
    (n, k), own = sizes(module), list(getattr(module, "branch", []))
    place: Any = next(iter([*module.parameters(), *module.buffers()])).device
    total = ranks + (len(own[0]) if own else 0)
    made = [
        torch.zeros(total, k, dtype=dtype, device=place),
        torch.zeros(n, total, dtype=dtype, device=place),
        torch.zeros(total, device=place),
    ]
    if own:
        first = len(own[0])
        for new, old in zip(
            (made[0][:first], made[1][:, :first], made[2][:first]), own, strict=True
        ):
            new.copy_(old.detach())
    count = 0 if floats_of(module) is not None else int(density * n * k)
    delta: Sequence[Tensor | None] = (None, None, None)
    if count:
        delta = (
            torch.zeros(n + 1, dtype=torch.int32, device=place),
            torch.zeros(count, dtype=torch.int32, device=place),
            torch.zeros(count, device=place),
        )
    module.__class__ = KINDS[type(module)]
    for key, tensor in zip((*BRANCH, *DELTA), (*made, *delta), strict=True):
        module.register_buffer(key, tensor, persistent=False)
    module.register_buffer("adapter_rows", None, persistent=False)
    slot: Any = module
    slot.base_rank = slot.adapter_ranks = total - ranks
    slot.adapter_flags, slot.adapter_index = bytearray(1), 0


def floats_of(module: nn.Module) -> Tensor | None:
    """The tensor of floats, N · K side by side, that holds the weight; None where it is packed."""
    if not isinstance(module, SparseLinear):
        weight = module._parameters["weight"]
        return weight if weight is not None and weight.is_contiguous() else None
    fmt = Format.parse(module.format)
    if isinstance(fmt.layout, Dense) and isinstance(fmt.codec, Float) and not fmt.a8:
        return module.buffer_list[0]
    return None


def put_beside(slot: Slot, delta: tuple[Tensor, Tensor] | None) -> None:
    """The positions and values of a delta, or none, into the room that a packed weight has."""
    buffers: Any = slot._buffers
    if delta is None:
        buffers["delta_starts"].zero_()
        buffers["delta_values"].zero_()
        return
    starts, columns = rows_of(delta[0], *sizes(slot))
    buffers["delta_starts"].copy_(starts)
    buffers["delta_columns"][: len(columns)] = columns
    buffers["delta_values"].zero_()[: len(columns)] = delta[1]
