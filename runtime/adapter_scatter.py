"""Sparse deltas in weights stored as floats: values change places with those of the weight.

What the weight held is kept, never recomputed, so the base comes back bit for bit, and a delta that
was on before is ready to be put in again. A position costs one read and one write of memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from sparsefx.codegen import native
from sparsefx.runtime.adapter_files import Delta
from sparsefx.runtime.adapter_modules import Slot, floats_of

KEPT = 8
"""Mixtures whose values stay ready."""
Mixture = tuple[tuple[str, float], ...]


@dataclass
class Change:
    """`values` belong at `positions` of a weight, or, while the delta is on, did before."""

    positions: Tensor
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
        if found is None or any(c.edits != self._edits(n, slots[n]) for n, c in found.items()):
            found = self._made(slots, deltas())
        self._swap(found, slots)
        self.ready[mixture] = self.on = found
        if len(self.ready) > KEPT:
            self.ready.popitem(last=False)

    def _swap(self, changes: Mapping[str, Change], slots: Mapping[str, Slot]) -> None:
        for name, change in changes.items():
            weight = floats_of(slots[name])
            assert weight is not None
            edits = self._edits(name, slots[name])
            swap(weight, change)
            self.seen[name] = (0 if weight.is_inference() else weight._version), edits

    def _edits(self, name: str, slot: Slot) -> int:
        """How often others have edited the weight, as far as torch counts."""
        weight = floats_of(slot)
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
                at = positions.to(weight.device)
                sums = gather(weight, at).float() + values.to(weight.device)
                edits = self._edits(name, slots[name])
                made[name] = Change(at, sums.to(weight.dtype), edits)
        return made


@lru_cache(maxsize=1)
def _engine() -> tuple[Any, Any] | None:
    """`sfx_swap` and `sfx_gather` of the CPU engine."""
    engine = native.engine()
    if engine is None or not hasattr(engine._lib, "sfx_swap"):
        return None
    found = engine._lib.sfx_swap, engine._lib.sfx_gather
    for function in found:
        function.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int32]
        function.restype = c_int32
    return found


def _call(which: int, weight: Tensor, values: Tensor, positions: Tensor) -> bool:
    """Whether the engine did it: plain CPU tensors of 2 or 4 bytes an element."""
    functions, size = _engine(), weight.element_size()
    if functions is None or not weight.is_cpu or size not in (2, 4):
        return False
    pointers = (weight.data_ptr(), values.data_ptr(), positions.data_ptr())
    functions[which](*pointers, len(positions), size)
    return True


def swap(weight: Tensor, change: Change) -> None:
    """Let change.values and what `weight` holds at change.positions change places, exactly."""
    values = change.values
    if values.dtype is not weight.dtype or values.device != weight.device:
        change.values = values.to(weight)  # the model was moved or cast while it was on
        change.positions = change.positions.to(weight.device)
    if _call(0, weight, change.values, change.positions):
        if not weight.is_inference():
            increment_version(weight)
        return
    flat = weight.detach().view(-1)
    held = flat[change.positions]
    flat.index_copy_(0, change.positions, change.values)
    change.values.copy_(held)


def gather(weight: Tensor, positions: Tensor) -> Tensor:
    """The values of `weight` at flat positions."""
    values = weight.detach().new_empty(len(positions))
    if _call(1, weight, values, positions):
        return values
    return weight.detach().view(-1)[positions]
