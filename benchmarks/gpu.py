"""Time of one linear layer on this GPU: every kind of stored weight against other engines.

    make bench-gpu                                # 9 minutes; ARGS=--full: all shapes, no limit
    python -m benchmarks.gpu --only 'int4g128$' --m 1,16 --shape 4096x14336
    python -m benchmarks.gpu --rehearse           # no GPU: tiny shapes in Triton's interpreter

All engines of a cell (K×N, M) take turns, each over distinct weights of more than three times the
L2 cache in all, replayed as CUDA graphs (`gpu_timing.py`); times are medians. Bandwidth (a copy, of
bytes read and written) and peaks (cuBLAS bf16, int8) are measured in the same run. "limit" is the
larger of bytes of weight, x and y over bandwidth, and products over the peak; "share" is limit /
time. "error" is the relative RMS error of a sample of results against an fp64 product with the
weights that the engine stores. Kernels are compiled by several processes first (`gpu_warm.py`).
What the time does not suffice for is named. Whole runs are written to `results/gpu-<card>.json` and
`.png`; `--out` writes any run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if "--rehearse" in sys.argv:
    # Triton reads these at its import, which the imports below may cause.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["SPARSEFX_TUNE"] = "off"

import torch
from benchmarks import gpu_cases as cases
from benchmarks.arguments import numbers, shapes
from benchmarks.gpu_goals import GOALS, Results
from benchmarks.gpu_peers import REFERENCE, Peer, peers
from benchmarks.gpu_timing import GPU, copy_bandwidth, facts, peaks
from benchmarks.gpu_warm import Job, compile_all, limit_tuning
from rich import box
from rich.console import Console
from rich.table import Table

TINY = ((128, 32),)
TINY_ROWS = (1, 20)
WARM = 0.36
"""Share of the time that compiling may take."""
TUNE = 3.0
"""Seconds that one search may take."""
REST = 15.0
"""Seconds kept for printing and drawing."""


def results_table(rows: list[cases.Row]) -> Table:
    """Rows of one shape, fastest first within each M."""
    title = f"K×N {rows[0]['k']}×{rows[0]['n']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    heads = ("M", "engine", "µs", "p90", "× cuBLAS", "bits", "share", "of", "error", "kernel")
    for head in heads:
        left = head in ("engine", "of", "kernel")
        table.add_column(head, justify="left" if left else "right", no_wrap=head != "kernel")
    for m in sorted({row["m"] for row in rows}):
        for row in sorted((r for r in rows if r["m"] == m), key=lambda r: float(r["ms"])):
            times, kernel = row["times_reference"], row["kernel"].replace("[", r"\[")
            kernel += " (no graph)" if row["graph"] != "yes" else ""
            table.add_row(
                str(m), row["engine"], f"{1e3 * row['ms']:.1f}", f"{1e3 * row['p90_ms']:.1f}",
                "" if times is None else f"{times:.2f}", f"{row['bits']:.2f}",
                f"{100 * row['share']:.0f}%", row["bound"],
                "" if row["error"] is None else f"{row['error']:.1e}", kernel,
                style="bold" if row["ours"] else "",
            )  # fmt: skip
        table.add_section()
    return table


def goals_table(goals: list[dict[str, Any]]) -> Table:
    """What must be reached, and what was."""
    title = "Numbers to reach (K×N {}×{})".format(*cases.MAIN[0])
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for head in ("", "goal", "wanted", "figure", "worst at"):
        right = head in ("wanted", "figure")
        table.add_column(head, justify="right" if right else "left")
    mark = {True: "[green]reached[/]", False: "[red]not reached[/]", None: "[dim]not measured[/]"}
    for goal in goals:
        figure = "" if goal["figure"] is None else f"{goal['figure']:.2f}"
        table.add_row(mark[goal["met"]], goal["goal"], goal["wanted"], figure, goal["where"])
    return table


def report(result: dict[str, Any], console: Console) -> None:
    """Print the rows, what is missing, the card and the goals."""
    shapes = list(dict.fromkeys((r["k"], r["n"]) for r in result["rows"]))
    for shape in shapes:
        rows = [r for r in result["rows"] if (r["k"], r["n"]) == shape]
        console.print(results_table(rows))
    for reason, engines in result["missing"].items():
        for engine, where in engines.items():
            cells = f" ({', '.join(part for part in where if part)})" * any(where)
            console.print(f"[yellow]not measured[/]: {engine or 'everything'}{cells}: {reason}")
    machine = result["machine"]
    console.print(
        f"{machine['card']}, {machine['processors']} processors; copies {machine['copy_gb_s']:.0f} "
        f"GB/s; peaks bf16 {machine['peak_gop_s']['bf16'] / 1e3:.0f}, "
        f"int8 {machine['peak_gop_s']['int8'] / 1e3:.0f} TOP/s; torch {machine['torch']}, "
        f"triton {machine['triton']}"
    )
    console.print(goals_table(result["goals"]))
    if result["rehearsal"]:
        console.print("[bold]A rehearsal without a GPU: no time above means anything.[/]")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all shapes and no limit of time")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, without a GPU")
    parser.add_argument("--only", metavar="REGEX", help="engines to run besides the reference")
    parser.add_argument("--m", type=numbers, help="rows of x, e.g. 1,16")
    parser.add_argument("--shape", type=shapes, help="KxN, e.g. 4096x14336,8192x8192")
    parser.add_argument("--seconds", type=float, default=0.12, help="replays of an engine")
    parser.add_argument("--minutes", type=float, default=8.7, help="of the whole run")
    parser.add_argument("--candidates", type=int, default=12, help="configurations to try")
    parser.add_argument("--gemlite", default="fast", choices=("default", "fast", "max"),
                        help="how gemlite tunes itself")  # fmt: skip
    parser.add_argument("--out", type=Path, help="where to write, a .json file")
    return parser.parse_args()


def plan(args: argparse.Namespace) -> list[tuple[cases.Shape, int]]:
    """Cells in the order in which they are measured."""
    every = [shape for shapes in cases.SHAPES.values() for shape in shapes]
    shapes = TINY if args.rehearse else every if args.full else cases.MAIN
    rows = TINY_ROWS if args.rehearse else cases.ROWS
    return cases.order(args.shape or shapes, args.m or rows)


def warm(
    cells: list[tuple[cases.Shape, int]], chosen: list[Peer], args: argparse.Namespace,
    seconds: float, console: Console,
) -> None:  # fmt: skip
    """Compile in parallel what tuning will try."""
    names = dict.fromkeys(peer.name.partition(",")[0] for peer in chosen if peer.ours)
    jobs = [Job(name, m, n, k) for (k, n), m in cells for name in names]
    start = time.monotonic()
    done, failed = compile_all(jobs, args.candidates, seconds, torch.bfloat16)
    for why in sorted(failed):
        console.print(f"[yellow]not compiled[/]: {why}")
    console.print(f"compiled for {done} of {len(jobs)} cases in {time.monotonic() - start:.0f} s")


def hasten_interpreter() -> None:
    """Leave out its checks of overflow, which triple the number of operations."""
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def measured(args: argparse.Namespace, start: float, console: Console) -> dict[str, Any]:
    """Everything the run found, as data."""
    seconds = 1e9 if args.full else 60 * args.minutes - REST
    dtype = torch.float16 if args.rehearse else torch.bfloat16
    only = re.compile(args.only or "")
    chosen = [p for p in peers(dtype, args.gemlite) if only.search(p.name) or p.name == REFERENCE]
    cells = plan(args)
    if args.rehearse:
        hasten_interpreter()
    else:
        limit_tuning(args.candidates, TUNE)
        warm(cells, chosen, args, 1e9 if args.full else WARM * seconds, console)
    about = facts()
    machine = about | {"copy_gb_s": copy_bandwidth(), "peak_gop_s": peaks()}
    least = 0 if args.rehearse else cases.least_bytes(about["l2_bytes"])
    run = cases.Run(start + seconds, least, args.seconds, dtype)
    with torch.no_grad():
        cases.measure(cells, chosen, run, lambda text: print(text, file=sys.stderr, flush=True))
    cases.finish(run.rows, machine["copy_gb_s"], machine["peak_gop_s"])
    results = Results(run.rows, TINY[0] if args.rehearse else cases.MAIN[0])
    return {
        "machine": machine,
        "rehearsal": args.rehearse,
        "goals": [goal.judge(results) for goal in GOALS],
        "missing": {
            reason: {engine: sorted(where) for engine, where in engines.items()}
            for reason, engines in run.missing.items()
        },
        "rows": run.rows,
        "seconds": round(time.monotonic() - start),
    }


def write(result: dict[str, Any], path: Path, console: Console) -> None:
    """The data and, where matplotlib is there, the picture beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    console.print(f"wrote {path}")
    try:
        from benchmarks.gpu_plots import draw

        draw(result, path.with_suffix(".png"))
    except ImportError as error:
        console.print(f"no picture: {error}; `python -m benchmarks.gpu_plots {path}` draws it")


def main() -> None:
    """Measure, print, and write unless only a part was asked for."""
    args, start = arguments(), time.monotonic()
    if not GPU and not args.rehearse:
        raise SystemExit("torch finds no GPU here; --rehearse runs the script without one")
    if GPU and args.rehearse:
        raise SystemExit("--rehearse is for machines without a GPU")
    console = Console(width=None if sys.stdout.isatty() else 160)
    result = measured(args, start, console)
    report(result, console)
    console.print(f"{result['seconds']} s")
    slug = re.sub(r"[^a-z0-9]+", "-", result["machine"]["card"].lower()).strip("-")
    part = args.only or args.m or args.shape or args.rehearse
    path = args.out or (None if part else ROOT / "benchmarks" / "results" / f"gpu-{slug}.json")
    if path is not None:
        write(result, path, console)


if __name__ == "__main__":
    main()
