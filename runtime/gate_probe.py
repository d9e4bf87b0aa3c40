"""Eager runs for the gate: with rounding noise, without activation rounding, layers recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsefx.codegen.onnx import BRANCHED, PRODUCT, WEIGHT
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import add_branch, per_column, quantize_rows

Key = tuple[str | int, ...]
"""PRODUCT, BRANCHED or WEIGHT, and the addresses of the packed buffers."""
Call = tuple[Key, Tensor]
"""Addresses of a packed weight's buffers, and what was computed with it."""

UNITS = {torch.float64: 2.0**-53, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
POINTWISE = 4.0
"""Units in the last place by which elementwise functions of two math libraries may differ."""

SIGNS = torch.tensor([[1.0 - 2.0 * (i >> bit & 1) for bit in range(8)] for i in range(256)])
KEPT = 256 << 20
"""Bytes of unpacked weights that are kept from one run to the next."""

aten = torch.ops.aten
LEFT = {
    aten.mm.default: 0, aten.bmm.default: 0, aten.mv.default: 0, aten.dot.default: 0,
    aten.addmm.default: 1, aten.baddbmm.default: 1, aten.addmv.default: 1, aten.linear.default: 0,
}  # fmt: skip
"""Products, and which argument's last axis they sum over."""


def unit(dtype: torch.dtype) -> float:
    """Half a unit in the last place, relative."""
    return UNITS.get(dtype, 2.0**-24)


class Magnitudes:
    """|W| of packed weights: noisy runs need them all, and unpacking takes as long as a run."""

    def __init__(self) -> None:
        self.known: dict[Key, Tensor] = {}
        self.left = KEPT

    def of(self, packed: Packed) -> Tensor:
        """|W| (N, K) in float32."""
        key: Key = (str(packed.format), *(b.data_ptr() for b in packed.buffers))
        found = self.known.get(key)
        if found is None:
            found = packed.unpack().abs_()
            self.left -= found.nbytes
            if self.left >= 0:
                self.known[key] = found
        return found


class Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every operator of one eager run; as it is, it changes nothing."""

    def __init__(
        self, noise: int | None = None, activations: str = "as asked",
        magnitudes: Magnitudes | None = None,
    ) -> None:  # fmt: skip
        """`noise` seeds rounding errors of every operator, or with "dither" those of activations.

        `activations` that `+a8` rounds to int8 may be left "exact", or exact but moved at random
        by as much as rounding moves them: "dither". Runs of one model may share `magnitudes`.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.activations = activations
        self.magnitudes = magnitudes or Magnitudes()
        self.dither = torch.Generator().manual_seed(noise or 0)
        noisy = noise is not None and activations == "as asked"
        self.generator = self.dither if noisy else None
        self.calls: list[Call] | None = None
        """Results of packed weights in execution order, when a list is put here."""

    def run(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's outputs. Noisy runs see attention as products, not as one opaque operator."""
        if self.generator is None:
            with torch.no_grad(), self:
                return model(*args, **kwargs)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), self:
                return model(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        product = func is torch.ops.sparsefx.linear.default
        fmt = Format.parse(args[4]) if product else Format()
        if fmt.a8 and self.activations != "as asked":
            dither = self.activations == "dither"
            x = self._dithered(args[0], fmt.a8_group) if dither else args[0]
            args = (x, *args[1:4], str(fmt.float_activations), args[5])
        out = func(*args, **kwargs)
        unpacks = func is torch.ops.sparsefx.unpack.default  # exact in both
        if self.generator is not None and not unpacks and not _aliases(func):
            bound = _product_bound(func, args, kwargs, out, self.magnitudes)
            out = pytree.tree_map(lambda y: self._noisy(y, bound), out)
        if self.calls is not None and (product or unpacks):
            buffers = args[1] if product else args[0]
            kind = WEIGHT if unpacks else BRANCHED if args[3] else PRODUCT
            key = (kind, *(b.data_ptr() for b in buffers))
            self.calls.append((key, out.detach().cpu().clone()))
        return out

    def _dithered(self, x: Tensor, group: int) -> Tensor:
        """x plus uniform noise of one int8 step: independent of rounding, and as large."""
        share = torch.rand(x.shape, generator=self.dither).to(x.device) - 0.5
        steps = per_column(quantize_rows(x, group)[1], group, x.shape[-1])
        return (x.float() + share * steps).to(x.dtype)

    def _noisy(self, y: Any, bound: Tensor | None) -> Any:
        """y with each element moved by its bound, up or down at random."""
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        wide = torch.promote_types(y.dtype, torch.float32)
        sign = self._signs(y.numel()).view(y.shape).to(y.device, wide)
        if bound is None:  # y · (1 ± …) is y ± … · |y|, rounded once
            moved = y.to(wide) * sign.mul_(POINTWISE * unit(y.dtype)).add_(1.0)
        else:
            moved = torch.addcmul(y.to(wide), sign, bound.to(wide))
        # Infinities and the huge constants that stand for them in masks are exact everywhere.
        huge, moved = torch.finfo(y.dtype).max / 4, moved.to(y.dtype)
        if y.numel() and not bool(y.abs().max() < huge):
            moved = torch.where(y.abs() < huge, moved, y)
        return moved

    def _signs(self, count: int) -> Tensor:
        """`count` times 1 or −1 at random, eight out of every number drawn."""
        drawn = torch.randint(0, 256, (-(-count // 8),), generator=self.generator)
        return SIGNS[drawn].view(-1)[:count]


def _aliases(func: Any) -> bool:
    schema = func._schema
    return schema.is_mutable or any(r.alias_info is not None for r in schema.returns)


def _product_bound(
    func: Any, args: Sequence[Any], kwargs: Any, out: Any, known: Magnitudes
) -> Tensor | None:
    """u·|y| + 2√K·2⁻²⁴·|x||w|ᵀ for products, None for other operators."""
    reach: Tensor
    if func is torch.ops.sparsefx.linear.default:
        reach, k = _linear_reach(args, known), args[0].shape[-1]
    elif func in LEFT or func is aten.convolution.default:
        reach = func(*pytree.tree_map(_absolute, tuple(args)), **kwargs)
        left = args[LEFT.get(func, 0)]
        k = left.shape[-1] if func in LEFT else args[1].numel() // max(out.shape[1], 1)
    else:
        return None
    u, steps = unit(out.dtype), max(k, 1) ** 0.5
    share = 2 * steps * min(2.0**-24, max(u, 2.0**-53))
    if u > 2.0**-24:
        # One side may round its operands (the weight, a branch's middle) to half precision.
        share += 2 * u / steps
    wide = torch.promote_types(out.dtype, torch.float32)
    bound: Tensor = share * reach.to(wide)
    return bound.add_(out.abs().to(wide), alpha=u)


def _absolute(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _linear_reach(args: Sequence[Any], known: Magnitudes) -> Tensor:
    """|x| |W|ᵀ + |bias| + the same of the branch, in float32."""
    x, weight, bias, branch, fmt, n = args
    rows = x.abs().float()
    reach = rows @ known.of(Packed(Format.parse(fmt), n, x.shape[-1], tuple(weight))).T
    if bias is not None:
        reach = reach + bias.abs()
    return add_branch(reach, rows, [t.abs() for t in branch])
