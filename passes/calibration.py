"""The calibration engine: stream calibration batches through the model block by block.

Repeated blocks (an `nn.ModuleList` whose members run one after the other) are replayed on their
own, so that only one block's statistics and one set of hidden states are in memory; later blocks
see what compressed earlier blocks really output. Weights outside such blocks are measured with
runs of the whole model, as many Sites at a time as fit in `BUDGET` bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.sites import Site
from sparsefx.passes.blocks import Batch, Blocks, Call, find_blocks, record
from sparsefx.passes.collector import Run
from sparsefx.passes.padding import Kept, kept_tokens

BUDGET = 256 << 20
"""Bytes of second moments held at once."""


@dataclass
class Part:
    """Sites that are compressed together, and how to run what holds them."""

    sites: Sequence[Site]
    run: Run
    """Runs all calibration batches through the part, one at each step of the iterator."""
    kept: Sequence[Kept] = ()
    """Per batch, the tokens that are no padding."""
    module: nn.Module | None = None
    """The block; None where a run is one of the whole model."""
    calls: Sequence[Call] = ()
    hidden: list[Tensor] = field(default_factory=list)
    """What the block gets from the compressed blocks before it, per batch."""
    beside: Run | None = None
    """Takes the dense model through the block, one batch at each step, where that was asked for:
    to be run once, before weights are edited."""
    targets: list[Tensor] = field(default_factory=list)
    """What `beside` made: the dense model's hidden states after the block."""


class Visitor(Protocol):
    """What is done with every part of a model."""

    targets: bool
    """Whether `Part.targets` are wanted: the dense model then runs beside the compressed one."""

    def part(self, part: Part) -> None:
        """Edit the part's weights in place; the next part's inputs come from what they are then."""

    def finish(self, part: Part) -> None:
        """The part's outputs have been passed on: its dense weights are no longer needed."""


def stream(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Any], visitor: Visitor
) -> None:
    """Show every part of the model to `visitor`, in call order."""
    data = [split_inputs(batch) for batch in batches]
    kept = [kept_tokens(named) for _, named in data]
    left = {site.name: site for site in sites}
    with torch.no_grad():
        for blocks in find_blocks(model, sites):
            if _replay(model, blocks, data, kept, visitor):
                for group in blocks.sites:
                    for site in group:
                        left.pop(site.name, None)
        for group in within_budget(list(left.values())):
            part = Part(group, lambda: _run_all(model, data), kept)
            visitor.part(part)
            visitor.finish(part)


def _replay(
    model: nn.Module,
    blocks: Blocks,
    data: Sequence[Batch],
    kept: Sequence[Kept],
    visitor: Visitor,
) -> bool:
    """Stream one chain of blocks; False (nothing done) when they are not called as a chain."""
    recorded = record(model, blocks, data)
    if recorded is None:
        return False
    hidden, calls = recorded
    dense = list(hidden) if visitor.targets else []
    for index, (module, sites) in enumerate(zip(blocks.modules, blocks.sites, strict=True)):
        now = [per_batch[index] for per_batch in calls]

        def run(module: nn.Module = module, now: list[Call] = now) -> Iterator[None]:
            for call, h in zip(now, hidden, strict=True):
                call.run(module, h)
                yield

        def beside(module: nn.Module = module, now: list[Call] = now) -> Iterator[None]:
            for i, call in enumerate(now if visitor.targets else ()):
                dense[i] = call.run(module, dense[i])
                yield

        part = Part(
            sites, run, kept, module, now, hidden, beside if visitor.targets else None, dense
        )
        if sites:
            visitor.part(part)
        else:
            exhaust(beside)
        if index + 1 < len(blocks.modules):
            _advance(module, now, hidden)
        visitor.finish(part)
    return True


def exhaust(run: Run) -> None:
    """Run all batches."""
    for _ in run():
        pass


def _advance(module: nn.Module, calls: Sequence[Call], states: list[Tensor]) -> None:
    for i, state in enumerate(states):
        states[i] = calls[i].run(module, state)


def _run_all(model: nn.Module, data: Sequence[Batch]) -> Iterator[None]:
    for args, kwargs in data:
        model(*args, **kwargs)
        yield


def within_budget(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Runs of Sites whose second moments fit in the budget together."""
    part: list[Site] = []
    size = 0
    for site in sites:
        need = 4 * site.k * site.k
        if part and size + need > BUDGET:
            yield part
            part, size = [], 0
        part.append(site)
        size += need
    if part:
        yield part
