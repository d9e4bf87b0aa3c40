"""A cut: which atoms go, and what that makes of every parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from sparsefx.ir.capture import split_inputs
from sparsefx.passes.coupled import Couplings, Group
from sparsefx.passes.coupled_axes import Axis, Index


@dataclass
class Cut:
    """Units kept of each group that is cut, ascending."""

    couplings: Couplings
    kept: Mapping[str, Index]

    def __post_init__(self) -> None:
        self._stays = np.ones(len(self.couplings.atoms.keep), bool)
        for group, kept in self.groups():
            self._stays[np.delete(group.atoms, kept)] = False

    def groups(self) -> Iterator[tuple[Group, Index]]:
        for group in self.couplings.groups:
            if group.name in self.kept:
                yield group, self.kept[group.name]

    def stays(self, axis: Axis) -> Index:
        """Positions of an axis that stay, ascending."""
        return np.flatnonzero(self._stays[self.couplings.atoms.of(axis)])

    def count(self, label: Index) -> int:
        """How many elements of a class (their atoms) stay."""
        return int(self._stays[label].sum())

    def smaller(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every parameter and buffer that changes, without what goes; new memory."""
        out = {}
        for node, name in self.couplings.leaves.items():
            tensor = tensors[name].detach()
            for i in range(tensor.dim()):
                at = self.stays((node, i))
                if len(at) < tensor.shape[i]:
                    tensor = tensor.index_select(i, torch.from_numpy(at).to(tensor.device))
                    out[name] = tensor
        return out

    def masked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Dense weights of the same function: products read zeros where units go."""
        out: dict[str, Tensor] = {}
        for group, kept in self.groups():
            for member in group.of_role("in"):
                tensor = out.get(member.name, tensors[member.name]).detach().clone()
                gone = np.delete(member.index, kept, axis=0).reshape(-1)
                tensor.index_fill_(member.axis, torch.from_numpy(gone).to(tensor.device), 0)
                out[member.name] = tensor
        return out


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def outputs(
    model: nn.Module, example_inputs: Any, instead: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Floating-point outputs in eval mode, with some tensors replaced."""
    args, kwargs = split_inputs(example_inputs)
    with torch.no_grad():
        found = functional_call(model, dict(instead or {}), args, kwargs)
    return [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]


def differ(want: list[Tensor], got: list[Tensor]) -> str:
    """How the outputs disagree beyond rounding, "" when they do not.

    Sums without zeros are the same sums in another order, a relative error of some eps; a wrong
    structure is off by the order of the values. The root of eps lies between the two.
    """
    if [t.shape for t in want] != [t.shape for t in got]:
        return f"outputs {[tuple(t.shape) for t in got]}, not {[tuple(t.shape) for t in want]}"
    for i, (x, y) in enumerate(zip(want, got, strict=True)):
        if not x.numel():
            continue
        allowed = torch.finfo(x.dtype).eps ** 0.5 * float(x.nan_to_num(0, 0, 0).abs().max())
        off = float((x - y).nan_to_num(0, 0, 0).abs().max())
        if off > allowed or not torch.equal(x.isnan(), y.isnan()):
            return f"output {i} is off by {off:.2g}, rounding explains {allowed:.2g}"
    return ""
