"""Put a packed weight where its dense parameter was; the model keeps its modules and signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.ir.format import Packed
from sparsefx.runtime.modules import (
    PackedWeight,
    SparseConv1x1,
    SparseLinear,
    SparseParameter,
    unpack_on_read,
)


def split_name(name: str) -> tuple[str, str]:
    """("a.b", "weight") for "a.b.weight"."""
    owner, _, attribute = name.rpartition(".")
    return owner, attribute


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `model`."""
    owner, attribute = split_name(name)
    setattr(model.get_submodule(owner), attribute, module)


def packed_modules(model: nn.Module) -> dict[str, PackedWeight]:
    """Every module of `model` that holds a packed weight, by its name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}


def plain_linear(module: nn.Module, transposed: bool) -> bool:
    """Whether `module(x)` is exactly x · Wᵀ + bias: told by a probe, not by the class's name.

    A subclass of `nn.Linear` may scale, add an adapter or quantise; those keep their own forward.
    Modules with hooks on them are not plain: replacing them would drop the hooks.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or _has_hooks(module):
        return False
    if len(list(module.parameters())) > 1 + isinstance(bias, nn.Parameter):
        return False
    matrix = weight.detach().T if transposed else weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, matrix.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            got, want = module(x), nn.functional.linear(x, matrix, bias)
    except Exception:  # a forward with another signature is not a plain linear
        return False
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(
        got.float(), want.float(), rtol=1e-2, atol=1e-2 * float(want.float().abs().max() + 1e-30)
    )


def plain_conv1x1(module: nn.Module) -> bool:
    """Whether `module` is a 1×1 convolution that is a plain product over channels."""
    return (
        type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and not _has_hooks(module)
        and all(side == 1 for side in module.kernel_size)  # type: ignore[union-attr]
        and module.groups == 1
        and module.padding in ((0,) * len(module.stride), "valid")  # type: ignore[arg-type]
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def install(
    model: nn.Module,
    names: Sequence[str],
    packed: Packed,
    branch: Sequence[Tensor] = (),
    transposed: bool = False,
) -> dict[str, str]:
    """Put `packed` in place of the parameter called `names` (several when tied: buffers are shared).

    Returns, for each name that had to keep its dense product, why: its owner computes with the
    weight itself, so the weight is unpacked at every read.
    """
    unpacked: dict[str, str] = {}
    for name in names:
        owner_name, attribute = split_name(name)
        owner = model.get_submodule(owner_name)
        weight = getattr(owner, attribute)
        common: dict[str, Any] = {"dtype": weight.dtype, "name": name}
        bias = getattr(owner, "bias", None)
        if attribute == "weight" and owner_name and plain_linear(owner, transposed):
            new: nn.Module = SparseLinear(packed, bias, branch, **common)
        elif attribute == "weight" and owner_name and plain_conv1x1(owner):
            new = SparseConv1x1(tuple(owner.stride), packed, bias, branch, **common)  # type: ignore[arg-type]
        else:
            shape = tuple(weight.shape)
            unpack_on_read(owner, attribute, SparseParameter(packed, shape, transposed, **common))
            unpacked[name] = f"{type(owner).__name__} computes with the weight itself"
            continue
        new.train(owner.training)
        set_module(model, owner_name, new)
        parent = model.get_submodule(split_name(owner_name)[0])
        if isinstance(parent, nn.MultiheadAttention):
            unpacked[name] = "nn.MultiheadAttention reads its projections' weights itself"
    return unpacked
