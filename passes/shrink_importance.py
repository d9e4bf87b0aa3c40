"""How much each unit of a group matters: what decides which heads and channels go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.errors import SpecError
from sparsefx.passes.coupled import Group, Member
from sparsefx.passes.statistics import Statistics

Criterion = str | Mapping[str, Tensor]
"""A name in CRITERIA, or importance as tensors: {group name: (size,)} or {parameter name: (its
shape)}, the latter summed over what each unit takes of the parameters given (LoRAPrune's scores
arXiv 2305.18403, Taylor scores)."""
Named = Mapping[str, Tensor]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def importance(
    group: Group, tensors: Named, criterion: Criterion, statistics: Mapping[str, Statistics]
) -> Tensor | None:
    """Importance (size,) float32 of each unit, None where the criterion says nothing of the group.

    `tensors` are the model's parameters and buffers by name. Raises SpecError for an unknown
    criterion, and for tensors of a wrong shape or with NaN.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise SpecError(f"criterion {criterion!r} is not one of {sorted(CRITERIA)}")
        score = CRITERIA[criterion](group, tensors, statistics)
    else:
        score = _given(group, tensors, criterion)
    if score is not None and (score.shape != (group.size,) or score.isnan().any()):
        raise SpecError(f"{group.name}: importance {tuple(score.shape)} must be ({group.size},) "
                        "without NaN")  # fmt: skip
    return score


def per_unit(member: Member, values: Tensor) -> Tensor:
    """Sum `values` (one per position of the member's axis) over each unit: (size,)."""
    at = torch.from_numpy(member.index).to(values.device)
    return values.float()[at].sum(1)


def along(member: Member, tensor: Tensor) -> Tensor:
    """Sum a tensor of the parameter's shape over all axes but the member's."""
    rest = [i for i in range(tensor.dim()) if i != member.axis]
    return tensor.float().sum(rest) if rest else tensor.float()


def magnitude(group: Group, tensors: Named, statistics: Mapping[str, Statistics]) -> Tensor | None:
    """Euclidean norm of all that makes and reads a unit."""
    found = group.of_role("out", "in")
    squares = [per_unit(m, along(m, tensors[m.name].detach().float().square())) for m in found]
    return torch.stack(squares).sum(0).sqrt()


def activation(group: Group, tensors: Named, statistics: Mapping[str, Statistics]) -> Tensor | None:
    """Norm of what a unit adds to its readers, columns taken as independent: ‖x_j‖·‖W[:, j]‖."""
    known = [m for m in group.of_role("in") if m.name in statistics]
    total = []
    for m in known:
        norms = statistics[m.name].norms
        if len(norms) != tensors[m.name].shape[m.axis]:
            raise SpecError(f"{m.name}: statistics of {len(norms)} inputs, the weight has "
                            f"{tensors[m.name].shape[m.axis]}")  # fmt: skip
        columns = along(m, tensors[m.name].detach().float().square())
        total.append(per_unit(m, columns * norms.square().to(columns.device)))
    return torch.stack(total).sum(0).sqrt() if total else None


def bn_scale(group: Group, tensors: Named, statistics: Mapping[str, Statistics]) -> Tensor | None:
    """Sum of |gamma| of the batch norms a channel goes through (network slimming)."""
    found = [per_unit(m, tensors[m.name].detach().abs()) for m in group.of_role("scale")]
    return torch.stack(found).sum(0) if found else None


CRITERIA: dict[
    str, Callable[[Group, Named, Mapping[str, Statistics]], Tensor | None]
] = {"magnitude": magnitude, "activation": activation, "bn_scale": bn_scale}  # fmt: skip


def _given(group: Group, tensors: Named, scores: Mapping[str, Tensor]) -> Tensor | None:
    if group.name in scores:
        return scores[group.name].detach().float()
    total = []
    for m in group.members:
        if m.name not in scores:
            continue
        if scores[m.name].shape != tensors[m.name].shape:
            raise SpecError(f"{m.name}: importance {tuple(scores[m.name].shape)}, the parameter is "
                            f"{tuple(tensors[m.name].shape)}")  # fmt: skip
        total.append(per_unit(m, along(m, scores[m.name].detach())))
    return torch.stack(total).sum(0) if total else None


def input_statistics(
    model: nn.Module, groups: Iterable[Group], batches: Iterable[Any]
) -> dict[str, Statistics]:
    """Run `batches` and sum the inputs of every module whose `weight` reads one of the groups.

    Keys are parameter names; convolutions are counted per input channel. Each batch is what
    `couple` takes as example inputs.
    """
    out: dict[str, Statistics] = {}
    hooks = []
    device = next(model.parameters()).device
    for member in {m.name: m for g in groups for m in g.of_role("in")}.values():
        owner, _, attribute = member.name.rpartition(".")
        module = model.get_submodule(owner)
        if attribute == "weight":
            size = module.get_parameter("weight").shape[member.axis]
            sums = out[member.name] = Statistics(size, device, moments=False)
            hooks.append(module.register_forward_pre_hook(_adder(sums)))
    try:
        with torch.no_grad():
            for batch in batches:
                args, kwargs = split_inputs(batch)
                model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: sums for name, sums in out.items() if sums.rows}


def _adder(sums: Statistics) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            sides = len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 0
            sums.add(args[0].movedim(-1 - sides, -1))

    return hook
