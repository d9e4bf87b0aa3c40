"""`sparsefx::add_rows`: y plus the branch of each row's adapter (S-LoRA, arXiv 2311.03285).

The CPU engine multiplies a row by the matrices of its own ranks alone, packed once for each set of
ranks. Elsewhere the inner product is taken for all ranks at once, and each row keeps its own.
"""

from __future__ import annotations

import struct
from ctypes import c_char_p, c_int32, c_int64, string_at
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsefx.codegen import native
from sparsefx.codegen.active_ranks import REST, Active, Ranks
from sparsefx.codegen.prepared import BRANCHES, CALL, PACKED
from sparsefx.ir.errors import AdapterError, WeightError

LIBRARY: Any = torch.library.Library("sparsefx", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "add_rows(Tensor y, Tensor x, Tensor down, Tensor up, Tensor rows) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
BRANCH = slice(16, 40)
"""Where `Active.rest` has what `sfx_branch` of runtime/native/sparsefx.h is."""
Held = tuple[bytes, int, bytes, list[Active]]
"""Branches, their number, the one of each row as bytes, and what must outlive those."""


def check_rows(x: Tensor, rows: Tensor) -> None:
    """Raises AdapterError where x (batch, …, K) or (batch · t, K) has another batch than `rows`."""
    if x.shape[0] % rows.shape[0]:
        raise AdapterError(
            f"x has {x.shape[0]} rows, adapters.rows() named {rows.shape[0]} adapters: "
            "name one for each row of the batch"
        )


def meaning(y: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: Tensor) -> Tensor:
    """y (…, N) + ((x · downᵀ) ⊙ rows) · upᵀ over the last ranks of down (R, K) and up (N, R), of
    which rows (batch, ranks) holds the scales in each of `batch` equal parts of x (…, K)."""
    batch, ranks = rows.shape
    first, n = len(down) - ranks, y.shape[-1]
    low = (x.to(y.dtype) @ down[first:].T.to(y.dtype)).view(batch, -1, ranks)
    low = (low * rows[:, None]).to(y.dtype).view(-1, ranks)
    return torch.addmm(y.reshape(-1, n), low, up[:, first:].T.to(y.dtype)).view(y.shape)


@lru_cache(maxsize=1)
def _engine() -> tuple[native.Engine, Any] | None:
    """The CPU engine and its `sfx_add_branches`."""
    engine = native.engine()
    if engine is None:
        return None
    run = engine._lib["sfx_add_branches"]
    run.argtypes = [c_char_p, c_int32, c_char_p, c_int64, c_char_p, c_char_p]
    return engine, run


def _held(ranks: Ranks, rows: Tensor, down: Tensor, up: Tensor) -> Held:
    """The branches that the rows ask for; each set of ranks in use is packed once."""
    values = rows.detach().contiguous()
    size, base = 4 * values.shape[1], bytes(4 * (down.shape[0] - values.shape[1]))
    raw = string_at(values.data_ptr(), size * values.shape[0])
    places: dict[bytes, int] = {}
    used: list[Active] = []
    which = []
    for at in range(0, len(raw), size):
        key = raw[at : at + size]
        place = places.get(key)
        if place is None:
            active = ranks.of(base + key, (down, up))
            place = places[key] = -1 if active.pair is None else len(used)
            if active.pair is not None:
                used.append(active)
        which.append(place)
    branches = b"".join([active.rest[BRANCH] for active in used])
    return branches, len(used), struct.pack(f"{len(which)}i", *which), used


def _run(y: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: Tensor) -> Tensor:
    check_rows(x, rows)
    loaded, kind = _engine(), native.TYPES.get(y.dtype)
    if loaded is None or kind is None or not y.is_cpu or y.dtype is not x.dtype or not y.numel():
        return meaning(y, x, down, up, rows)
    engine, run = loaded
    entry = PACKED.get(id(down))
    if entry is not None and entry.current((down, up)):
        ranks = entry.value
    else:
        ranks = BRANCHES.get((down, up), lambda current: Ranks(engine), lambda found: True)
    last, version, place, held = ranks.last_rows
    if rows is not last or rows._version != version or rows.data_ptr() != place:
        held = _held(ranks, rows, down, up)
        if not rows.is_inference():  # those count no edits
            ranks.last_rows = rows, rows._version, rows.data_ptr(), held
    branches, count, which, _ = held
    x, y = x.contiguous(), y.contiguous()
    out, n = torch.empty_like(y), y.shape[-1]
    call = CALL(
        x.data_ptr(), out.data_ptr(), y.numel() // n, x.shape[-1], n, kind, 0, 0,
        torch.get_num_threads(), 0,
    ) + REST(0, y.data_ptr(), 0, 0, 0, 0, 0)  # fmt: skip
    if run(branches, count, which, len(rows), call, engine.error):
        raise WeightError(f"the CPU engine refuses: {engine.error.value.decode()}")
    return out


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    down, up, rows = ctx.saved_tensors
    batch, ranks = rows.shape
    first = len(down) - ranks
    inner = (grad @ up[:, first:].to(grad.dtype)).view(batch, -1, ranks) * rows[:, None]
    found = inner.to(grad.dtype).view(*grad.shape[:-1], ranks) @ down[first:].to(grad.dtype)
    return grad, found, None, None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _fake(y: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: Tensor) -> Tensor:
    check_rows(x, rows)
    return torch.empty_like(y)


LIBRARY.impl("add_rows", _run, "CPU")
LIBRARY.impl("add_rows", meaning, "CompositeExplicitAutograd")
torch.library.register_fake("sparsefx::add_rows", _fake, lib=LIBRARY)
torch.library.register_autograd("sparsefx::add_rows", _backward, setup_context=_save, lib=LIBRARY)
add_rows = torch.ops.sparsefx.add_rows.default
