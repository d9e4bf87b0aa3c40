"""A LoRA from a tuned checkpoint: the truncated SVD of its difference to the base.

PHLoRA (arXiv 2509.10971): needs neither data nor gradients. Tensors are read one at a time, so two
checkpoints of any size take the memory of one layer.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefx.ir.errors import AdapterError
from sparsefx.runtime.adapter_files import CONFIG, WEIGHTS, Lora, plain, safetensors_of, some
from sparsefx.runtime.adapter_modules import Slot, sizes
from sparsefx.runtime.modules import SparseLinear

EXACT = 2048
"""The smaller side of a matrix up to which its whole SVD is taken; above, that of a sketch."""
LOOKED_UP = re.compile(r"embed|wte|wpe|position", re.IGNORECASE)
"""Names of matrices that are looked up, not multiplied by, where no model says so."""


@dataclass(frozen=True)
class Extracted:
    """A LoRA, what share of ‖difference‖² it keeps per module, and tensors it cannot hold."""

    lora: Lora = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def mean_energy(self) -> float:
        """Mean share over the modules; 1 without any."""
        return sum(self.energy.values()) / len(self.energy) if self.energy else 1.0


class Checkpoint:
    """Tensors of one safetensors file or a folder of shards, read when asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self.files: dict[str, tuple[Any, str]] = {}
        try:
            for file in safetensors_of(path):
                opened: Any = safe_open(file, framework="pt")
                self.files |= {plain(key): (opened, key) for key in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"'{path}' is no sound safetensors file: {error}") from error

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def __getitem__(self, key: str) -> Tensor:
        """The tensor, in its own type. Raises AdapterError for NaN and infinity."""
        file, own = self.files[key]
        tensor: Tensor = file.get_tensor(own)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise AdapterError(f"'{self.path}': '{key}' holds NaN or infinity")
        return tensor


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A (r, K), B (N, r) with B · A nearest to `change` (N, K), and the share of ‖change‖² kept."""
    wide = change.double() if min(change.shape) <= 512 else change.float()
    total = float(wide.square().sum(dtype=torch.float64))
    if min(change.shape) <= max(EXACT, 4 * rank):
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
    else:
        u, s, vt = torch.svd_lowrank(wide, q=rank + 16, niter=6)
        v = vt.T
    root = s[:rank].sqrt()
    kept = float(s[:rank].square().sum(dtype=torch.float64)) / total if total else 1.0
    return (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float(), min(kept, 1.0)


def extract(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    rank: int,
    slots: Mapping[str, Slot],
) -> Extracted:
    """The LoRA for modules with a slot; `base` None: the difference to what they hold now.

    Raises AdapterError, listing the keys, where no weight of the checkpoint has a slot or shapes
    differ. A weight stored as (K, N) (GPT-2) is taken in whichever orientation is nearer the base.
    """
    if rank < 1:
        raise AdapterError(f"rank is {rank}")
    after = Checkpoint(tuned)
    before = None if base is None else Checkpoint(base)
    lora, energy = Lora(), {}
    names = {name: f"{name}.weight" for name in slots if f"{name}.weight" in after}
    if not names:
        raise AdapterError(f"'{tuned}': none of {some(after)} is the weight of a slot")
    left = [] if before is None else _differing(before, after, set(names.values()))
    for name, key in names.items():
        slot = slots[name]
        now = _dense(slot) if before is None else _matrix(before, key, sizes(slot))
        change = _nearer(_matrix(after, key, sizes(slot)), now)
        if not change.any():
            continue
        a, b, energy[name] = factors(change, min(rank, *change.shape))
        lora[name] = a, b
    return Extracted(lora, energy, tuple(left))


def extract_lora(
    base: str | os.PathLike[str], tuned: str | os.PathLike[str], rank: int,
    out: str | os.PathLike[str],
) -> Extracted:  # fmt: skip
    """Write the LoRA of `tuned` over `base` as a folder that PEFT and `load` read.

    Both are safetensors files or folders of them. The folder appears whole or not at all. Raises
    AdapterError for keys or shapes that differ, a folder that exists, or no difference at all.
    """
    if rank < 1:
        raise AdapterError(f"rank is {rank}")
    if os.path.lexists(out):
        raise AdapterError(f"'{out}' exists; name a new folder")
    before, after = Checkpoint(base), Checkpoint(tuned)
    if unknown := [key for key in after if key not in before]:
        raise AdapterError(f"'{tuned}' has {some(unknown)}, which '{base}' lacks")
    lora, energy = Lora(), {}
    for key in after:
        if not _multiplied(key, after):
            continue
        old, new = before[key], after[key]
        if old.shape != new.shape:
            raise AdapterError(f"'{key}' is {tuple(new.shape)}, in the base {tuple(old.shape)}")
        change = (new.float() - old.float()).flatten(1)
        if change.any():
            name = key.removesuffix(".weight")
            a, b, energy[name] = factors(change, min(rank, *change.shape))
            lora[name] = a, b
    left = _differing(before, after, {f"{name}.weight" for name in lora})
    if not lora:
        raise AdapterError(f"'{tuned}' differs from '{base}' in no matrix (in {some(left)})")
    _write(lora, rank, Path(base), Path(out))
    return Extracted(lora, energy, tuple(left))


def _multiplied(key: str, file: Checkpoint) -> bool:
    if not key.endswith(".weight") or LOOKED_UP.search(key):
        return False
    opened, own = file.files[key]
    shape = opened.get_slice(own).get_shape()
    return len(shape) == 2


def _differing(before: Checkpoint, after: Checkpoint, done: set[str]) -> list[str]:
    return [
        key for key in after
        if key not in done and not (key in before and torch.equal(before[key], after[key]))
    ]  # fmt: skip


def _matrix(file: Checkpoint, key: str, size: tuple[int, int]) -> Tensor:
    if key not in file:
        raise AdapterError(f"'{file.path}' has no '{key}'")
    tensor = file[key].float().flatten(1)
    if tuple(tensor.shape) not in (size, size[::-1]):
        raise AdapterError(f"'{file.path}': '{key}' is {tuple(tensor.shape)}, needed is {size}")
    return tensor


def _nearer(new: Tensor, now: Tensor) -> Tensor:
    """new − now, with `new` transposed where that is nearer."""
    ways = [t - now for t in (new, new.T) if t.shape == now.shape]
    return min(ways, key=lambda change: float(change.square().sum()))


def _dense(slot: Slot) -> Tensor:
    if isinstance(slot, SparseLinear):
        return slot.packed.unpack(torch.float32)
    weight: Any = slot.weight
    return weight.detach().float()  # type: ignore[no-any-return]


def _write(lora: Lora, rank: int, base: Path, out: Path) -> None:
    from safetensors.torch import save_file

    state = {
        f"base_model.model.{name}.lora_{part}.weight": t.contiguous()
        for name, pair in lora.items() for part, t in zip("AB", pair, strict=True)
    }  # fmt: skip
    # alpha = r: the scale is 1, for modules of lower rank too
    lower = {name: len(a) for name, (a, _) in lora.items() if len(a) != rank}
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": rank,
        "target_modules": sorted(lora), "rank_pattern": lower, "alpha_pattern": lower,
        "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    draft = out.with_name(f".{out.name}.{secrets.token_hex(8)}")
    try:
        draft.mkdir(parents=True)
        save_file(state, draft / WEIGHTS, metadata={"format": "pt"})
        (draft / CONFIG).write_text(json.dumps(config, indent=2))
        os.rename(draft, out)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise AdapterError(f"'{out}' could not be written: {error}") from error
