"""Sparse deltas in weights stored as floats: values change places with those of the weight.

What the weight held is kept, never recomputed, so the base comes back bit for bit, and a delta that
was on before is ready to be put in again. A position costs one read and one write of memory.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_char_p, c_int64
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsefx.codegen import native
from sparsefx.runtime.adapter_files import Delta
from sparsefx.runtime.adapter_modules import Slot, floats_of

KEPT = 8
"""Mixtures whose values stay ready."""
CHANGE = struct.Struct("PPPqq").pack
"""`sfx_change` of runtime/native/scatter.cpp."""
Mixture = tuple[tuple[str, float], ...]


@dataclass
class Change:
    """`values` belong at `positions` of a weight, or, while the delta is on, did before."""

    positions: Tensor
    """int32 where the weight has less than 2³¹ elements: what is read per position counts."""
    values: Tensor
    edits: int
    """How often the weight had been edited by others when this was made of it."""


class Written:
    """The deltas that are written into the weights of some modules."""

    def __init__(self) -> None:
        self.on: dict[str, Change] = {}
        self.ready: OrderedDict[Mixture, dict[str, Change]] = OrderedDict()
        self.seen: dict[str, tuple[int, int]] = {}
        """Per module the weight's version after it was last written here, and edits by others."""

    def clear(self) -> None:
        """Forget mixtures: adapters are gone."""
        self.ready.clear()

    def put(self, mixture: Mixture, slots: Mapping[str, Slot], deltas: Callable[[], Delta]) -> None:
        """Take out what is on, and write the sums `deltas()` of `mixture` into the weights."""
        self._swap(self.on, slots)
        self.on = {}
        if not mixture:
            return
        found = self.ready.pop(mixture, None)
        if found is None or any(
            c.edits != self._edits(n, floats_of(slots[n])) for n, c in found.items()
        ):
            found = self._made(slots, deltas())
        self._swap(found, slots)
        self.ready[mixture] = self.on = found
        if len(self.ready) > KEPT:
            self.ready.popitem(last=False)

    def _swap(self, changes: Mapping[str, Change], slots: Mapping[str, Slot]) -> None:
        weights: list[Any] = [floats_of(slots[name]) for name in changes]
        edits = [self._edits(*pair) for pair in zip(changes, weights, strict=True)]
        swap([*zip(weights, changes.values(), strict=True)])
        for name, weight, count in zip(changes, weights, edits, strict=True):
            self.seen[name] = (0 if weight.is_inference() else weight._version), count

    def _edits(self, name: str, weight: Tensor | None) -> int:
        """How often others have edited the weight, as far as torch counts."""
        if weight is None or weight.is_inference():
            edits = self.seen.get(name, (0, 0))[1] + 1  # nothing counts: take it for edited
            self.seen[name] = 0, edits
            return edits
        now = weight._version
        version, edits = self.seen.get(name, (now, 0))
        if version != now:
            edits += 1
        self.seen[name] = now, edits
        return edits

    def _made(self, slots: Mapping[str, Slot], deltas: Delta) -> dict[str, Change]:
        made = {}
        for name, (positions, values) in deltas.items():
            weight = floats_of(slots[name])
            if weight is not None:
                kind = torch.int32 if weight.numel() < 1 << 31 else torch.int64
                at = positions.to(weight.device, kind)
                sums = gather(weight, at).float() + values.to(weight.device)
                edits = self._edits(name, weight)
                made[name] = Change(at, sums.to(weight.dtype), edits)
        return made


@lru_cache(maxsize=1)
def _engine() -> tuple[Any, Any] | None:
    """`sfx_swap_all` and `sfx_gather_all` of the CPU engine."""
    engine = native.engine()
    if engine is None:
        return None
    found = engine._lib.sfx_swap_all, engine._lib.sfx_gather_all
    for function in found:
        function.argtypes = [c_char_p, c_int64]
    return found


def _call(which: int, weights: Sequence[tuple[Tensor, Tensor, Tensor]]) -> bool:
    """Whether the engine did it: contiguous CPU tensors of 2 or 4 bytes an element."""
    functions = _engine()
    if functions is None or not all(
        w.is_cpu and w.element_size() in (2, 4) and p.dtype is torch.int32 for w, _, p in weights
    ):
        return False
    packed = [
        CHANGE(w.data_ptr(), v.data_ptr(), p.data_ptr(), p.shape[0], w.element_size())
        for w, v, p in weights
    ]
    functions[which](b"".join(packed), len(packed))
    return True


def swap(changes: Sequence[tuple[Tensor, Change]]) -> None:
    """Let change.values and what its weight holds at change.positions change places, exactly."""
    for weight, change in changes:
        if change.values.dtype is not weight.dtype or change.values.device != weight.device:
            change.values = change.values.to(weight)  # the model was moved or cast meanwhile
            change.positions = change.positions.to(weight.device)
    if _call(0, [(weight, c.values, c.positions) for weight, c in changes]):
        increment_version([weight for weight, _ in changes if not weight.is_inference()])
        return
    for weight, change in changes:
        flat, at = weight.detach().view(-1), change.positions.long()
        held = flat[at]
        flat.index_copy_(0, at, change.values)
        change.values.copy_(held)


def gather(weight: Tensor, positions: Tensor) -> Tensor:
    """The values of `weight` at flat positions."""
    values = weight.detach().new_empty(len(positions))
    if _call(1, [(weight, values, positions)]):
        return values
    return weight.detach().view(-1)[positions.long()]
