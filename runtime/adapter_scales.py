"""The scales of all slots as rows of one tensor: a switch is one write, however many layers.

Rows share a version counter with their table, so every row is seen to have changed. A copy of the
model, or one moved to another device, gets a table of its own at its next switch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefx.runtime.adapter_modules import Slot


@dataclass(frozen=True)
class Plan:
    """Which of some adapters name which slots."""

    groups: list[tuple[str, ...]]
    """Names of adapters; a slot belongs to one group."""
    group_of: Tensor
    """int64, per slot."""
    on: bytes
    """Per slot 1 where any of the adapters names it."""


class Scales:
    """Writes `adapter_scale` and the flag of every slot."""

    def __init__(self, slots: Mapping[str, Slot], ranks: int) -> None:
        paths: dict[int, tuple[Slot, set[str]]] = {}
        for path, slot in slots.items():
            paths.setdefault(id(slot), (slot, set()))[1].add(path)
        self.slots = [slot for slot, _ in paths.values()]
        self.paths = [names for _, names in paths.values()]
        self.ranks = ranks
        self.flags = bytearray(len(self.slots))
        self.plans: dict[frozenset[str], Plan] = {}
        self.rows: list[Tensor] = []
        """The `adapter_scale` of every slot as it was last written."""
        self.tables: list[tuple[Tensor, Tensor]] = []
        """Per device the adapters' part of its rows, and which slots they are of."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": [], "tables": []}  # copies of rows share no counter

    def write(
        self,
        names: Iterable[str],
        modules: Callable[[str], Iterable[str]],
        vector: Callable[[tuple[str, ...]], Tensor],
    ) -> None:
        """Turn on these adapters, which name `modules(name)`, with the scales (ranks,) that
        `vector` gives those of one slot."""
        wanted = frozenset(names)
        plan = self.plans.get(wanted) or self._plan(wanted, modules)
        current = [slot._buffers["adapter_scale"] for slot in self.slots]
        if len(current) != len(self.rows) or any(
            a is not b for a, b in zip(current, self.rows, strict=True)
        ):
            self._join()
        vectors = [vector(group) for group in plan.groups]
        for part, which in self.tables:
            if len(vectors) == 1:
                part.copy_(vectors[0])
            else:
                part.copy_(torch.stack(vectors)[plan.group_of[which]])
        self.flags[:] = plan.on

    def _plan(self, wanted: frozenset[str], modules: Callable[[str], Iterable[str]]) -> Plan:
        targets = {name: set(modules(name)) for name in wanted}
        groups: dict[tuple[str, ...], int] = {}
        of, on = [], bytearray()
        for paths in self.paths:
            mine = tuple(
                sorted(n for n, modules in targets.items() if not paths.isdisjoint(modules))
            )
            of.append(groups.setdefault(mine, len(groups)))
            on.append(bool(mine))
        self.plans[wanted] = plan = Plan(list(groups), torch.tensor(of), bytes(on))
        return plan

    def _join(self) -> None:
        """Let the scales of all slots be rows of one table per device, as they are."""
        first = max((slot.base_rank for slot in self.slots), default=0)
        places: dict[torch.device, list[int]] = {}
        for i, slot in enumerate(self.slots):
            places.setdefault(slot.adapter_scale.device, []).append(i)
        self.tables = []
        for device, indices in places.items():
            table = torch.zeros(len(indices), first + self.ranks, device=device)
            for row, i in zip(table, indices, strict=True):
                slot = self.slots[i]
                own = row[first - slot.base_rank :]
                own.copy_(slot.adapter_scale)
                slot._buffers["adapter_scale"] = own
                slot.adapter_flags, slot.adapter_index = self.flags, i
            self.tables.append((table[:, first:], torch.tensor(indices)))
        self.rows = [slot.adapter_scale for slot in self.slots]
