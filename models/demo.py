"""`sparsefx demo`: real models compressed a few ways, and one honest table for each."""

from __future__ import annotations

import contextlib
import copy
import functools
import multiprocessing
import queue
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparsefx
from sparsefx.models import MODELS, Bundle
from sparsefx.runtime.install import packed_modules


@dataclass(frozen=True)
class Recipe:
    """A spec, and how many calibration inputs it gets (0: by magnitude and rounding)."""

    spec: str
    calibration: int = 0


RECIPES: Mapping[str, Sequence[Recipe]] = {
    "smollm2": (Recipe("int4g64"), Recipe("bitmap@50%+int4g128", 4)),
    "minilm": (Recipe("int8+a8"), Recipe("bitmap@50%+int4g128", 2)),
    "antiberty": (Recipe("int4g128"), Recipe("2:4+int8", 4)),
}
DENSE = Recipe("dense")
FIXED = ("smollm2",)
"""Exported here with fixed shapes: tracing 30 layers with symbolic ones takes a minute longer."""
STEPS = 5
"""Steps per recipe: load, compress, quality, save, export."""


@dataclass
class Row:
    """One line of the table; sizes in bytes, times in milliseconds, differences of outputs."""

    spec: str
    stem: str
    bits: float
    quality: float
    weights: int
    onnx: int
    ms: dict[str, float] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)


def demo(names: Sequence[str], out: Path, console: Console | None = None) -> None:
    """Compress each model, write its artifacts under `out` and print its table.

    Two processes compress and export; then everything is timed alone, from the saved artifacts.
    """
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    bar = Progress(
        TextColumn("{task.description:<46}"), BarColumn(),
        TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, rows in _prepare_all(names, out, bar).items():
            bundle = MODELS[name]()
            task = bar.add_task(f"{name}: time", total=len(rows))
            for row in rows:
                bar.update(task, description=f"{name}: time {row.spec}")
                _time(bundle, row, out)
                bar.advance(task)
            bar.remove_task(task)
            console.print(_table(bundle, rows), "")
    console.print(_next_steps(out, time.perf_counter() - start), highlight=False)


def _prepare_all(names: Sequence[str], out: Path, bar: Progress) -> dict[str, list[Row]]:
    """Rows of every model without times. Two processes take recipe after recipe, the longest first:
    what a model's calibrated recipe takes is about what all the rest of it takes.
    """
    context = multiprocessing.get_context("spawn")
    recipes = {name: (DENSE, *RECIPES[name]) for name in names}
    with context.Manager() as manager, ProcessPoolExecutor(2, mp_context=context) as pool:
        events = manager.Queue()
        futures = {
            (name, recipe): pool.submit(_prepare, name, recipe, out, events)
            for name in names
            for recipe in sorted(recipes[name], key=lambda r: (-r.calibration, r is DENSE))
        }
        tasks = {
            name: bar.add_task(f"{name}: waiting", total=STEPS * len(recipes[name]))
            for name in names
        }
        while not all(future.done() for future in futures.values()):
            with contextlib.suppress(queue.Empty):
                name, text = events.get(timeout=0.2)
                bar.update(tasks[name], advance=1, description=f"{name}: {text}")
        for task in tasks.values():
            bar.remove_task(task)
        return {name: [futures[name, r].result() for r in recipes[name]] for name in names}


def _prepare(name: str, recipe: Recipe, out: Path, events: Any) -> Row:
    """Compress, judge, save and export one model with one recipe, on one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    events.put((name, f"load for {recipe.spec}"))
    return _measure(_loaded(name), recipe, out, lambda text: events.put((name, text)))


@functools.lru_cache(maxsize=1)
def _loaded(name: str) -> Bundle:
    """The model that this process works on; the next one takes its place."""
    return MODELS[name]()


def _measure(bundle: Bundle, recipe: Recipe, out: Path, step: Callable[[str], None]) -> Row:
    """Everything the table says about one model and recipe but times."""
    spec, model, bits = recipe.spec, bundle.model, 32.0
    stem = f"{bundle.name}-{spec}".translate(str.maketrans("@%:+", "----")).replace("--", "-")
    step(f"compress to {spec}")
    if recipe != DENSE:
        batches = bundle.calibration(recipe.calibration) if recipe.calibration else None
        model = sparsefx.sparsify(
            copy.deepcopy(bundle.model), spec, example_inputs=bundle.example_inputs,
            calibration=batches, progress=False,
        )  # fmt: skip
        packed = [m.packed for m in packed_modules(model).values()]
        bits = 8 * sum(p.stored_bytes for p in packed) / sum(p.n * p.k for p in packed)
    step(f"quality of {spec}")
    quality = bundle.metric(model)[bundle.headline]
    step(f"save {spec}")
    sparsefx.save(model, out / stem)
    weights = sum(f.stat().st_size for f in (out / stem).glob("*.safetensors"))
    step(f"export {spec} to ONNX and check it")
    shapes = None if bundle.name in FIXED else bundle.dynamic_shapes
    report = sparsefx.export_onnx(
        model, out / f"{stem}.onnx", bundle.example_inputs, shapes,
        verify=recipe != DENSE,
    )  # fmt: skip
    return Row(spec, stem, bits, quality, weights, report.bytes)


def _time(bundle: Bundle, row: Row, out: Path) -> None:
    """Fill in times and differences, with the model loaded back from its artifact."""
    model = bundle.model
    if row.spec != DENSE.spec:
        model = sparsefx.load(out / row.stem, copy.deepcopy(bundle.model))
    runs = _runs(model, out / f"{row.stem}.onnx", bundle.example_inputs, row.spec != DENSE.spec)
    first = {name: run() for name, run in runs.items()}
    row.apart = {k: _apart(first["eager"], y) for k, y in first.items() if k != "eager"}
    row.ms = _milliseconds(runs)
    torch._dynamo.reset()


def _runs(
    model: nn.Module, onnx: Path, inputs: dict[str, Tensor], compiled: bool
) -> dict[str, Callable[[], list[Tensor]]]:
    """The same inputs through eager, torch.compile and ONNX Runtime: each returns its outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    feed = {k: v.numpy() for k, v in inputs.items()}

    def module(run: Callable[..., Any]) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            with torch.inference_mode():
                return [t for t in tree_leaves(run(**inputs)) if isinstance(t, Tensor)]

        return call

    runs = {"eager": module(model)}
    if compiled:
        fast = torch.compile(model, backend="sparsefx", options={"inner": "eager"})
        runs["compile"] = module(fast)
    runs["ort"] = lambda: [torch.from_numpy(y) for y in session.run(None, feed)]
    return runs


def _apart(want: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Greatest absolute difference over all outputs."""
    return max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True))


def _milliseconds(runs: Mapping[str, Callable[[], Any]], rounds: int = 3) -> dict[str, float]:
    """Median time of each run, interleaved so that the machine's moods hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def _table(bundle: Bundle, rows: Sequence[Row]) -> Table:
    """At most 80 columns wide, so that no terminal cuts it."""
    shape = ", ".join(f"{k} {tuple(v.shape)}" for k, v in list(bundle.example_inputs.items())[:1])
    arrow = "↓" if bundle.better == "lower" else "↑"
    table = Table(
        title=f"{bundle.name} · {shape}", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    for head in (
        "spec", "bits", "file\nMB", "ONNX\nMB", f"{bundle.headline}\n{arrow}",
        "eager\nms", "comp.\nms", "ORT\nms", "apart\nby",
    ):  # fmt: skip
        table.add_column(head, justify="left" if head == "spec" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.spec, f"{row.bits:.2f}", f"{row.weights / 1e6:.1f}", f"{row.onnx / 1e6:.1f}",
            f"{row.quality:.3f}",
            *(f"{row.ms[k]:.0f}" if k in row.ms else "–" for k in ("eager", "compile", "ort")),
            f"{max(row.apart.values()):.0e}",
        )  # fmt: skip
    return table


def _next_steps(out: Path, seconds: float) -> str:
    return f"""Done in {seconds:.0f} s; artifacts are in {out}/.
bits      stored per packed weight; MB are whole files, embeddings included
comp.     torch.compile(model, backend="sparsefx", options={{"inner": "eager"}})
apart by  greatest difference between eager, compiled and ONNX Runtime outputs
ORT       stock ONNX Runtime; sparsefx.ort_session(path) runs the same file
          with the CPU engine
`sparsefx explain` names the kernel of every weight, and why.

Try next, with .venv/bin/ in front:
  sparsefx explain minilm --spec 2:4+int8
  sparsefx compress minilm --spec bitmap@50%+int4g128 --calibrate 2 --out mine
  sparsefx export minilm --spec int4g128 --out mine.onnx
"""
