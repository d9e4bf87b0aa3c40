"""What merging and fusing buys: whole models through `torch.compile`, with and without the passes.

    python -m benchmarks.merged

SmolLM2 decodes one token after 128 and reads a prompt of 128; MiniLM reads one short sentence and
32 of 64 tokens; weights as below, rounded to nearest, `inner="eager"`. "apart" leaves out
the passes of `APART`; launches are those of the cost model. The engines take turns; times are
medians. Writes `results/merged-<CPU>.json`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks import machine
from benchmarks.frontier import torch_call
from benchmarks.ort_cases import CASES, Call, Case, Feed
from benchmarks.peers.round_robin import clock
from rich.console import Console
from rich.table import Table
from torch import nn

import sparsefx
from sparsefx.passes.manager import Pass, records_of
from sparsefx.passes.pipeline import PASSES
from sparsefx.runtime import backend

RESULTS = Path(__file__).parent / "results"
APART = ("merge_siblings", "fuse_epilogues", "fuse_norms", "fuse_rotary", "group_heads")
SPEC = "int4g128+a8"
ROUNDS = 25
GOALS = {"launches": 0.65, "ms": 1 / 1.15}
"""What is left of each, at most."""


def compiled(case: Case, feed: Feed, passes: Sequence[Pass]) -> tuple[Call, int]:
    """A model compiled for this feed with these passes, and its launches."""
    spec = {"format": SPEC, "overrides": dict(case.overrides)}
    model = sparsefx.sparsify(case.make(), spec, example_inputs=case.example, progress=False)

    def own(gm: Any, inputs: Any) -> Callable[..., Any]:
        """A backend that no other model's compiled code is looked up for."""
        with patch.object(backend, "PASSES", list(passes)):
            return backend.sparsefx(gm, inputs, {"inner": "eager"})

    call, _ = torch_call(_Compiled(model, torch.compile(model, backend=own, dynamic=False)))
    call(feed)
    records = records_of([*model.parameters(), *model.buffers()])
    return call, sum(one[-1].after.launches for one in records)


class _Compiled(nn.Module):
    """What `torch_call` asks a model for, around the compiled one."""

    def __init__(self, model: nn.Module, run: Any) -> None:
        super().__init__()
        self.model, self.run, self.config = model, run, getattr(model, "config", None)

    def forward(self, **inputs: Any) -> Any:
        return self.run(**inputs)


def compare(case: Case, label: str) -> dict[str, Any]:
    """Both ways in turns over one feed."""
    feed = case.feeds[label]
    ways = {
        "apart": [p for p in PASSES if p.name not in APART],
        "together": list(PASSES),
    }
    made = {name: compiled(case, feed, passes) for name, passes in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name, (call, _) in made.items():
            times[name].append(clock(partial(call, feed)))
    torch._dynamo.reset()
    return {
        "case": f"{case.name} {label}",
        "ms": {name: round(1000 * statistics.median(t), 3) for name, t in times.items()},
        "launches": {name: launches for name, (_, launches) in made.items()},
    }


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    cases = [CASES[name]() for name in ("minilm", "smollm2")]
    rows = [compare(case, label) for case in cases for label in case.feeds]
    table = Table(title=f"Merged and fused against apart, {SPEC}, one thread")
    for head in ("case", "launches", "left of them", "ms", "left of them"):
        table.add_column(head, justify="left" if head == "case" else "right")
    for row in rows:
        cells: list[str] = []
        for figure in ("launches", "ms"):
            apart, together = row[figure]["apart"], row[figure]["together"]
            left = together / apart
            verdict = "" if left <= GOALS[figure] else f" (goal {GOALS[figure]:.2f})"
            cells += [f"{apart:g} → {together:g}", f"{left:.2f}{verdict}"]
        table.add_row(row["case"], *cells)
    Console().print(table)
    out = RESULTS / f"merged-{machine.slug()}.json"
    out.write_text(json.dumps({"spec": SPEC, "rows": rows, **machine.facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
