"""`sparsefx demo`: real models compressed a few ways, and one honest table for each."""

from __future__ import annotations

import copy
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    "smollm2": (Recipe("int8"), Recipe("int4g64"), Recipe("bitmap@50%+int4g128", 8)),
    "minilm": (Recipe("int8+a8"), Recipe("2:4+int8", 8), Recipe("bitmap@50%+int4g128", 8)),
    "antiberty": (Recipe("int4g128"), Recipe("2:4+int8", 4), Recipe("tile16x1@25%+int4g128", 4)),
}
STEPS = ("compress", "quality", "save", "export", "compile", "time")


@dataclass
class Row:
    """One line of the table; sizes in bytes, times in milliseconds, differences of outputs."""

    spec: str
    bits: float
    quality: float
    weights: int
    onnx: int
    ms: dict[str, float]
    apart: dict[str, float]
    peak: int = 0


def demo(names: Sequence[str], out: Path, console: Console | None = None) -> None:
    """Compress each model, write its artifacts under `out` and print its table."""
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    bar = Progress(
        TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            total = 1 + len(STEPS) * (1 + len(RECIPES[name]))
            task = bar.add_task(f"{name}: load", total=total)

            def step(text: str, name: str = name, task: Any = task) -> None:
                bar.update(task, advance=1, description=f"{name}: {text}")

            bundle = MODELS[name]()
            rows = [_measure(bundle, None, out, step)]
            rows += [_measure(bundle, recipe, out, step) for recipe in RECIPES[name]]
            bar.remove_task(task)
            console.print(_table(bundle, rows))
    console.print(_next_steps(out, time.perf_counter() - start), highlight=False)


def _measure(bundle: Bundle, recipe: Recipe | None, out: Path, step: Callable[[str], None]) -> Row:
    """Everything the table says about one model and recipe (None: left dense)."""
    spec = recipe.spec if recipe else "dense"
    stem = f"{bundle.name}-{spec}".translate(str.maketrans("@%:+", "----")).replace("--", "-")
    model, bits, peak = bundle.model, 32.0, 0
    step(f"compress to {spec}")
    if recipe:
        batches = bundle.calibration(recipe.calibration) if recipe.calibration else None
        model = sparsefx.sparsify(
            copy.deepcopy(bundle.model), spec, example_inputs=bundle.example_inputs,
            calibration=batches, progress=False,
        )  # fmt: skip
        packed = [m.packed for m in packed_modules(model).values()]
        bits = 8 * sum(p.stored_bytes for p in packed) / sum(p.n * p.k for p in packed)
        peak = sparsefx.explain(model).peak_bytes
    step(f"quality of {spec}")
    quality = bundle.metric(model)[bundle.headline]
    step(f"save {spec}")
    sparsefx.save(model, out / stem)
    weights = sum(f.stat().st_size for f in (out / stem).glob("*.safetensors"))
    step(f"export {spec} to ONNX")
    report = sparsefx.export_onnx(
        model, out / f"{stem}.onnx", bundle.example_inputs, bundle.dynamic_shapes,
        verify=recipe is not None,
    )  # fmt: skip
    step(f"compile {spec}")
    runs = _runs(model, out / f"{stem}.onnx", bundle.example_inputs, compiled=recipe is not None)
    first = {name: run() for name, run in runs.items()}
    step(f"time {spec}")
    apart = {k: _apart(first["eager"], y) for k, y in first.items() if k != "eager"}
    row = Row(spec, bits, quality, weights, report.bytes, _milliseconds(runs), apart, peak)
    torch._dynamo.reset()
    gc.collect()
    return row


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


def _milliseconds(runs: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Median time of each run, interleaved so that the machine's moods hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def _table(bundle: Bundle, rows: Sequence[Row]) -> Table:
    shape = " ".join(f"{k} {tuple(v.shape)}" for k, v in bundle.example_inputs.items())
    arrow = "↓" if bundle.better == "lower" else "↑"
    table = Table(title=f"{bundle.name} · {shape}", title_justify="left")
    for head in (
        "spec", "bits/weight", "safetensors", "ONNX", f"{bundle.headline} {arrow}",
        "eager ms", "compile ms", "ORT ms", "Δ compile", "Δ ORT",
    ):  # fmt: skip
        table.add_column(head, justify="left" if head == "spec" else "right")
    for row in rows:
        table.add_row(
            row.spec, f"{row.bits:.2f}", f"{row.weights / 1e6:.1f} MB", f"{row.onnx / 1e6:.1f} MB",
            f"{row.quality:.3f}",
            *(f"{row.ms[k]:.1f}" if k in row.ms else "" for k in ("eager", "compile", "ort")),
            *(f"{row.apart[k]:.1e}" if k in row.apart else "" for k in ("compile", "ort")),
        )  # fmt: skip
    return table


def _next_steps(out: Path, seconds: float) -> str:
    return (
        f"Done in {seconds:.0f} s; artifacts are in {out}/. bits/weight counts the packed weights "
        "alone, the sizes count whole files, embeddings included.\n"
        "Δ is the greatest difference from eager; compile is torch.compile(backend=\"sparsefx\", "
        "inner eager); times are medians on this machine.\n"
        "A packed weight without a fast kernel is unpacked at every call: slower than dense in "
        "PyTorch, and `sparsefx explain` says so. In ONNX Runtime 4-bit weights run packed.\n\n"
        "Try next:\n"
        "  sparsefx explain minilm --spec 2:4+int8          why each weight is what it is\n"
        "  sparsefx compress minilm --spec bitmap@50%+int4g128 --calibrate 8 --out my-minilm\n"
        "  sparsefx export minilm --spec int4g128 --out my-minilm.onnx"
    )
