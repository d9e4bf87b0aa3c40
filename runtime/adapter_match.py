"""Which modules of a model an adapter's keys name, and whether its tensors fit them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsefx.ir.errors import AdapterError, nearest
from sparsefx.runtime.adapter_files import Delta, Lora, some
from sparsefx.runtime.adapter_modules import KINDS, Slot, floats_of, sizes
from sparsefx.runtime.modules import SparseParameter

T = TypeVar("T")
Slots = Mapping[str, Slot]


def adaptable(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """Modules that can have a slot, by every name, those that `patterns` (`*.q_proj`, a module or
    what is inside one) name. Raises AdapterError for a pattern without any."""
    found = {
        name: module for name, module in model.named_modules(remove_duplicate=False)
        if name and (type(module) in KINDS or isinstance(module, Slot))
    }  # fmt: skip
    if patterns is None:
        return found
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = [n for n in found if fnmatchcase(n, pattern) or n.startswith(pattern + ".")]
        if not hits:
            raise AdapterError(f"modules: '{pattern}' names no linear{nearest(pattern, found)}")
        chosen |= {name: found[name] for name in hits}
    return chosen


def renamed(model: nn.Module, tensors: Mapping[str, T], slots: Slots) -> dict[str, T]:
    """`tensors` by the names of modules with a slot.

    Where they do not match as they are, all lose their first part (an adapter of `ForCausalLM` on
    its inner model), or are read as kohya's names, with `_` for `.`. Raises AdapterError listing
    those without a module.
    """
    kohya = {name.replace(".", "_"): name for name in slots}
    ways: tuple[Callable[[str], str], ...] = (
        lambda key: key,
        lambda key: key.partition(".")[2],
        lambda key: kohya.get(key.partition("_")[2], kohya.get(key.split("_", 2)[-1], key)),
    )
    for way in ways:
        names = {way(key) for key in tensors}
        if len(names) == len(tensors) and names <= slots.keys():
            return {way(key): value for key, value in tensors.items()}
    unmatched = sorted(key for key in tensors if key not in slots)
    raise AdapterError(
        f"the model has no slot for {some(unmatched)}{_reason(model, unmatched[0])}"
        f"{nearest(unmatched[0], slots)}"
    )


def _reason(model: nn.Module, name: str) -> str:
    for path, module in model.named_modules():
        if path == name:
            return f" (a {type(module).__name__} without one)"
        if isinstance(module, SparseParameter) and path.removesuffix("_packed").startswith(name):
            return " (its owner computes with the weight itself)"
    return ""


def check_lora(lora: Lora, slots: Slots, dtype: torch.dtype) -> None:
    """Raises AdapterError for matrices that do not fit, or do not stay finite in `dtype`."""
    bad: list[str] = []
    for name, (a, b) in lora.items():
        n, k = sizes(slots[name])
        if a.shape[1] != k or b.shape[0] != n:
            bad.append(f"{name}: A {tuple(a.shape)}, B {tuple(b.shape)} for {n}×{k}")
        elif not all(bool(t.to(dtype).isfinite().all()) for t in (a, b)):
            bad.append(f"{name}: not finite in {dtype}")
    if bad:
        raise AdapterError(f"matrices that do not fit: {some(bad)}")


def check_delta(model: nn.Module, deltas: Delta, slots: Slots) -> None:
    """Raises AdapterError for positions outside a weight, no room, or a weight used twice."""
    bad: list[str] = []
    for name, (positions, values) in deltas.items():
        module = slots[name]
        n, k = sizes(module)
        if len(positions) and int(positions[-1]) >= n * k:
            bad.append(f"{name}: position {int(positions[-1])} of {n * k}")
        elif not values.isfinite().all():
            bad.append(f"{name}: not finite")
        elif why := no_room(module, len(positions)) or shared(model, name, module):
            bad.append(f"{name}: {why}")
    if bad:
        raise AdapterError(f"deltas that do not fit: {some(bad)}")


def no_room(module: Slot, count: int) -> str | None:
    """Why `count` positions cannot be added to this module's weight, or None."""
    if floats_of(module) is not None:
        return None
    n, k = sizes(module)
    held = module._buffers["delta_values"]
    room = 0 if held is None else len(held)
    if count <= room:
        return None
    return (
        f"is packed and has room for {room} positions, not {count}: declare it, "
        f"sparsefx.adapters(model, max_density={1.05 * count / (n * k):.3f})"
    )


def shared(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why this weight cannot be written to: another module reads the same memory. Or None."""
    places = {t.untyped_storage().data_ptr() for t in stored(module)}
    for path, other in model.named_modules():
        for key, tensor in [*other._parameters.items(), *other._buffers.items()]:
            if other is module or tensor is None or not tensor.numel():
                continue
            if tensor.untyped_storage().data_ptr() in places:
                return f"shares its memory with '{path}.{key}'; untie them first"
    return None


def stored(module: nn.Module) -> list[Tensor]:
    """The tensors that hold the module's weight."""
    buffers: Any = getattr(module, "buffer_list", None)
    return list(buffers) if buffers is not None else [module.weight]  # type: ignore[list-item]


def merged(parts: Iterable[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Ascending positions and the sums of values times strength over several deltas."""
    several = list(parts)
    if len(several) == 1:
        positions, values, strength = several[0]
        return positions, values if strength == 1 else values * strength
    every = torch.cat([p for p, _, _ in several])
    positions, where = torch.unique(every, return_inverse=True)
    weighted = torch.cat([v * s for _, v, s in several])
    return positions, torch.zeros(len(positions)).index_add_(0, where, weighted)
