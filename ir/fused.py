"""Two ops that graph passes make of `sparsefx::linear` and what surrounds it.

`linears(x, …)` is several products of one x, a list of (…, n) tensors with memory of their own.
`fused(x, …, activation, multiply, residual)` is one product with its epilogue,
act(x · Wᵀ + …) ⊙ multiply + residual, or with two parts of one n a gated one,
act(x · W₀ᵀ + …) ⊙ (x · W₁ᵀ + …) ⊙ multiply + residual.

What is defined here is the meaning, in terms of `sparsefx::linear`; `codegen.fused` registers
faster ways. Where a gradient is asked for the meaning runs: both train like what they replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.ir.format import Format
from sparsefx.ir.op import LINEAR, PLAIN, TAGS

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Part:
    """One weight of an op over several: tensors in a call, nodes in a graph."""

    weight: list[Any]
    bias: Any
    branch: list[Any]
    """[down, up, scale], or []."""
    format: str
    n: int


def parts_of(
    weight: Sequence[Any], bias: Sequence[Any], branch: Sequence[Any], format: str, n: Sequence[int]
) -> list[Part]:
    """The parts that the arguments of either op spell: see `arguments`."""
    out, start = [], 0
    for i, text in enumerate(format.split("|")):
        end = start + len(Format.parse(text).buffers)
        own = list(branch[3 * i : 3 * i + 3])
        used = own if own and own[0] is not None else []
        own_bias = bias[i] if bias else None
        out.append(Part(list(weight[start:end]), own_bias, used, text, n[i]))
        start = end
    return out


def arguments(parts: Sequence[Part]) -> tuple[list[Any], list[Any], list[Any], str, list[int]]:
    """weight, bias, branch, format and n of both ops: buffers of all parts one after the other,
    a bias or None each, three tensors or three None each, formats with "|" between, and N each.
    Where no part has a bias or a branch that list is empty: it costs time at every call.
    """
    biased = any(p.bias is not None for p in parts)
    branched = any(p.branch for p in parts)
    return (
        [t for p in parts for t in p.weight],
        [p.bias for p in parts] if biased else [],
        [t for p in parts for t in p.branch or (None, None, None)] if branched else [],
        "|".join(p.format for p in parts),
        [p.n for p in parts],
    )


def linears(
    x: Tensor, weight: list[Tensor], bias: list[Tensor | None], branch: list[Tensor | None],
    format: str, n: list[int],
) -> list[Tensor]:  # fmt: skip
    """What `sparsefx::linears` means."""
    return [
        LINEAR(x, p.weight, p.bias, p.branch, p.format, p.n)
        for p in parts_of(weight, bias, branch, format, n)
    ]


def fused(
    x: Tensor, weight: list[Tensor], bias: list[Tensor | None], branch: list[Tensor | None],
    format: str, n: list[int], activation: str, multiply: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """What `sparsefx::fused` means."""
    first, *gate = linears(x, weight, bias, branch, format, n)
    y = ACTIVATIONS[activation](first)
    for factor in (*gate, multiply):
        if factor is not None:
            y = y * factor
    return y if residual is None else y + residual


def _linears_fake(x: Tensor, weight: Any, bias: Any, branch: Any, format: str, n: Any) -> Any:
    return [x.new_empty((*x.shape[:-1], part)) for part in n]


def _fused_fake(
    x: Tensor, weight: Any, bias: Any, branch: Any, format: str, n: Any, *epilogue: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n[0]))


# --- registration --------------------------------------------------------------------------------

LIBRARY: Any = torch.library.Library("sparsefx", "FRAGMENT")  # type: ignore[no-untyped-call]
_WEIGHTS = "Tensor x, Tensor[] weight, Tensor?[] bias, Tensor?[] branch, str format, SymInt[] n"
LIBRARY.define(f"linears({_WEIGHTS}) -> Tensor[]", tags=TAGS)
LIBRARY.define(
    f"fused({_WEIGHTS}, str activation, Tensor? multiply, Tensor? residual) -> Tensor", tags=TAGS
)
LINEARS = torch.ops.sparsefx.linears.default
FUSED = torch.ops.sparsefx.fused.default
Op: TypeAlias = Callable[..., Any]
CPU: dict[Any, Op] = {}
"""The kernel for CPUs of each op, where `use` was told one."""


def use(op: Any, kernel: Op) -> None:
    """Let `kernel` compute `op` on CPUs from now on."""
    LIBRARY.impl(op._schema.name.rpartition("::")[2], kernel, "CPU")
    CPU[op] = kernel


def _wants_gradient(args: Sequence[Any]) -> bool:
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and _wants_gradient(arg):
            return True
    return False


def _autograd(op: Any, meaning: Op, opaque: bool) -> Op:
    """The meaning where a gradient is asked for, and where an op that is not `opaque` is traced;
    the kernel otherwise.
    """
    below, enabled, kernels = torch._C._after_autograd_keyset, torch.is_grad_enabled, CPU.get

    def run(keys: Any, *args: Any) -> Any:
        if enabled() and _wants_gradient(args):
            return meaning(*args)
        if keys.raw_repr() == PLAIN and (kernel := kernels(op)) is not None:
            return kernel(*args)
        return op.redispatch(keys & below, *args) if opaque else meaning(*args)

    return run


def _autocast(op: Any, device: str) -> Op:
    guarded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def run(x: Tensor, *rest: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(guarded):
            if x.is_floating_point() and x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device))
            return op(x, *rest)

    return run


def register(op: Any, meaning: Op, fake: Op | None) -> None:
    """Let `op` mean `meaning`, also where a gradient is asked for.

    With `fake`, which tells the shapes of results, `op` stays one node when it is traced; without,
    compilers see the operations that it means, and fuse them with others.
    """
    short = op._schema.name.rpartition("::")[2]
    LIBRARY.impl(short, _autograd(op, meaning, fake is not None), "Autograd", with_keyset=True)
    if fake is None:
        LIBRARY.impl(short, meaning, "CompositeImplicitAutograd")
    else:
        LIBRARY.impl(short, meaning, "CompositeExplicitAutograd")
        torch.library.register_fake(op._schema.name, fake, lib=LIBRARY)


for _op, _meaning, _fake in ((LINEARS, linears, _linears_fake), (FUSED, fused, _fused_fake)):
    register(_op, _meaning, _fake)
    for _device in ("cpu", "cuda"):
        _short = _op._schema.name.rpartition("::")[2]
        LIBRARY.impl(_short, _autocast(_op, _device), f"Autocast{_device.upper()}")
