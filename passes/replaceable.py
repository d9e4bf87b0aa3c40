"""Can a module be replaced by our product, or does something compute with its weight itself?"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def reads_weight(model: nn.Module, name: str, transposed: bool = False) -> str:
    """Why the parameter `name` must stay readable as a dense weight, "" when its module may go."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if attribute != "weight" or not owner_name:
        return f"{type(owner).__name__} computes with the weight itself"
    parent = model.get_submodule(owner_name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention computes with its projections' weights itself"
    if has_hooks(owner):
        return f"{type(owner).__name__} has hooks, which a replacement would drop"
    if plain_conv1x1(owner) or plain_linear(owner, transposed):
        return ""
    return f"{type(owner).__name__} computes with the weight itself"


def plain_linear(module: nn.Module, transposed: bool) -> bool:
    """Whether `module(x)` is exactly x · Wᵀ + bias: told by a probe, not by the class's name.

    A subclass of `nn.Linear` may scale, add an adapter or quantise; those keep their own forward.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or has_hooks(module):
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
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return False
    # Both sides may round once more than the promised kernel bound: product, then bias.
    unit = torch.finfo(weight.dtype).eps / 2
    added = torch.zeros(()) if bias is None else bias.detach().float().abs()
    reach = x.float().abs() @ matrix.float().abs().T
    slack = 2 * matrix.shape[1] ** 0.5 * 2**-24 * reach
    bound = 4 * (unit * (want.float().abs() + added) + slack)
    return bool(((got.float() - want.float()).abs() <= bound).all())


def plain_conv1x1(module: nn.Module) -> bool:
    """Whether `module` is a 1×1 convolution that is a plain product over channels."""
    return (
        isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and not has_hooks(module)
        and all(side == 1 for side in module.kernel_size)
        and module.groups == 1
        and module.padding in ((0,) * len(module.stride), "valid")
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks hang on the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
