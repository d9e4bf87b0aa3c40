"""The one new op, `sparsefx::linear`, and `sparsefx::unpack` for code that insists on the weight.

`linear(x, weight, bias, branch, format, n)` is x · Wᵀ + bias + ((x · downᵀ) · scale) · upᵀ with
W = unpack(weight). What is defined here is the meaning; `codegen.kernels` may register faster
ways to compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.ir.errors import ShapeError
from sparsefx.ir.format import Format, Packed

Linear: TypeAlias = Callable[[Tensor, list[Tensor], Tensor | None, list[Tensor], str, int], Tensor]
"""A kernel of `sparsefx::linear`."""
PLAIN = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
).raw_repr()
"""What a product of ordinary CPU tensors is dispatched on: no mode, no transform, no subclass."""


class _Library(torch.library.Library):
    """Skips the Autograd kernel, dearer than a small product, where no gradient is asked for."""

    cpu: Linear | None = None

    def impl(self, op_name: str, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            fn = self._skipping(fn)
        super().impl(op_name, fn, dispatch_key, **options)  # type: ignore[no-untyped-call]

    def _skipping(self, differentiable: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(
            keys: Any, x: Tensor, weight: list[Tensor], bias: Tensor | None,
            branch: list[Tensor], format: str, n: int,
        ) -> Tensor:  # fmt: skip
            if keys.raw_repr() == PLAIN and self.cpu is not None:
                wanted = torch.is_grad_enabled() and (
                    x.requires_grad
                    or (bias is not None and bias.requires_grad)
                    or [t for t in (*weight, *branch) if t.requires_grad]
                )
                if not wanted:
                    return self.cpu(x, weight, bias, branch, format, n)
            return differentiable(keys, x, weight, bias, branch, format, n)

        return run


LIBRARY: Any = _Library("sparsefx", "DEF")  # type: ignore[no-untyped-call]
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "linear(Tensor x, Tensor[] weight, Tensor? bias, Tensor[] branch, str format, SymInt n) "
    "-> Tensor",
    tags=TAGS,
)
LIBRARY.define(
    "unpack(Tensor[] weight, str format, int n, int k, ScalarType dtype) -> Tensor", tags=TAGS
)


def round_activations(x: Tensor, group: int = 0) -> Tensor:
    """x (…, K) rounded to int8 codes times scales: what `+a8` or `+a8g…` multiplies by."""
    codes, scales = quantize_rows(x, group)
    return (codes.float() * per_column(scales, group, x.shape[-1])).to(x.dtype)


def quantize_rows(x: Tensor, group: int = 0) -> tuple[Tensor, Tensor]:
    """int8 codes of x (…, K) and float32 scales (…, groups) per row and `group` columns.

    Symmetric: scale = max|group| / 127 (1 where all are 0), codes are rounded half to even. Group 0
    is the whole row; the last group may be shorter. A group holding NaN or infinity gets a NaN
    scale, so that its row's output is NaN and no other.
    """
    k = x.shape[-1]
    size = group or max(k, 1)
    count = max(-(-k // size), 1)
    wide = F.pad(x.float(), (0, count * size - k)) if count * size != k else x.float()
    wide = wide.reshape(*x.shape[:-1], count, size)
    reach = wide.abs().amax(-1, keepdim=True)
    bad = ~torch.isfinite(reach)
    scales = torch.where(reach == 0, 1.0, reach / 127).masked_fill(bad, torch.nan)
    codes = (wide / scales).nan_to_num(0.0).round_().clamp_(-127, 127).to(torch.int8)
    return codes.flatten(-2)[..., :k], scales.squeeze(-1)


def per_column(scales: Tensor, group: int, k: int) -> Tensor:
    """Scales (…, groups) of `quantize_rows` in a form that multiplies x (…, K)."""
    return scales.repeat_interleave(group, -1)[..., :k] if group else scales


def add_branch(y: Tensor, x: Tensor, branch: Sequence[Tensor]) -> Tensor:
    """y + ((x · downᵀ) · scale) · upᵀ; `branch`: empty or (down (r, K), up (N, r), scale (r,))."""
    if not branch:
        return y
    down, up, scale = (t.to(x.dtype) for t in branch)
    return y + ((x @ down.T) * scale) @ up.T


def reference(x: Tensor, packed: Packed, bias: Tensor | None, branch: Sequence[Tensor]) -> Tensor:
    """What every kernel must compute: unpack, multiply densely, add bias and branch."""
    weight = packed.unpack(x.dtype)
    rows = round_activations(x, packed.format.a8_group) if packed.format.a8 else x
    bias = None if bias is None else bias.to(x.dtype)
    return add_branch(torch.nn.functional.linear(rows, weight, bias), x, branch)


def use_kernel(kernel: Linear) -> None:
    """Let `kernel` compute `sparsefx::linear` from now on (the kernel table does this)."""
    for device in ("CPU", "CUDA"):
        LIBRARY.impl("linear", kernel, device)
    LIBRARY.cpu = kernel


def _linear(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, branch: list[Tensor], format: str, n: int
) -> Tensor:
    return reference(x, stored(x, weight, format, n), bias, branch)


def stored(x: Tensor, weight: Sequence[Tensor], format: str, n: int) -> Packed:
    """`weight`, which x (…, K) is multiplied by. Raises ShapeError where its K is another."""
    fmt, k = Format.parse(format), x.shape[-1]
    if split := len(fmt.layout.buffers):
        part, bits = weight[:split], fmt.layout.index_bits(n, k)
    else:
        part, bits = weight, fmt.codec.value_bits(n, k, n * k, weight[0].element_size())
    if sum(t.numel() * t.element_size() for t in part) != -(-bits // 8):
        raise ShapeError(f"x has {k} columns; what is stored as '{format}' is no ({n}, {k}) weight")
    return Packed(fmt, n, k, tuple(weight))


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
