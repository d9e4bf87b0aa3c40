"""Put a packed weight where its dense parameter was; the model keeps its modules and signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparsefx.ir.format import Packed
from sparsefx.passes.replaceable import reads_weight
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


def install(
    model: nn.Module,
    names: Sequence[str],
    packed: Packed,
    branch: Sequence[Tensor] = (),
    transposed: bool = False,
) -> dict[str, str]:
    """Put `packed` in place of the parameter called `names` (several if tied: buffers are shared).

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
        why = reads_weight(model, name, transposed)
        if why:
            unpacked[name] = why
            shape = tuple(weight.shape)
            unpack_on_read(owner, attribute, SparseParameter(packed, shape, transposed, **common))
            continue
        common["branch"] = branch
        stride = getattr(owner, "stride", None)
        new = (
            SparseLinear(packed, bias, **common)
            if stride is None
            else SparseConv1x1(tuple(stride), packed, bias, **common)
        )
        new.train(owner.training)
        set_module(model, owner_name, new)
    return unpacked
