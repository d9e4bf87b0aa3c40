"""Our plans and other quantisers on the same axes: quality against latency and against size.

    python -m benchmarks.frontier                                    # MiniLM, about half an hour
    python -m benchmarks.frontier --case minilm --feed 32×64 --only 'auto|8 bit'

Everything runs in one process, in turns and in random order; times are medians. Our plans come from
`auto` for the rows of the feed, are exported and run in ONNX Runtime with the CPU engine registered
("in ORT") and, for MiniLM, eagerly in PyTorch. Writes `results/frontier-<case>-<feed>-<CPU>.json`,
`.png` and `.html`, and beside them the plan file of every point.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import machine
from benchmarks.e2e.base import weight_bytes
from benchmarks.ort import interleave
from benchmarks.ort_cases import CASES, Call, Case, Feed
from benchmarks.ort_peers import PEERS, Setup, stock, with_library
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import sparsefx
from sparsefx.models import MODELS
from sparsefx.models.frontier import TARGETS, plan_note
from sparsefx.passes.spec import Spec
from sparsefx.runtime.auto import plans
from sparsefx.runtime.frontier import Frontier, Point, check_packages, describe, write
from sparsefx.runtime.plan_file import Plan

RESULTS = Path(__file__).parent / "results"
ROWS = {"1×16": 16, "32×64": 2048, "decode": 1, "prefill 128": 128}
"""Tokens that a feed of `ort_cases` brings at a time."""
METRICS = {"minilm": ("MRR", "higher"), "smollm2": ("perplexity", "lower")}
SPECS = ("int8+a8", "int4g128+a8", "bitmap@50%+int4g128+a8")
Made = tuple[Call, int]


def more_bits(setup: Setup, *, bits: int, how: str = "round") -> Made:
    """MatMulNBits with other than 4 bits, blocks of 128, int8 activations."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nb

    path = setup.folder / f"nbits-{bits}-{how}.onnx"
    if how == "hqq":
        config: Any = nb.HQQWeightOnlyQuantConfig(bits=bits, block_size=128)
    else:
        config = nb.DefaultWeightOnlyQuantConfig(
            bits=bits, block_size=128, is_symmetric=True, accuracy_level=4
        )
    maker = nb.MatMulNBitsQuantizer(
        str(setup.dense), bits=bits, block_size=128, accuracy_level=4, algo_config=config
    )
    maker.process()
    maker.model.save_model_to_file(str(path))
    return stock(path, setup.threads)


def torch_call(model: nn.Module) -> Made:
    """An encoder in eager PyTorch: from a feed to its first output."""

    def call(feed: Feed) -> list[Any]:
        with torch.inference_mode():
            out = model(**{name: torch.from_numpy(value) for name, value in feed.items()})
        return [out.last_hidden_state.float().numpy()]

    return call, weight_bytes(model)


def torch_bf16(setup: Setup) -> Made:
    return torch_call(setup.case.make().bfloat16())


def torch_dynamic_int8(setup: Setup) -> Made:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    return torch_call(quantize(setup.case.make(), {nn.Linear}))


def torchao_int8(setup: Setup) -> Made:
    ao: Any = import_module("torchao.quantization")
    model = setup.case.make().bfloat16()  # its integer kernels for CPUs take bf16 activations
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())
    return torch_call(model)


MORE: Mapping[str, Callable[[Setup], Made]] = {
    "ORT 8 bit block 128": partial(more_bits, bits=8),
    "ORT 2 bit block 128": partial(more_bits, bits=2),
    "ORT 2 bit block 128 HQQ": partial(more_bits, bits=2, how="hqq"),
}
TORCH: Mapping[str, Callable[[Setup], Made]] = {
    "torch fp32": lambda setup: torch_call(setup.case.make()),
    "torch bf16": torch_bf16,
    "torch dynamic int8": torch_dynamic_int8,
    "torchao int8": torchao_int8,
}
"""Eager; of encoders only."""


def ours(case: Case, spec: Spec, batches: list[Any], path: Path, threads: int) -> dict[str, Made]:
    """The compressed model in ONNX Runtime and, if it is an encoder, in eager PyTorch."""
    wanted = spec.model_copy(update={"overrides": {**case.overrides, **spec.overrides}})
    model = sparsefx.sparsify(
        case.make(), wanted, example_inputs=case.example, calibration=batches, progress=False
    )
    case.export(model, path)
    out = {"in ORT": with_library(path, threads)}
    if case.name == "minilm":
        out["eager"] = torch_call(model)
    return out


def measure(
    case: Case, label: str, made: list[Plan], batches: list[Any], folder: Path,
    args: argparse.Namespace, bar: Progress,
) -> tuple[Point, ...]:  # fmt: skip
    """All points of one feed: one that cannot run has a reason instead of figures."""
    only = re.compile(args.only or "")
    specs = {plan.target: plan.spec for plan in made} | {s: Spec.read(s) for s in SPECS}
    makers = makers_of(case, specs, batches, folder, args.threads)
    makers = {name: make for name, make in makers.items() if only.search(name)}
    runs: dict[str, Made] = {}
    failed: list[Point] = []
    task = bar.add_task("", total=len(makers) + args.rounds)
    for name, make in makers.items():
        bar.update(task, description=f"{case.name} {label}: make {name}", advance=1)
        try:
            for how, (call, size) in make().items():
                call(case.feeds[label])
                runs[f"{name} {how}".strip()] = call, size
        except Exception as error:  # peers raise whatever they like
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            failed.append(Point(name, ours=name in specs, reason=why))
    bar.update(task, description=f"{case.name} {label}: time")
    calls = {name: call for name, (call, _) in runs.items()}
    times = interleave(calls, case.feeds[label], args.rounds, bar, task)
    bar.remove_task(task)
    points = []
    for name, (call, size) in bar.track(runs.items(), description=f"{case.name}: judge"):
        base, ms = re.sub(" (in ORT|eager)$", "", name), 1000 * statistics.median(times[name])
        note = next((plan_note(plan) for plan in made if plan.target == base), "")
        points.append(Point(name, case.quality(call), ms, size, base in specs, note))
    return (*points, *failed)


def makers_of(
    case: Case, specs: Mapping[str, Spec], batches: list[Any], folder: Path, threads: int
) -> dict[str, Callable[[], dict[str, Made]]]:
    """What makes each engine's runs, peers first."""
    dense = folder / "dense.onnx"
    case.export(case.make(), dense)
    setup = Setup(case, dense, folder, threads)

    def peer(make: Callable[[Setup], Made]) -> dict[str, Made]:
        return {"": make(setup)}

    peers = {**PEERS, **MORE, **(TORCH if case.name == "minilm" else {})}
    out: dict[str, Callable[[], dict[str, Made]]] = {
        name: partial(peer, make) for name, make in peers.items()
    }
    for number, (name, spec) in enumerate(specs.items()):
        out[name] = partial(ours, case, spec, batches, folder / f"ours-{number}.onnx", threads)
    return out


def run(name: str, label: str, args: argparse.Namespace, bar: Progress) -> Frontier:
    """One picture; its plans are written beside it."""
    case, bundle = CASES[name](), MODELS[name]()
    batches = bundle.calibration(args.calibrate)
    goals = [
        {**dict([target.split("=")]), "rows": ROWS[label], "ignore": tuple(case.overrides)}
        for target in args.targets
    ]
    task = bar.add_task(f"{name} {label}: auto", total=None)
    made = plans(
        case.make(), goals, calibration=batches, example_inputs=case.example, progress=False
    )  # fmt: skip
    bar.remove_task(task)
    with tempfile.TemporaryDirectory() as folder:
        points = measure(case, label, made, batches, Path(folder), args, bar)
    args.out.mkdir(parents=True, exist_ok=True)
    for plan in made:
        text = re.sub(r"[^\w.]+", "-", plan.target)
        plan.save(args.out / f"frontier-{name}-{ROWS[label]}-{text}.yaml")
    metric, better = METRICS[name]
    setting = f"{label}, {args.threads} threads of {machine.cpu_model()}"
    facts = machine.facts()
    return Frontier(name, metric, better, setting, points, facts)  # type: ignore[arg-type]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frontier", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--case", choices=list(METRICS), nargs="+", default=["minilm"])
    parser.add_argument("--feed", choices=list(ROWS), nargs="+", default=list(ROWS))
    parser.add_argument("--only", metavar="REGEX", help="engines and specs to run")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calibrate", type=int, default=8, metavar="N", help="calibration inputs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    check_packages()
    args, console = arguments(), Console()
    torch.set_num_threads(args.threads)
    np.seterr(all="ignore")
    warnings.simplefilter("ignore")
    columns = (TextColumn("{task.description:<60}"), BarColumn(24), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        for name in args.case:
            for label in args.feed:
                if label not in CASES[name]().feeds:
                    continue
                found = run(name, label, args, bar)
                stem = args.out / f"frontier-{name}-{ROWS[label]}-{machine.slug()}"
                console.print(describe(found.points), found.report(), highlight=False, sep="\n")
                console.print(*(path.name for path in write(found, stem)), sep="\n")


if __name__ == "__main__":
    main()
