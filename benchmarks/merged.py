"""What merging and fusing buys: whole models through `torch.compile`, with and without the passes.

    python -m benchmarks.merged

SmolLM2 decodes one token after 128 and reads a prompt of 128; MiniLM reads one short sentence and
32 of 64 tokens; weights as below, rounded to nearest, `inner="eager"`; and the same as files in
ONNX Runtime with the CPU engine. "apart" leaves out the passes of `APART`, in files their own
fusions too; launches are those of the cost model, and nodes that ONNX Runtime runs. The engines
take turns; times are medians. Writes `results/merged-<CPU>.json`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks import machine
from benchmarks.frontier import torch_call
from benchmarks.ort_cases import CASES, Call, Case, Feed
from benchmarks.ort_peers import options
from benchmarks.peers.round_robin import clock
from rich.console import Console
from rich.table import Table
from torch import nn

import sparsefx
from sparsefx.codegen import onnx_fusions
from sparsefx.passes.manager import Pass, records_of
from sparsefx.passes.pipeline import PASSES
from sparsefx.runtime import backend, export

RESULTS = Path(__file__).parent / "results"
APART = ("merge_siblings", "fuse_epilogues", "fuse_norms", "fuse_rotary", "group_heads")
SPEC = "int4g128+a8"
ROUNDS = 25
GOALS = {"launches": 0.65, "ms": 1 / 1.15}
"""What is left of each, at most."""


def compressed(case: Case) -> nn.Module:
    spec = {"format": SPEC, "overrides": dict(case.overrides)}
    return sparsefx.sparsify(case.make(), spec, example_inputs=case.example, progress=False)


def compiled(case: Case, feed: Feed, passes: Sequence[Pass]) -> tuple[Call, int]:
    """A model compiled for this feed with these passes, and its launches."""
    model = compressed(case)

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


def ways() -> dict[str, list[Pass]]:
    return {"apart": [p for p in PASSES if p.name not in APART], "together": list(PASSES)}


def compare(case: Case, label: str) -> dict[str, Any]:
    """Both ways in turns over one feed."""
    feed = case.feeds[label]
    made = {name: compiled(case, feed, passes) for name, passes in ways().items()}
    row = in_turns(f"{case.name} {label}", feed, made)
    torch._dynamo.reset()
    return row


def in_turns(name: str, feed: Feed, made: dict[str, tuple[Call, int]]) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for way, (call, _) in made.items():
            times[way].append(clock(partial(call, feed)))
    return {
        "case": name,
        "ms": {way: round(1000 * statistics.median(t), 3) for way, t in times.items()},
        "launches": {way: launches for way, (_, launches) in made.items()},
    }


def compare_files(case: Case) -> list[dict[str, Any]]:
    """The same in ONNX Runtime, for every feed."""
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder, f"{way}.onnx") for way in ways()}
        model = compressed(case)
        case.export(model, files["together"])
        rules = {"Mul": (onnx_fusions._divide,), "Reshape": (onnx_fusions._reshape_once,)}
        with (
            patch.object(export, "PASSES", ways()["apart"]),
            patch.object(export, "engine_norms", lambda model: None),
            patch.object(export, "fuse_attention", lambda model: None),
            patch.object(onnx_fusions, "RULES", rules),
        ):
            case.export(model, files["apart"])
        rows = []
        for label, feed in case.feeds.items():
            made = {way: in_runtime(path, feed) for way, path in files.items()}
            rows.append(in_turns(f"{case.name} {label}, ONNX Runtime", feed, made))
        return rows


def in_runtime(path: Path, feed: Feed) -> tuple[Call, int]:
    """A session's run, and the nodes that it takes."""
    profiled = options(1)
    profiled.enable_profiling, profiled.profile_file_prefix = True, str(path)
    session = sparsefx.ort_session(path, profiled)
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = sum(event["name"].endswith("_kernel_time") for event in events)
    return partial(sparsefx.ort_session(path, options(1)).run, None), nodes


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    cases = [CASES[name]() for name in ("minilm", "smollm2")]
    rows = [compare(case, label) for case in cases for label in case.feeds]
    rows += [row for case in cases for row in compare_files(case)]
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
