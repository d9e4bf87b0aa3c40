"""`sparsefx::add_delta`: y + x · Δᵀ with Δ in compressed sparse rows, beside a packed weight.

A packed weight cannot take values at arbitrary positions, so a sparse delta (SHiRA) on it is a
product of its own. Its tensors have room for a declared number of positions: edited in place, they
switch without recompiling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsefx.codegen.prepared import Store

LIBRARY: Any = torch.library.Library("sparsefx", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "add_delta(Tensor y, Tensor x, Tensor starts, Tensor columns, Tensor values) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
HELD: Store[Tensor | None] = Store()


def rows_of(positions: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """int32 starts (N + 1,) and columns (count,) of ascending positions in an (N, K) weight."""
    counts = torch.bincount(positions // k, minlength=n)
    starts = torch.zeros(n + 1, dtype=torch.int64, device=positions.device)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts.int(), (positions % k).int()


def delta(starts: Tensor, columns: Tensor, values: Tensor, k: int) -> Tensor | None:
    """Δ (N, K) as a sparse tensor over this memory, None where it is empty.

    `columns` and `values` have room for more than starts[-1] positions. Elsewhere than on a CPU
    nothing may wait for that number, so what is left, zeros, is counted to the last row.
    """
    if starts.device.type == "cpu":
        count = int(starts[-1])
        if not count:
            return None
        columns, values = columns[:count], values[:count]
    else:
        starts = torch.cat([starts[:-1], starts.new_full((1,), len(columns))])
    size = (len(starts) - 1, k)
    return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


def _held(starts: Tensor, columns: Tensor, values: Tensor, k: int) -> Tensor | None:
    """`delta`, kept on CPUs until one of the tensors is edited."""
    key = (starts, columns, values)
    if starts.device.type != "cpu" or any(t.is_inference() for t in key):
        return delta(*key, k)
    return HELD.get(key, lambda current: delta(*key, k), lambda found: found is not None)


def _run(y: Tensor, x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    sparse = _held(starts, columns, values, x.shape[-1])
    if sparse is None:
        return y.clone()  # an operator's result may not be its argument
    flat = x.reshape(-1, x.shape[-1]).float()
    more = (sparse @ flat.T).T
    return torch.add(y, more.reshape(y.shape)).to(y.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    starts, columns, values = rest
    sparse = delta(starts, columns, values, x.shape[-1])
    found = (
        torch.zeros_like(x) if sparse is None else grad.to(x.dtype) @ sparse.to_dense().to(x.dtype)
    )
    return grad, found, None, None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


LIBRARY.impl("add_delta", _run, "CompositeExplicitAutograd")
torch.library.register_fake(
    "sparsefx::add_delta", lambda y, x, *rest: torch.empty_like(y), lib=LIBRARY
)
torch.library.register_autograd("sparsefx::add_delta", _backward, setup_context=_save, lib=LIBRARY)
add_delta = torch.ops.sparsefx.add_delta.default
