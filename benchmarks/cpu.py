"""Time of one linear layer on this CPU: every kind of stored weight against other engines.

    make bench-cpu                                # 5 minutes on 2 cores; ARGS=--full: everything
    python -m benchmarks.cpu --only 'int4g128|ORT 4' --m 1,16 --shape 4096x14336 --threads 2

All engines of a row group run in one process in turns (`peers/round_robin.py`), each over distinct
weights of more than 1.5 × the last-level cache in all (from 100 rows on over 3 weights: a weight is
read once per long product). Times are medians. "limit" is the larger of weight bytes / the read
bandwidth measured in this run and products / the best int8 or bf16 oneDNN product of this run;
"share" is limit / time. "error" is the relative RMS error of the output against an fp64 product
with the weights that the engine stores. Threads are not pinned. A run with --only, --m, --shape or
--threads prints its rows; the others also write `results/cpu-<model>.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arguments import numbers, shapes
from benchmarks.machine import facts, slug
from benchmarks.peers import ENGINES, OURS, READ, REFERENCE
from benchmarks.peers.goals import GOALS, Results, Row
from benchmarks.peers.worker import FEW, LONG, Job
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).parent.parent
SHAPES = ((576, 1536), (2048, 2048), (4096, 4096), (4096, 14336))
"""K × N."""
ROWS = (1, 4, 16, 64, 128, 512)
THREADS = (1, 2)
ALL = list(ENGINES)
KEY = ["int4g128+a8", "bitmap@50%+int4g128+a8", "tile16x1@50%+int4g128+a8", "int8+a8",
       "torch fp32", REFERENCE, "ORT DynamicQuantizeMatMul", READ]  # fmt: skip
"""What the short run measures at other M,"""
FEWER = ["int4g128+a8", "tile16x1@50%+int4g128+a8", REFERENCE, "ORT DynamicQuantizeMatMul", READ]
"""and at other shapes."""


@dataclass
class Run:
    """Everything a run found."""

    rows: list[Row] = field(default_factory=list)
    missing: list[dict[str, Any]] = field(default_factory=list)
    bandwidth: dict[int, float] = field(default_factory=dict)
    """GB/s by number of threads: the fastest method, a stream or the reads between products."""
    peaks: dict[int, dict[str, float]] = field(default_factory=dict)
    """GOP/s of int8 and bf16 products by number of threads."""
    overhead_us: float | None = None
    cores_of_others: float = 0.0
    """The most CPUs that other processes kept busy while a group was timed."""

    def take(self, event: dict[str, Any]) -> None:
        """Add what a worker reported."""
        kind = event.pop("event")
        if kind == "row":
            self.rows.append(event)
        elif kind == "missing":
            self.missing.append(event)
        elif kind == "load":
            self.cores_of_others = max(self.cores_of_others, event["cores_of_others"])
        elif kind == "machine":
            threads = event["threads"]
            for speed in event.get("bandwidth", {}).values():
                self.bandwidth[threads] = max(self.bandwidth.get(threads, 0.0), speed)
            old = self.peaks.setdefault(threads, {})
            for unit, value in event.get("peaks", {}).items():
                old[unit] = max(old.get(unit, 0.0), value)
            if "overhead_us" in event:
                self.overhead_us = min(self.overhead_us or 1e9, event["overhead_us"])

    def finish(self) -> None:
        """Fill in what needs other rows: limits, shares and the ratio to the reference."""
        key = ("k", "n", "m", "threads")
        for row in self.rows:
            if row["engine"] == READ and row["layers"] > FEW:
                seen = row["weight_bytes"] / row["ms"] / 1e6
                self.bandwidth[row["threads"]] = max(self.bandwidth[row["threads"]], seen)
        reference = {tuple(r[x] for x in key): r["ms"] for r in self.rows if is_reference(r)}
        for row in self.rows:
            peak = self.peaks[row["threads"]][row["unit"]]
            products = 2 * row["m"] * row["n"] * row["k"] * row["products"]
            row["memory_ms"] = row["weight_bytes"] / self.bandwidth[row["threads"]] / 1e6
            row["product_ms"] = products / peak / 1e6
            memory = row["memory_ms"] >= row["product_ms"]
            row["bound"] = "memory" if memory else row["unit"]
            row["share"] = max(row["memory_ms"], row["product_ms"]) / row["ms"]
            base = reference.get(tuple(row[x] for x in key))
            row["times_reference"] = None if base is None else base / row["ms"]


def is_reference(row: Row) -> bool:
    return bool(row["engine"] == REFERENCE)


def group(threads: int, m: int, names: list[str]) -> tuple[int, int, list[str]]:
    """A group of a Job; beside long products plain reads tell nothing."""
    return threads, m, [name for name in names if name != READ or m < LONG]


def default_plan(seconds: float) -> list[Job]:
    """The most telling five minutes."""
    two = list(dict.fromkeys([*(peer.name for peer in OURS), *KEY]))
    main = [group(1, 1, ALL), group(1, 128, ALL), *(group(1, m, KEY) for m in (4, 16, 64, 512))]
    main += [group(2, 1, two), group(2, 128, two)]
    short = [group(1, m, FEWER) for m in (1, 128)]
    others = [shape for shape in SHAPES if shape != (4096, 4096)]
    brief = [Job(n, k, short, seconds, machine=False) for k, n in others]
    return [Job(4096, 4096, main, seconds), *brief]


def wanted_plan(args: argparse.Namespace) -> list[Job]:
    """What the command line asks for; the reference always runs too."""
    only = re.compile(args.only or "")
    names = [name for name in ALL if only.search(name) or name in (REFERENCE, READ)]
    every = (SHAPES, ROWS, THREADS) if args.full else (((4096, 4096),), (1, 128), (1,))
    shapes, rows, threads = args.shape or every[0], args.m or every[1], args.threads or every[2]
    # ONNX Runtime's shared pool has one size per process: one number besides 1 in each job.
    more = sorted(set(threads) - {1})
    batches = [[1] * (1 in threads) + more[:1], *([count] for count in more[1:])]
    return [
        Job(n, k, [group(t, m, names) for t in batch for m in rows], args.seconds)
        for k, n in shapes
        for batch in batches
    ]


def run_job(job: Job, run: Run, progress: Progress) -> None:
    """Run a worker, and again without an engine that took it down."""
    k, n = job.k, job.n
    title = f"{k}×{n}"
    task = progress.add_task(title, total=job.steps)
    command = [sys.executable, "-m", "benchmarks.peers.worker", json.dumps(asdict(job))]
    last: dict[str, Any] = {}
    events: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
        ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                event = json.loads(line)
                if event["event"] == "start":
                    last = event
                    progress.update(task, advance=1, description=f"{title}: {event['engine']}")
                else:
                    events.append({"k": k, "n": n, **event})
        progress.update(task, description=title, completed=job.steps)
        if worker.returncode == 0:
            for event in events:
                run.take(event)
            return
        log.seek(0)
        tail = log.read()[-600:]
    if last.get("step") not in ("build", "warm"):
        raise SystemExit(f"the worker for {title} ended with {worker.returncode}:\n{tail}")
    why = f"the process ended with {worker.returncode}"
    gone = {"k": k, "n": n, "threads": None, "engine": last["engine"], "m": None, "reason": why}
    run.missing.append(gone)
    run_job(job.without(last["engine"]), run, progress)


def results_table(rows: list[Row]) -> Table:
    """Rows of one shape and thread count, fastest first within each M."""
    first = rows[0]
    title = f"K×N {first['k']}×{first['n']}, {first['threads']} thread(s)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    heads = ("M", "engine", "ms", "p90", "× ORT 4b", "weight MB", "share", "of limit", "error")
    for head in heads:
        left = head in ("engine", "of limit")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    for m in sorted({row["m"] for row in rows}):
        for row in sorted((r for r in rows if r["m"] == m), key=lambda r: float(r["ms"])):
            times = row["times_reference"]
            style = "bold" if row["ours"] else "dim" if row["engine"] == READ else ""
            table.add_row(
                str(m), row["engine"].replace("[", r"\["), f"{row['ms']:.3f}",
                f"{row['p90_ms']:.3f}", "" if times is None else f"{times:.2f}",
                f"{row['weight_bytes'] / 1e6:.2f}", f"{100 * row['share']:.0f}%", row["bound"],
                "" if row["error"] is None else f"{row['error']:.1e}", style=style,
            )  # fmt: skip
        table.add_section()
    return table


def goals_table(goals: list[dict[str, Any]]) -> Table:
    """What must be reached, and what was."""
    title = "Numbers to reach (K×N 4096×4096)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for head in ("", "goal", "wanted", "figure"):
        left = head in ("", "goal")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    for goal in goals:
        mark = {True: "[green]pass[/]", False: "[red]fail[/]", None: "[dim]not measured[/]"}
        figure = "" if goal["figure"] is None else f"{goal['figure']:.2f}"
        table.add_row(mark[goal["met"]], goal["goal"], goal["wanted"], figure)
    return table


def report(run: Run, about: dict[str, Any], goals: list[dict[str, Any]], console: Console) -> None:
    """Print the machine, the rows, what is missing and the goals."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in run.rows:
        groups.setdefault((row["k"], row["n"], row["threads"]), []).append(row)
    for rows in groups.values():
        console.print(results_table(rows))
    for name in sorted({row["kernel"] for row in run.rows if row["kernel"]}):
        count = sum(row["kernel"] == name for row in run.rows)
        console.print(f"kernel {name}: {count} rows")
    if run.cores_of_others > 0.1:
        busy = f"other processes kept up to {run.cores_of_others:.1f} CPUs busy while timing"
        console.print(f"[yellow]not a quiet machine[/]: {busy}")
    for gone in run.missing:
        where = f"{gone['k']}×{gone['n']}"
        where += "".join(f", {x} {gone[x]}" for x in ("threads", "m") if gone[x])
        console.print(f"[yellow]not measured[/]: {gone['engine']} ({where}): {gone['reason']}")
    cache = ", ".join(f"{k} {v / 2**20:.3g} MB" for k, v in about["caches"].items())
    console.print(f"{about['cpu']}, {about['cores']} cores, {cache}; {' '.join(about['isa'])}")
    for threads, speed in run.bandwidth.items():
        peak = ", ".join(f"{u} {v / 1000:.2f} TOP/s" for u, v in run.peaks[threads].items())
        console.print(f"{threads} thread(s): reads {speed:.1f} GB/s; achieved peak {peak}")
    if goals:
        console.print(goals_table(goals))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all shapes, M, threads and engines")
    parser.add_argument("--only", metavar="REGEX", help="engines to run besides the reference")
    parser.add_argument("--m", type=numbers, help="rows of x, e.g. 1,128")
    parser.add_argument("--shape", type=shapes, help="KxN, e.g. 4096x4096,2048x2048")
    parser.add_argument("--threads", type=numbers, help="e.g. 1,2")
    parser.add_argument("--seconds", type=float, default=0.5, help="limit of a row's timed calls")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write unless only a part was asked for."""
    args, start = arguments(), time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 110)
    part = bool(args.only or args.m or args.shape or args.threads)
    jobs = wanted_plan(args) if part or args.full else default_plan(args.seconds)
    about, run = facts(), Run()
    columns = (TextColumn("{task.description:<52}"), BarColumn(24), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for job in jobs:
            run_job(job, run, progress)
    run.finish()
    goals = [goal.judge(Results(run.rows, run.overhead_us)) for goal in GOALS]
    report(run, about, [g for g in goals if not part or g["figure"] is not None], console)
    seconds = round(time.perf_counter() - start)
    console.print(f"{seconds} s")
    if part:
        return
    path = ROOT / "benchmarks" / "results" / f"cpu-{slug()}.json"
    machine = about | {"bandwidth_gb_s": run.bandwidth, "peak_gop_s": run.peaks}
    machine |= {"cores_of_others": run.cores_of_others, "op_overhead_us": run.overhead_us}
    machine |= {"seconds": seconds, "full": args.full}
    result = {"machine": machine, "goals": goals, "missing": run.missing, "rows": run.rows}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    from benchmarks.plots import draw

    draw(result, path.with_suffix(".png"))
    console.print(f"wrote {path.relative_to(ROOT)} and .png")


if __name__ == "__main__":
    main()
