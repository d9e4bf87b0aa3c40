"""`sparsefx.adapters(model)`: LoRA and sparse adapters that switch at run time.

    adapters = sparsefx.adapters(model, max_rank=64)   # slots, once
    adapters.load("folder", "a"); adapters.load("delta.safetensors", "b")
    adapters.set({"a": 0.7, "b": 0.3}); adapters.set(None)

LoRA (S-LoRA, arXiv 2311.03285): every loaded adapter has ranks of its own in one padded branch per
module, alpha / r multiplied into B, so a switch edits one scale vector per module, in place. Ranks
whose scale is 0 are skipped by the CPU engine. Packed weights are never touched.

Sparse deltas (SHiRA, arXiv 2406.13175; composable sparse fine-tuning, arXiv 2110.07560): added to
weights that are stored as floats, where what was there is kept and put back; beside a packed weight
they are a product of their own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.ir.errors import AdapterError, nearest
from sparsefx.runtime.adapter_extract import Extracted, extract
from sparsefx.runtime.adapter_files import Delta, Lora, kind_of, open_adapter, read_delta, read_lora
from sparsefx.runtime.adapter_match import (
    adaptable,
    check_delta,
    check_lora,
    merged,
    no_room,
    renamed,
)
from sparsefx.runtime.adapter_merge import merge_into
from sparsefx.runtime.adapter_modules import (
    Slot,
    add_slot,
    floats_of,
    put_beside,
)
from sparsefx.runtime.adapter_rows import Rows, write_rows
from sparsefx.runtime.adapter_scales import Scales
from sparsefx.runtime.adapter_scatter import Written

DEFAULT_RANK = 64
ATTRIBUTE = "adapters"
KEY = "_sparsefx_adapters"


@dataclass(frozen=True)
class Adapter:
    """What is known of one loaded adapter."""

    name: str
    kind: str
    """lora, sparse, extracted (from a tuned checkpoint) or mix (of others, by `compose`)."""
    modules: tuple[str, ...] = ()
    rank: int = 0
    """Ranks it occupies in every slot."""
    positions: int = 0
    """Weights that a sparse delta changes."""
    energy: Mapping[str, float] = field(default_factory=dict)
    """Share of ‖tuned − base‖² that an extracted adapter keeps, per module."""
    left_out: tuple[str, ...] = ()
    """Tensors of a tuned checkpoint that differ from the base and are no linear's weight."""
    mix: Mapping[str, float] = field(default_factory=dict)


def adapters(
    model: nn.Module,
    max_rank: int | None = None,
    *,
    modules: Sequence[str] | None = None,
    max_density: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Adapters:
    """The adapters of `model`, always the same object; also `model.adapters` if that is free.

    `max_rank` declares slots, once: how many ranks all loaded LoRA may take together. `modules`
    (`*.q_proj`, a module or what is inside one) restricts slots, all linears have them otherwise;
    `max_density` is the share of positions that sparse deltas may change in packed weights; `dtype`
    is how LoRA are held. Without a declaration the first `load` makes slots of 64 ranks.
    Raises AdapterError when a second declaration differs.
    """
    root: Any = getattr(model, "_orig_mod", model)
    found = root.__dict__.get(KEY)
    if found is None:
        found = root.__dict__[KEY] = Adapters(root)
        if not hasattr(root, ATTRIBUTE):
            root.__dict__[ATTRIBUTE] = found
    if max_rank is not None:
        found.declare(max_rank, modules, max_density, dtype)
    return found  # type: ignore[no-any-return]


class Adapters:
    """What is loaded for one model and what is on. Iterating gives each `Adapter`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.slots: dict[str, Slot] = {}
        self.active: dict[str, float] = {}
        """Strengths as they were last set; names may be of mixes."""
        self._declared: tuple[Any, ...] | None = None
        self._loaded: dict[str, Adapter] = {}
        self._ranks: dict[str, list[int]] = {}
        self._deltas: dict[str, Delta] = {}
        self._free: list[int] = []
        self._scales: Scales | None = None
        self._written = Written()
        self._beside: set[str] = set()
        """Packed modules that have a delta beside them."""

    def declare(
        self, max_rank: int, modules: Sequence[str] | None, density: float, dtype: torch.dtype
    ) -> None:
        """Give modules their slots; see `adapters`."""
        asked = (max_rank, None if modules is None else tuple(modules), density, dtype)
        if self._declared is not None:
            if asked != self._declared:
                raise AdapterError(f"slots were declared as {self._declared}, now {asked}")
            return
        if max_rank < 1 or not 0 <= density <= 1 or not dtype.is_floating_point:
            raise AdapterError(f"max_rank, max_density and dtype cannot be {asked}")
        chosen = adaptable(self.model, modules)
        with torch.no_grad():
            for module in dict.fromkeys(chosen.values()):
                add_slot(module, max_rank, density, dtype)
        self.slots = {n: m for n, m in chosen.items() if isinstance(m, Slot)}
        self._scales = Scales(self.slots, max_rank)
        self._declared, self._free = asked, list(range(max_rank))

    # --- what is loaded ---------------------------------------------------------------------

    def __iter__(self) -> Iterator[Adapter]:
        return iter(list(self._loaded.values()))

    def __len__(self) -> int:
        return len(self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._loaded:
            raise AdapterError(f"no adapter {name!r} is loaded{nearest(str(name), self._loaded)}")
        return self._loaded[name]

    def __repr__(self) -> str:
        lines = [f"{len(self)} adapters, {len(self._free)} ranks free, on: {self.active or 'none'}"]
        for a in self:
            what = f"rank {a.rank}" if a.rank else f"{a.positions} positions"
            lines.append(
                f"  {a.name}: {a.kind}, {dict(a.mix) or what + f' in {len(a.modules)} modules'}"
            )
        return "\n".join(lines)

    def load(
        self,
        path: str | os.PathLike[str],
        name: str,
        *,
        alpha: float | None = None,
        rank: int | None = None,
        base: str | os.PathLike[str] | None = None,
    ) -> Adapter:
        """Load an adapter as `name`; it is not on before `set`.

        `path` is a PEFT LoRA folder or a safetensors file of a LoRA (`alpha` for files that do not
        say it), a sparse delta (`<weight>.indices`, `<weight>.values`), or a tuned checkpoint, of
        which a LoRA of `rank` is extracted from the difference to `base` (None: to what the model
        holds). Raises AdapterError, nothing changed, listing the keys that do not fit.
        """
        if not name or name in self._loaded:
            raise AdapterError(f"the name {name!r} is empty or taken; remove it first")
        if self._declared is None:
            self.declare(DEFAULT_RANK, None, 0.0, torch.float32)
        kind = kind_of(path)
        if kind == "sparse":
            deltas = renamed(self.model, read_delta(open_adapter(path)), self.slots)
            check_delta(self.model, deltas, self.slots)
            return self._add_delta(name, deltas)
        if kind == "lora":
            lora = renamed(self.model, read_lora(open_adapter(path), alpha), self.slots)
            return self._add_lora(name, lora, None)
        if rank is None:
            raise AdapterError(f"'{path}' is a whole checkpoint: say load(…, rank=16)")
        found = extract(path, base, rank, self.slots)
        return self._add_lora(name, found.lora, found)

    def _add_lora(self, name: str, lora: Lora, found: Extracted | None) -> Adapter:
        assert self._declared is not None
        dtype = self._declared[3]
        check_lora(lora, self.slots, dtype)
        rank = max((len(a) for a, _ in lora.values()), default=0)
        if rank > len(self._free):
            worst = [m for m, (a, _) in lora.items() if len(a) > len(self._free)]
            raise AdapterError(
                f"{name!r} has rank {rank} in {worst[:6]}, {len(self._free)} of max_rank="
                f"{self._declared[0]} are free: remove an adapter, or declare a larger max_rank"
            )
        mine, self._free = self._free[:rank], self._free[rank:]
        with torch.no_grad():
            for module, (a, b) in lora.items():
                slot = self.slots[module]
                down, up = slot.adapter_down, slot.adapter_up
                index = torch.tensor(mine[: len(a)], device=down.device) + slot.base_rank
                down.index_copy_(0, index, a.to(down))
                up.index_copy_(1, index, b.to(up))
        self._ranks[name] = mine
        energy, left = (found.energy, found.left_out) if found else ({}, ())
        kind = "extracted" if found else "lora"
        added = Adapter(name, kind, tuple(lora), rank, energy=energy, left_out=left)
        self._loaded[name] = added
        self._count_ranks()
        return added

    def _count_ranks(self) -> None:
        if self._scales is not None:
            self._scales.plans.clear()
        used = max((r for ranks in self._ranks.values() for r in ranks), default=-1) + 1
        for slot in self.slots.values():
            slot.adapter_ranks = slot.base_rank + used

    def _add_delta(self, name: str, deltas: Delta) -> Adapter:
        places = {module: self.slots[module].adapter_scale.device for module in deltas}
        self._deltas[name] = {
            module: (p.to(places[module]), v.to(places[module]))
            for module, (p, v) in deltas.items()
        }
        count = sum(len(p) for p, _ in deltas.values())
        added = self._loaded[name] = Adapter(name, "sparse", tuple(deltas), positions=count)
        return added

    def compose(self, name: str, mix: Mapping[str, float]) -> Adapter:
        """Name a sum of adapters, so that `set(name)` and `rows` can ask for it."""
        if not name or name in self._loaded:
            raise AdapterError(f"the name {name!r} is empty or taken; remove it first")
        self._strengths(mix)
        added = self._loaded[name] = Adapter(name, "mix", mix=dict(mix))
        return added

    def remove(self, name: str) -> None:
        """Forget an adapter; what was on without it stays on."""
        self[name]
        if users := [a.name for a in self if name in a.mix]:
            raise AdapterError(f"{name!r} is part of {users}; remove those first")
        if name in self.active:
            self.set({k: v for k, v in self.active.items() if k != name} or None)
        ranks = self._ranks.pop(name, [])
        with torch.no_grad():
            for module in self._loaded[name].modules if ranks else ():
                slot = self.slots[module]
                index = torch.tensor(ranks, device=slot.adapter_down.device) + slot.base_rank
                slot.adapter_down.index_fill_(0, index, 0)
                slot.adapter_up.index_fill_(1, index, 0)
        self._free = sorted([*self._free, *ranks])
        if self._deltas.pop(name, None) is not None:
            self._written.clear()
        del self._loaded[name]
        self._count_ranks()

    # --- what is on -------------------------------------------------------------------------

    def set(self, what: str | Mapping[str, float] | None) -> None:
        """Turn on exactly `what`: a name, names with strengths, or None for the base.

        Raises AdapterError, nothing changed, for names that are not loaded, strengths that are not
        finite, or sparse deltas that have no room together.
        """
        asked: dict[str, float] = (
            {} if what is None else {what: 1.0} if isinstance(what, str) else dict(what)
        )
        strengths = self._strengths(asked)
        with torch.no_grad():
            self._write_deltas({n: s for n, s in strengths.items() if n in self._deltas})
            self._write_scales({n: s for n, s in strengths.items() if n in self._ranks})
        self.active = asked

    def _strengths(self, asked: Mapping[str, float]) -> dict[str, float]:
        """Strength by loaded adapter, mixes taken apart, without zeros."""
        found: dict[str, float] = {}
        for name, strength in asked.items():
            if not isinstance(strength, (int, float)) or not math.isfinite(strength):
                raise AdapterError(f"the strength of {name!r} is {strength!r}, not a finite number")
            parts = self._strengths(self[name].mix) if self[name].mix else {name: 1.0}
            for part, share in parts.items():
                found[part] = found.get(part, 0.0) + share * strength
        return {name: strength for name, strength in found.items() if strength}

    def _write_scales(self, strengths: Mapping[str, float]) -> None:
        if self._scales is not None:
            self._scales.write(
                strengths,
                lambda name: self._loaded[name].modules,
                lambda names: self._vector({name: strengths[name] for name in names}),
            )

    def _vector(self, strengths: Mapping[str, float]) -> Tensor:
        """Scales of all declared ranks."""
        values = [0.0] * (0 if self._declared is None else self._declared[0])
        for name, strength in strengths.items():
            for index in self._ranks[name]:
                values[index] = strength
        return torch.tensor(values, dtype=torch.float32)

    # --- sparse deltas ----------------------------------------------------------------------

    def _mixed(self, strengths: Mapping[str, float]) -> Delta:
        """The sum of the deltas that are on, per module. Raises AdapterError without room."""
        parts: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
        for name, strength in strengths.items():
            for module, (positions, values) in self._deltas[name].items():
                parts.setdefault(module, []).append((positions, values, strength))
        found = {module: merged(several) for module, several in parts.items()}
        for module, (positions, _) in found.items():
            if why := no_room(self.slots[module], len(positions)):
                raise AdapterError(f"together the deltas do not fit: '{module}' {why}")
        return found

    def _write_deltas(self, strengths: Mapping[str, float]) -> None:
        """Into weights stored as floats, beside packed ones; raises before anything is changed."""
        mixture = tuple(sorted(strengths.items()))
        sums: list[Delta] = []

        def deltas() -> Delta:
            if not sums:
                sums.append(self._mixed(strengths))
            return sums[0]

        beside = {m for n in strengths for m in self._deltas[n] if floats_of(self.slots[m]) is None}
        packed = {m: deltas()[m] for m in beside}
        self._written.put(mixture, self.slots, deltas)
        for module in self._beside - beside:
            put_beside(self.slots[module], None)
        for module, delta in packed.items():
            put_beside(self.slots[module], delta)
        self._beside = beside

    # --- an adapter for each row ------------------------------------------------------------

    def rows(self, names: Sequence[str | None] | None) -> Rows:
        """From now on row i of the batch has the LoRA (or mix of LoRA) names[i], None the base.

        It takes the place of what `set` turned on, sparse deltas apart, until the end of a `with`
        or `rows(None)`. The first use compiles a `torch.compile`d model once more, other names
        never do. Raises AdapterError for names that are not loaded or are sparse deltas.
        """
        if names is None:
            for slot in self.slots.values():
                slot._buffers["adapter_rows"] = None
            return Rows(self)
        if not names:
            raise AdapterError("rows() needs one name for each row of the batch")
        wanted = {n: self._strengths({n: 1.0}) for n in dict.fromkeys(names) if n is not None}
        if sparse := sorted({p for parts in wanted.values() for p in parts} - self._ranks.keys()):
            raise AdapterError(f"rows() takes LoRA, {sparse} are sparse deltas; use set()")
        rows = [{} if n is None else wanted[n] for n in names]
        targets = {n: set(self._loaded[n].modules) for parts in wanted.values() for n in parts}
        write_rows(self.slots, rows, targets, self._vector)
        return Rows(self)

    # --- for good ---------------------------------------------------------------------------

    def merge(self, name: str, strength: float = 1.0) -> dict[str, float]:
        """Add an adapter to the weights for good and remove it; the relative error by module.

        A packed weight becomes requantise(dequantise(W) + strength · BA) (LoQT, arXiv 2405.16528);
        its error is ‖packed − exact‖ / ‖exact‖. Everything is turned off first.
        """
        errors = merge_into(self, self[name], strength)
        self.remove(name)
        return errors
