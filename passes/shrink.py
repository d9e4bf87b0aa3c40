"""Structured pruning: remove heads and channels for good, in producers and consumers alike.

The shrunk model equals the dense one with those units forced to zero where products read them:
after activations and batch norms, whose shift goes too. Modules are cut in place
(shrink_module.py); `form="graph"` cuts the exported graph instead (shrink_graph.py), for modules
whose code keeps sizes of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.errors import SpecError, nearest
from sparsefx.passes.coupled import Couplings, Group, Kind, couple
from sparsefx.passes.coupled_axes import Index
from sparsefx.passes.shrink_cut import Cut, named_tensors
from sparsefx.passes.shrink_graph import shrink_graph
from sparsefx.passes.shrink_importance import Criterion, importance
from sparsefx.passes.shrink_module import shrink_module
from sparsefx.passes.statistics import Statistics

KINDS: tuple[Kind, ...] = ("ffn", "heads", "channels")
"""What `amount` cuts unless told otherwise: residual streams stay."""
Form = Literal["module", "graph"]
Chosen = dict[str, tuple[Index, str]]
"""Group → (units that stay, why it was left alone)."""


@dataclass(frozen=True)
class Row:
    """What became of one group."""

    name: str
    kind: Kind
    before: int
    after: int
    reason: str = ""
    """Why it was left as it is."""


@dataclass(frozen=True)
class Report:
    """Sizes before and after; MACs of one run over the example inputs, FLOPs are twice as many."""

    model: nn.Module
    parameters: tuple[int, int]
    macs: tuple[int, int]
    rows: tuple[Row, ...]

    @property
    def flops(self) -> tuple[int, int]:
        return 2 * self.macs[0], 2 * self.macs[1]

    def __str__(self) -> str:
        lines = [
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,}",
            f"MACs {self.macs[0]:,} -> {self.macs[1]:,}",
            f"FLOPs {self.flops[0]:,} -> {self.flops[1]:,}",
        ]
        for row in self.rows:
            kept = f"{row.before} -> {row.after}" if not row.reason else f"{row.before} stay"
            lines.append(f"{row.name} ({row.kind}): {kept}{'; ' if row.reason else ''}{row.reason}")
        return "\n".join(lines)


def shrink(
    model: nn.Module,
    example_inputs: Any,
    amount: float | None = None,
    *,
    keep: Mapping[str, int | Sequence[int]] | None = None,
    criterion: Criterion = "magnitude",
    statistics: Mapping[str, Statistics] | None = None,
    kinds: Collection[Kind] = KINDS,
    form: Form = "module",
) -> Report:
    """Remove the least important units, and return what was done with the smaller model.

    `amount` is the share of units (0 to below 1, rounded down) each group of `kinds` loses; `keep`
    names groups and says how many, or which units, stay. `statistics` ({parameter: Statistics}) is
    what criterion "activation" reads (`input_statistics`).

    Raises SpecError for requests that cannot be met, CaptureError without a whole graph, PassError
    when the model cannot be adapted; in each case `model` is as it was.
    """
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        couplings = couple(model, example_inputs)
        chosen = _chosen(model, couplings, amount, keep, criterion, statistics or {}, kinds)
        return _apply(model, example_inputs, couplings, chosen, form)
    finally:
        for module in training:
            module.training = True


def nested(model: nn.Module, example_inputs: Any, share: float) -> nn.Module:
    """A copy with the first ⌈share · size⌉ channels of every hidden FFN layer (MatFormer, arXiv
    2310.07707), in eval mode; it shares no memory with `model`. Raises as `shrink` does."""
    if not 0 < share <= 1:
        raise SpecError(f"share {share} must be above 0 and at most 1")
    smaller = copy.deepcopy(model).eval()
    couplings = couple(smaller, example_inputs)
    groups = [g for g in couplings.groups if g.kind == "ffn" and not g.reason]
    if not groups:
        raise SpecError(f"{type(model).__name__} has no hidden FFN layer that may be cut")
    chosen: Chosen = {g.name: (np.arange(math.ceil(share * g.size)), "") for g in groups}
    return _apply(smaller, example_inputs, couplings, chosen, "module").model


def _apply(
    model: nn.Module, example_inputs: Any, couplings: Couplings, chosen: Chosen, form: Form
) -> Report:
    cut = Cut(couplings, {name: kept for name, (kept, why) in chosen.items() if not why})
    before = _parameters(model), _macs(model, example_inputs)
    smaller = model
    if form == "graph":
        smaller = shrink_graph(model, cut, example_inputs)
    else:
        shrink_module(model, cut, example_inputs)
    after = _parameters(smaller), _macs(smaller, example_inputs)
    rows = tuple(_row(g, chosen) for g in couplings.groups if g.name in chosen)
    return Report(smaller, (before[0], after[0]), (before[1], after[1]), rows)


def _chosen(
    model: nn.Module,
    couplings: Couplings,
    amount: float | None,
    keep: Mapping[str, int | Sequence[int]] | None,
    criterion: Criterion,
    statistics: Mapping[str, Statistics],
    kinds: Collection[Kind],
) -> Chosen:
    if (amount is None) == (keep is None) or not 0 <= (amount or 0) < 1:
        raise SpecError(f"give amount (0 to below 1) or keep, not amount={amount}, keep={keep}")
    asked = _asked(couplings, amount, keep, kinds)
    tensors = named_tensors(model)
    out: Chosen = {}
    for group, stay in asked:
        every = np.arange(group.size)
        if group.reason:
            if keep is not None:
                raise SpecError(f"{group.name} cannot lose units: {group.reason}")
            out[group.name] = every, group.reason
        elif not isinstance(stay, int):
            out[group.name] = _units(group, stay), ""
        elif (score := importance(group, tensors, criterion, statistics)) is None:
            out[group.name] = every, f"criterion {criterion!r} says nothing of it"
        else:
            best = torch.argsort(score, descending=True, stable=True)[:stay]
            out[group.name] = np.sort(best.cpu().numpy()), ""
    if not any(not why for _, why in out.values()):
        reasons = [f"{name}: {why}" for name, (_, why) in out.items()][:6]
        raise SpecError(f"{type(model).__name__}: no group can be cut; {'; '.join(reasons)}")
    return out


def _asked(
    couplings: Couplings,
    amount: float | None,
    keep: Mapping[str, int | Sequence[int]] | None,
    kinds: Collection[Kind],
) -> list[tuple[Group, int | Sequence[int]]]:
    """Every group to be cut, with how many or which units stay."""
    if keep is None:
        share = float(amount or 0)
        return [
            (g, g.size - math.floor(share * g.size)) for g in couplings.groups if g.kind in kinds
        ]
    names = {g.name: g for g in couplings.groups}
    for name, stay in keep.items():
        if name not in names:
            raise SpecError(f"no group {name!r}{nearest(name, names)}")
        if isinstance(stay, int) and not 1 <= stay <= names[name].size:
            raise SpecError(f"{name}: keep {stay} of {names[name].size} units")
    return [(names[name], stay) for name, stay in keep.items()]


def _units(group: Group, stay: Sequence[int]) -> Index:
    units = np.unique(np.asarray(list(stay), np.int64))
    if not len(units) or units[0] < 0 or units[-1] >= group.size:
        raise SpecError(f"{group.name}: units must be among 0 to {group.size - 1}, at least one")
    return units


def _row(group: Group, chosen: Chosen) -> Row:
    kept, why = chosen[group.name]
    return Row(group.name, group.kind, group.size, len(kept), why)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-adds of products, convolutions and attention, as torch's FLOP table knows them."""
    args, kwargs = split_inputs(example_inputs)
    counter = _Counter()
    with torch.no_grad(), counter:
        model(*args, **kwargs)
    return counter.flops // 2


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's FlopCounterMode without its module tracker, which some autograd functions break."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            q, k, v = args[:3]  # missing from torch's table
            self.flops += 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out
