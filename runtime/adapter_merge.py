"""Merge an adapter into the weights for good (LoQT, arXiv 2405.16528)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsefx.codegen.prepared import forget
from sparsefx.ir.errors import AdapterError
from sparsefx.runtime.adapter_files import some
from sparsefx.runtime.adapter_match import shared
from sparsefx.runtime.adapter_modules import Slot, sizes
from sparsefx.runtime.modules import SparseLinear

if TYPE_CHECKING:
    from sparsefx.runtime.adapters import Adapter, Adapters


@torch.no_grad()
def merge_into(owner: Adapters, adapter: Adapter, strength: float) -> dict[str, float]:
    """Add strength · `adapter` to the weights; the relative error by module, 0 where exact.

    One module at a time, so no second copy of the model is held. Packed weights are pruned by
    magnitude and rounded anew, in the format they have. Raises AdapterError, nothing changed, for a
    weight that several modules share.
    """
    strengths = owner._strengths({adapter.name: strength})
    names = {m for part in strengths for m in owner[part].modules}
    reasons = {name: shared(owner.model, name, owner.slots[name]) for name in names}
    if bad := [f"{name} {why}" for name, why in reasons.items() if why]:
        raise AdapterError(f"{adapter.name!r} cannot be merged: {some(bad)}")
    owner.rows(None)
    owner.set(None)
    return {
        name: _put(owner.slots[name], _change(owner, name, strengths))
        for name in owner.slots if name in names
    }  # fmt: skip


def _change(owner: Adapters, name: str, strengths: dict[str, float]) -> Tensor:
    """What the adapters add to the weight of this module, (N, K) float32."""
    slot = owner.slots[name]
    n, k = sizes(slot)
    total = torch.zeros(n, k, device=slot.adapter_scale.device)
    for part, strength in strengths.items():
        if name not in owner[part].modules:
            continue
        if ranks := owner._ranks.get(part):
            index = torch.tensor(ranks, device=total.device) + slot.base_rank
            up, down = slot.adapter_up[:, index].float(), slot.adapter_down[index].float()
            total.addmm_(up, down, alpha=strength)
        else:
            positions, values = owner._deltas[part][name]
            total.view(-1).index_add_(0, positions, values, alpha=strength)
    return total


def _put(slot: Slot, change: Tensor) -> float:
    """Add `change` to the stored weight; ‖stored − exact‖ / ‖exact‖."""
    if isinstance(slot, SparseLinear):
        exact = slot.packed.unpack(torch.float32) + change
        packed = slot.packed.format.pack(exact)
        for key, new in zip(slot.keys, packed.buffers, strict=True):
            old: Any = slot._buffers[key]
            if (old.shape, old.dtype) == (new.shape, new.dtype):
                old.copy_(new)
            else:
                slot._buffers[key] = new
        forget(slot.buffers())
        now = packed.unpack(torch.float32)
    else:
        weight: Any = slot.weight
        exact = weight.detach().float() + change
        now = weight.detach().copy_(exact).float()
    size = float(exact.norm())
    return float((now - exact).norm()) / size if size else 0.0
