"""An adapter of its own for each row of a batch (S-LoRA, arXiv 2311.03285).

Each row keeps its own ranks by a (batch, ranks) tensor of scales, edited in place: other ids are
no other shapes. `adapter_add_rows` is the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsefx.runtime.adapter_modules import Slot

if TYPE_CHECKING:
    from sparsefx.runtime.adapters import Adapters

Strengths = Mapping[str, float]


def write_rows(
    slots: Mapping[str, Slot],
    rows: Sequence[Strengths],
    targets: Mapping[str, set[str]],
    vector: Callable[[Strengths], Tensor],
) -> None:
    """Fill every slot's `adapter_rows`; `targets` are the modules of each adapter, `vector` the
    (ranks,) scales of strengths. One tensor is made for all modules that the same adapters name."""
    made: dict[Any, Tensor] = {}
    old, new = [], []
    for path, slot in slots.items():
        names = frozenset(name for name, modules in targets.items() if path in modules)
        key = names, slot.adapter_scale.device
        if key not in made:
            mine = [vector({n: s for n, s in row.items() if n in names}) for row in rows]
            made[key] = torch.stack(mine).to(key[1])
        now = slot._buffers["adapter_rows"]
        if now is None or now.shape != made[key].shape:
            slot._buffers["adapter_rows"] = made[key].clone()
        else:
            old.append(now)
            new.append(made[key])
    if old:
        with torch.no_grad():
            torch._foreach_copy_(old, new)


class Rows:
    """Ends `Adapters.rows` where a `with` ends."""

    def __init__(self, owner: Adapters) -> None:
        self.owner = owner

    def __enter__(self) -> Adapters:
        return self.owner

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.owner.rows(None)
