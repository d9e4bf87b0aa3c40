"""Our plans and other quantisers on the same axes: quality against latency and against size.

    python -m benchmarks.frontier                                    # MiniLM, about half an hour
    python -m benchmarks.frontier --case smollm2
    python -m benchmarks.frontier --case minilm --feed 32×64 --only 'auto|8 bit'

Our plans come from `auto` for the rows of the feed; they run in ONNX Runtime with the CPU engine
registered ("in ORT") and eagerly in PyTorch, as peers of both do. Every engine is made, takes turns
with ONNX Runtime's float32 model, is judged and let go: its time is its least as a share of that
model's in the same turns, times the least of all that model's. Each point is kept at once in a
`.partial.json` beside the results, from which a run that was cut off goes on. Writes
`results/frontier-<case>-<feed>-<CPU>.json`, `.png` and `.html`, and the plan file of every target.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import machine
from benchmarks.e2e.base import weight_bytes
from benchmarks.ort_cases import CASES, Call, Case, Feed
from benchmarks.ort_peers import PEERS, Setup, stock, with_library
from benchmarks.peers.round_robin import clock, quiet
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import sparsefx
from sparsefx.models import MODELS
from sparsefx.models.frontier import TARGETS, plan_note
from sparsefx.passes.spec import Spec
from sparsefx.passes.target import Target
from sparsefx.runtime.auto import plans
from sparsefx.runtime.frontier import Frontier, Point, check_packages, describe, write
from sparsefx.runtime.plan_file import write_atomically

RESULTS = Path(__file__).parent / "results"
ROWS = {"1×16": 16, "32×64": 2048, "decode": 1, "prefill 128": 128}
"""Tokens that a feed of `ort_cases` brings at a time."""
METRICS = {"minilm": ("MRR", "higher"), "smollm2": ("perplexity", "lower")}
BUSY = 0.25
"""Cores: beyond this much of other programs' work a run says so."""
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
    """Eager PyTorch: from a feed to the first output; `past_key_values.…` become the cache."""

    def call(feed: Feed) -> list[Any]:
        inputs: dict[str, Any] = {name: torch.from_numpy(value) for name, value in feed.items()}
        past = [inputs.pop(name) for name in feed if name.startswith("past_key_values.")]
        if past:
            inputs |= {"past_key_values": _cache(model, past), "use_cache": True}
        with torch.inference_mode():
            out = model(**inputs)
        return [out[0].float().numpy()]

    return call, weight_bytes(model)


def _cache(model: Any, past: Sequence[torch.Tensor]) -> Any:
    """A cache of keys and values by turns, in the data type of the model's norms."""
    from transformers.cache_utils import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    dtype = next(p.dtype for p in model.parameters() if p.dim() == 1)
    for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(key.to(dtype), value.to(dtype), layer)
    return cache


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
"""Eager."""


def ours(case: Case, spec: Spec, batches: list[Any], path: Path, threads: int) -> dict[str, Made]:
    """The compressed model in ONNX Runtime and in eager PyTorch."""
    wanted = spec.model_copy(update={"overrides": {**case.overrides, **spec.overrides}})
    model = sparsefx.sparsify(
        case.make(), wanted, example_inputs=case.example, calibration=batches, progress=False
    )
    case.export(model, path)
    return {"in ORT": with_library(path, threads), "eager": torch_call(model)}


@dataclass
class Found:
    """What was measured so far, for one picture."""

    path: Path
    key: dict[str, Any]
    """What was asked for: of another run nothing is taken over."""
    points: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By engine the fields of its Points, `ms` as a share of the float32 model's."""
    base: float = 0.0
    """The float32 model's least seconds."""
    others: float = 0.0
    """Cores that other programs used, at most, while an engine was timed."""
    plans: dict[str, str] = field(default_factory=dict)
    """By target the note on its plan, whose file is beside this one."""

    @classmethod
    def so_far(cls, path: Path, key: dict[str, Any]) -> Found:
        """What a run of this `key` that was cut off has left at `path`."""
        held = json.loads(path.read_text()) if path.exists() else {}
        if held.get("key") != key:
            return cls(path, key)
        return cls(path, **held)

    def keep(self) -> None:
        """Write all of it, in one step."""
        fields = {name: value for name, value in vars(self).items() if name != "path"}
        write_atomically(self.path, json.dumps(fields, indent=1).encode())

    def all(self) -> tuple[Point, ...]:
        """The points, in milliseconds."""
        points = [Point(**fields) for made in self.points.values() for fields in made]
        return tuple(replace(p, ms=1000 * p.ms * self.base) for p in points)


def beside(call: Call, dense: Call, feed: Feed, args: argparse.Namespace) -> tuple[float, ...]:
    """Least seconds of both over turns, and the cores that other programs used meanwhile."""
    call(feed), dense(feed)
    start, every, own = time.perf_counter(), machine.cpu_seconds(), time.process_time()
    times: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for run, got in zip((call, dense), times, strict=True):
            if args.threads > 1:  # the other's workers spin for a while
                quiet()
                run(feed)
            got.append(clock(partial(run, feed)))
    wall = time.perf_counter() - start
    others = (machine.cpu_seconds() - every - (time.process_time() - own)) / wall
    return min(times[0]), min(times[1]), max(0.0, others)


def measure(
    case: Case, label: str, specs: Mapping[str, Spec], found: Found, batches: list[Any],
    folder: Path, args: argparse.Namespace, bar: Progress,
) -> None:  # fmt: skip
    """Add the points of every engine to `found`; one that cannot run has a reason for figures."""
    only = re.compile(args.only or "")
    makers = makers_of(case, specs, batches, folder, args.threads)
    makers = {name: make for name, make in makers.items() if only.search(name)}
    dense, feed = stock(folder / "dense.onnx", args.threads)[0], case.feeds[label]
    for name, make in bar.track(makers.items(), description=f"{case.name} {label}"):
        if name in found.points:
            continue
        ours, points = name in specs, []
        try:
            for how, (call, size) in make().items():
                least, base, others = beside(call, dense, feed, args)
                found.base = min(base, found.base or base)
                found.others = max(others, found.others)
                note, full = found.plans.get(name, ""), f"{name} {how}".strip()
                points.append(Point(full, case.quality(call), least / base, size, ours, note))
        except Exception as error:  # peers raise whatever they like
            why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            points.append(Point(name, ours=ours, reason=why))
        found.points[name] = [asdict(point) for point in points]
        found.keep()


def makers_of(
    case: Case, specs: Mapping[str, Spec], batches: list[Any], folder: Path, threads: int
) -> dict[str, Callable[[], dict[str, Made]]]:
    """What makes each engine's runs, peers first."""
    dense = folder / "dense.onnx"
    case.export(case.make(), dense)
    setup = Setup(case, dense, folder, threads)

    def peer(make: Callable[[Setup], Made]) -> dict[str, Made]:
        return {"": make(setup)}

    out: dict[str, Callable[[], dict[str, Made]]] = {
        name: partial(peer, make) for name, make in {**PEERS, **MORE, **TORCH}.items()
    }
    for number, (name, spec) in enumerate(specs.items()):
        out[name] = partial(ours, case, spec, batches, folder / f"ours-{number}.onnx", threads)
    return out


def planned(
    case: Case, label: str, found: Found, batches: list[Any], args: argparse.Namespace
) -> dict[str, Spec]:
    """The plan of every target, from its file where it was made before."""
    goals = [
        Target.read({**dict([t.split("=")]), "rows": ROWS[label], "ignore": tuple(case.overrides)})
        for t in args.targets
    ]
    goals = [goal for goal in goals if re.search(args.only or "", str(goal))]
    files = {
        str(goal): args.out / re.sub(r"[^\w.]+", "-", f"frontier-{case.name}-{goal}.yaml")
        for goal in goals
    }
    known = found.plans.keys() | found.points.keys()  # of the latter those out of reach
    left = [
        g for g in goals
        if str(g) not in known or (str(g) in found.plans and not files[str(g)].exists())
    ]  # fmt: skip
    if left:
        missed: dict[str, str] = {}
        for plan in plans(case.make(), left, calibration=batches, example_inputs=case.example,
                          progress=False, unreachable=missed):  # fmt: skip
            plan.save(files[plan.target])
            found.plans[plan.target] = plan_note(plan)
        for goal, why in missed.items():
            found.points[goal] = [asdict(Point(goal, ours=True, reason=why))]
        found.keep()
    return {target: Spec.read(file) for target, file in files.items() if target in found.plans}


def run(name: str, label: str, args: argparse.Namespace, bar: Progress) -> Frontier:
    """One picture; its plans are written beside it."""
    case, facts = CASES[name](), machine.facts()
    batches = MODELS[name]().calibration(args.calibrate)
    args.out.mkdir(parents=True, exist_ok=True)
    key = {"threads": args.threads, "rounds": args.rounds, "calibrate": args.calibrate,
           "cpu": facts["cpu"], "sparsefx": sparsefx.__version__, **facts["versions"]}  # fmt: skip
    found = Found.so_far(partial_of(name, label, args), key)
    task = bar.add_task(f"{name} {label}: auto", total=None)
    specs = planned(case, label, found, batches, args) | {s: Spec.read(s) for s in SPECS}
    bar.remove_task(task)
    with tempfile.TemporaryDirectory() as folder:
        measure(case, label, specs, found, batches, Path(folder), args, bar)
    metric, better = METRICS[name]
    setting = f"{label}, {args.threads} threads of {facts['cpu']}"
    if found.others > BUSY:
        setting += f"; a busy machine: other programs used up to {found.others:.1f} cores"
    return Frontier(name, metric, better, setting, found.all(), facts)  # type: ignore[arg-type]


def stem_of(name: str, label: str, args: argparse.Namespace) -> Path:
    """Where the files of a picture go, less their endings."""
    out: Path = args.out / f"frontier-{name}-{ROWS[label]}-{machine.slug()}"
    return out


def partial_of(name: str, label: str, args: argparse.Namespace) -> Path:
    """Where points are kept until the picture is drawn."""
    stem = stem_of(name, label, args)
    return stem.with_name(stem.name + ".partial.json")


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
                found, stem = run(name, label, args, bar), stem_of(name, label, args)
                console.print(found.setting, describe(found.points), found.report(),
                              highlight=False, sep="\n")  # fmt: skip
                console.print(*(path.name for path in write(found, stem)), sep="\n")
                partial_of(name, label, args).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
