"""Exported files against ONNX Runtime's own quantisers: speed, file size and quality in one run.

    make bench-ort                                     # all three models, about 20 minutes
    python -m benchmarks.ort --case mlp --only 'int4|fp32'

Every engine has a session of its own over one process; they run in turns, in random order, and
times are medians. "stock" rows are our files in ONNX Runtime as installed, the others the same
files with the CPU engine registered. Weights are rounded to nearest and pruned by magnitude, no
calibration. A run with --only prints its rows; others also write `results/ort-<CPU>.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks import machine
from benchmarks.ort_cases import CASES, Call, Case
from benchmarks.ort_peers import PEERS, Setup, stock, with_library
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import sparsefx

RESULTS = Path(__file__).parent / "results"
REFERENCE = "ORT 4 bit block 128"
Row = dict[str, Any]
Made = tuple[Call, int]


def engines(case: Case, folder: Path, threads: int) -> dict[str, Callable[[], Made]]:
    """What runs `case`, by name; each is made when it is called."""
    dense = folder / "dense.onnx"
    case.export(case.make(), dense)
    out: dict[str, Callable[[], Made]] = {}
    for name, peer in PEERS.items():
        out[name] = partial(peer, Setup(case, dense, folder, threads))

    def run(spec: str, how: Callable[[Path, int], Made]) -> Made:
        return how(ours(case, spec, folder), threads)

    for spec in case.specs:
        out[f"{spec}, stock"] = partial(run, spec, stock)
        out[spec] = partial(run, spec, with_library)
    return out


def ours(case: Case, spec: str, folder: Path) -> Path:
    """The compressed model's file, written on first use."""
    path = folder / (re.sub(r"[^\w]+", "-", spec) + ".onnx")
    if not path.exists():
        wanted = {"format": spec, "overrides": dict(case.overrides)}
        model = sparsefx.sparsify(case.make(), wanted, example_inputs=case.example, progress=False)
        case.export(model, path)
    return path


def measure(case: Case, folder: Path, args: argparse.Namespace, bar: Progress) -> list[Row]:
    """Rows of one case: an engine that cannot run has a reason instead of times."""
    rows: list[Row] = []
    calls: dict[str, Call] = {}
    only = re.compile(args.only or "")
    wanted = {n: m for n, m in engines(case, folder, args.threads).items()
              if only.search(n) or n == REFERENCE}  # fmt: skip
    task = bar.add_task("", total=2 * len(wanted) + len(case.feeds) * args.rounds)
    for name, make in wanted.items():
        bar.update(task, description=f"{case.name}: make {name}", advance=1)
        row: Row = {"case": case.name, "engine": name, "threads": args.threads}
        rows.append(row)
        try:
            start = time.perf_counter()
            calls[name], row["bytes"] = make()
            row["load_s"] = time.perf_counter() - start
            calls[name](next(iter(case.feeds.values())))
        except Exception as error:  # peers raise whatever they like
            calls.pop(name, None)
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    for label, feed in case.feeds.items():
        bar.update(task, description=f"{case.name}: time {label}")
        times = interleave(calls, feed, args.rounds, bar, task)
        for row in rows:
            if row["engine"] in times:
                row[label] = statistics.median(times[row["engine"]])
    for row in rows:
        bar.update(task, description=f"{case.name}: quality of {row['engine']}", advance=1)
        if row["engine"] in calls:
            row["quality"] = case.quality(calls[row["engine"]])
    bar.remove_task(task)
    return rows


def interleave(
    calls: dict[str, Call], feed: Any, rounds: int, bar: Progress, task: Any
) -> dict[str, list[float]]:
    """Seconds of every engine's runs, in random order round by round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name](feed)
            times[name].append(time.perf_counter() - start)
        bar.advance(task)
    return times


def table(case: Case, rows: list[Row]) -> Table:
    """Times, ratios to ONNX Runtime's own 4 bits, file and quality."""
    out = Table(title=case.name, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    heads = ["engine"]
    for label in case.feeds:
        heads += [f"{label}\nms", "× ORT\n4b/128"]
    for head in (*heads, "file\nMB", case.measure.replace(" ", "\n"), "load\ns"):
        out.add_column(head, justify="left" if head == "engine" else "right", no_wrap=True)
    base = next((r for r in rows if r["engine"] == REFERENCE), {})
    for row in rows:
        if "reason" in row:
            continue
        cells = [row["engine"]]
        for label in case.feeds:
            cells += [f"{1000 * row[label]:.2f}",
                      f"{base[label] / row[label]:.2f}" if label in base else ""]  # fmt: skip
        out.add_row(*cells, f"{row['bytes'] / 1e6:.1f}", f"{row['quality']:.4g}",
                    f"{row['load_s']:.1f}")  # fmt: skip
    return out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ort", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", metavar="REGEX", help="engines to run, besides the reference")
    parser.add_argument("--case", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args, rows = arguments(), list[Row]()
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    columns = (TextColumn("{task.description:<52}"), BarColumn(24), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        for name in args.case:
            case = CASES[name]()
            with tempfile.TemporaryDirectory() as folder:
                found = measure(case, Path(folder), args, bar)
            console.print(table(case, found))
            for row in found:
                if "reason" in row:
                    why = f"{row['engine']} did not run: {row['reason']}"
                    console.print(why, highlight=False)
            rows += found
    about = machine.facts()
    console.print(f"{about['cpu']}; {args.threads} thread(s); medians of {args.rounds} rounds")
    if not args.only:
        path = RESULTS / f"ort-{machine.slug()}.json"
        # A run of some cases leaves the others' rows as they were.
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        again = {(row["case"], row["threads"]) for row in rows}
        kept = [row for row in before if (row["case"], row["threads"]) not in again]
        result = {"machine": about, "rounds": args.rounds, "rows": kept + rows}
        path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
