"""The one new op, `sparsefx::linear`, and `sparsefx::unpack` for code that insists on the weight.

`linear(x, weight, bias, branch, format, n)` is x · Wᵀ + bias + ((x · downᵀ) · scale) · upᵀ with
W = unpack(weight). What is defined here is the meaning; `codegen.kernels` may register faster
ways to compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx.ir.format import Format, Packed

LIBRARY: Any = torch.library.Library("sparsefx", "DEF")  # type: ignore[no-untyped-call]
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "linear(Tensor x, Tensor[] weight, Tensor? bias, Tensor[] branch, str format, SymInt n) "
    "-> Tensor",
    tags=TAGS,
)
LIBRARY.define(
    "unpack(Tensor[] weight, str format, int n, int k, ScalarType dtype) -> Tensor", tags=TAGS
)

Runner = Callable[[Tensor, Packed, Tensor | None, Sequence[Tensor]], Tensor]


def round_activations(x: Tensor) -> Tensor:
    """x (…, K) rounded to int8 codes times one scale per row: what `+a8` multiplies by."""
    codes, scales = quantize_rows(x)
    return (codes.float() * scales).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of x (…, K) and float32 scales (…, 1), symmetric: scale = max|row| / 127.

    A row holding NaN or infinity gets a NaN scale, so that the row's output is NaN and no other.
    """
    wide = x.float()
    reach = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros((*x.shape[:-1], 1))
    bad = ~torch.isfinite(reach)
    scales = torch.where(reach == 0, 1.0, reach / 127).masked_fill(bad, torch.nan)
    codes = (wide / scales).nan_to_num(0.0).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scales


def add_branch(y: Tensor, x: Tensor, branch: Sequence[Tensor]) -> Tensor:
    """y + ((x · downᵀ) · scale) · upᵀ; `branch`: empty or (down (r, K), up (N, r), scale (r,))."""
    if not branch:
        return y
    down, up, scale = (t.to(x.dtype) for t in branch)
    return y + ((x @ down.T) * scale) @ up.T


def reference(x: Tensor, packed: Packed, bias: Tensor | None, branch: Sequence[Tensor]) -> Tensor:
    """What every kernel must compute: unpack, multiply densely, add bias and branch."""
    weight = packed.unpack(x.dtype)
    rows = round_activations(x) if packed.format.a8 else x
    bias = None if bias is None else bias.to(x.dtype)
    return add_branch(torch.nn.functional.linear(rows, weight, bias), x, branch)


_runner: Runner = reference


def use_runner(runner: Runner) -> None:
    """Let `runner` compute `sparsefx::linear` from now on (the kernel table does this)."""
    global _runner
    _runner = runner


def _linear(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, branch: list[Tensor], format: str, n: int
) -> Tensor:
    return _runner(x, Packed(Format.parse(format), n, x.shape[-1], tuple(weight)), bias, branch)


def _linear_fake(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, branch: list[Tensor], format: str, n: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _unpack(weight: list[Tensor], format: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    out = Packed(Format.parse(format), n, k, tuple(weight)).unpack(dtype)
    # Values stored densely as they are would otherwise be returned as an alias of the buffer.
    return out.clone() if any(out.untyped_storage() is b.untyped_storage() for b in weight) else out


def _unpack_fake(weight: list[Tensor], format: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return weight[0].new_empty((n, k), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, branch, ctx.format, ctx.n = inputs
    ctx.counts = len(weight), len(branch)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, *weight, *branch)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of x, bias and branch, not of the weight. With `+a8` rounding is passed through."""
    x, *rest = ctx.saved_tensors
    weight, branch = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    rows = grad.reshape(-1, ctx.n)
    dense = torch.ops.sparsefx.unpack(weight, ctx.format, ctx.n, x.shape[-1], grad.dtype)
    grad_x = grad @ dense
    grad_branch: list[Tensor | None] = []
    if branch:
        down, up, scale = (t.to(grad.dtype) for t in branch)
        inner, flat = grad @ up, x.reshape(-1, x.shape[-1])
        grad_x = grad_x + (inner * scale) @ down
        low = flat @ down.T
        back = rows @ up
        grads = ((back * scale).T @ flat, rows.T @ (low * scale), (back * low).sum(0))
        grad_branch = [g.to(t.dtype) for g, t in zip(grads, branch, strict=True)]
    grad_bias = None if ctx.bias_dtype is None else rows.sum(0).to(ctx.bias_dtype)
    return grad_x, [None] * ctx.counts[0], grad_bias, grad_branch, None, None


def _autocast(device: str) -> Callable[..., Tensor]:
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    guarded = torch._C.DispatchKeySet(key)

    def run(x: Tensor, *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(guarded):
            if x.is_floating_point() and x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device))
            return torch.ops.sparsefx.linear(x, *rest)  # type: ignore[no-any-return]

    return run


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("unpack", _unpack, "CompositeExplicitAutograd")
for _device in ("cpu", "cuda"):
    LIBRARY.impl("linear", _autocast(_device), f"Autocast{_device.upper()}")
torch.library.register_fake("sparsefx::linear", _linear_fake, lib=LIBRARY)
torch.library.register_fake("sparsefx::unpack", _unpack_fake, lib=LIBRARY)
torch.library.register_autograd("sparsefx::linear", _backward, setup_context=_save, lib=LIBRARY)

LINEAR = torch.ops.sparsefx.linear.default
UNPACK = torch.ops.sparsefx.unpack.default
