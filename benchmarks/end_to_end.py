"""Whole models on this CPU: tokens and sentences per second beside quality and size.

    make bench-e2e                                    # everything: an hour or so on 2 cores
    python -m benchmarks.end_to_end --model smollm2 --threads 2 --only 'llama|int4g128'

SmolLM2-135M decodes greedily, 64 tokens after a prompt of 128, one sequence; MiniLM encodes 32
sentences of 64 tokens. Every engine has its own process; they run in turns, and times are medians
over the rounds in which other programs used less than a quarter of a CPU (of all, marked ~, when
there are fewer than three such). Perplexity is that of 6 × 64 held-out tokens after prompts of 128,
fed one by one through the engine itself; MRR is that of `sparsefx demo`. Weights are compressed
without calibration unless --calibrate says otherwise: magnitude pruning, rounding to nearest. All
weights come from a Q4_1 file, so what is called dense is what llama.cpp reads.
A run with --only prints its rows; others, and those with --save, write
`results/end_to_end-<CPU>.json`, where rows of other models and threads stay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from benchmarks import machine
from benchmarks.e2e import DENSE, ENGINES, LLAMA, Settings
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("transformers", "llama-cpp-python", "torchao", "onnxruntime")
SPARE = 4 << 30
"""Bytes of memory that stay free: engines that do not fit at the same time run in another batch."""
CALM, LEAST = 0.25, 3
"""A round counts when others use fewer CPUs than this, if so many rounds do."""
LIMIT = 1800
"""Seconds that an answer may take."""
Row = dict[str, Any]


@dataclass
class Worker:
    """A running process and what it has measured."""

    model: str
    settings: Settings
    rounds: list[dict[str, float]] = field(default_factory=list)
    row: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        threads = str(self.settings.threads)
        self.errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.e2e.worker", self.model,
             json.dumps(asdict(self.settings))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )  # fmt: skip
        self.row = {"engine": self.settings.engine, "model": self.model}
        self.row |= {"threads": self.settings.threads, **self._answer()}

    @property
    def ready(self) -> bool:
        return bool(self.row["event"] == "ready")

    def ask(self, what: str) -> dict[str, Any]:
        """Its answer; {"event": "missing", …} when it died."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        except OSError:
            return self._dead()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        timer = threading.Timer(LIMIT, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        return json.loads(line) if line else self._dead()

    def _dead(self) -> dict[str, Any]:
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1][:200]
        return {"event": "missing", "reason": f"died ({self.process.wait()}): {last}"}

    def turn(self) -> None:
        """Measure once."""
        answer = self.ask("measure")
        if answer.get("event") == "missing":
            self.row |= answer
        else:
            self.rounds.append(answer)

    def close(self) -> Row:
        """End the process; the finished row."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()
        if self.ready:
            calm = [r for r in self.rounds if r["others"] < CALM]
            used = calm if len(calm) >= LEAST else self.rounds
            self.row |= {k: statistics.median(r[k] for r in used) for k in used[0]}
            self.row |= {"rounds": self.rounds, "calm": len(calm) >= LEAST}
        return self.row


def measure(
    model: str, names: list[str], threads: int, args: argparse.Namespace, folder: str, bar: Progress
) -> list[Row]:
    """Rows of these engines, as many at a time as memory holds."""
    rows, left = [], list(names)
    task = bar.add_task("", total=len(names) * (2 + args.rounds))
    while left:
        workers: list[Worker] = []
        while left and (not workers or machine.memory("MemAvailable") > SPARE):
            name = left.pop(0)
            bar.update(task, description=f"{model}, {threads} threads: load {name}")
            workers.append(Worker(model, Settings(name, threads, args.calibrate, folder)))
            bar.advance(task)
        for worker, what in turns(workers, args.rounds):
            bar.update(task, description=f"{model}, {threads} threads: {worker.settings.engine}")
            if worker.ready and what == "measure":
                time.sleep(0.3)  # threads of the one before spin for a while
                worker.turn()
            elif worker.ready:
                worker.row |= worker.ask(what)
            bar.advance(task)
        rows += [worker.close() for worker in workers]
    bar.remove_task(task)
    return rows


def turns(workers: list[Worker], rounds: int) -> Iterator[tuple[Worker, str]]:
    """Whose turn it is, to do what."""
    order = random.Random(0)
    for _ in range(rounds):
        for worker in order.sample(workers, len(workers)):
            yield worker, "measure"
    for worker in workers:
        yield worker, "quality"


def finish(rows: list[Row]) -> None:
    """Rates, and ratios to the reference of the same model and threads."""
    reference = {"smollm2": LLAMA, "minilm": DENSE}
    base = {(r["model"], r["threads"]): r for r in rows if r["engine"] == reference[r["model"]]}
    for row in rows:
        other = base.get((row["model"], row["threads"]), {})
        for part, count in (("prefill", 128), ("decode", 1), ("batch", 32)):
            if part in row:
                row[f"{part}_per_s"] = count / row[part]
                if part in other:
                    row[f"{part}_ratio"] = other[part] / row[part]


HEADS = {
    "smollm2": ("decode\ntokens/s", "×\nllama.cpp", "prefill\nms", "×\nllama.cpp", "perplexity"),
    "minilm": ("sentences\n/s", "×\ntorch fp32", "ms", "", "MRR"),
}


def table(model: str, threads: int, rows: list[Row]) -> Table:
    """What ran, one line per engine."""
    out = Table(title=f"{model}, {threads} threads", box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("engine", *HEADS[model], "model\nMB", "peak\nMB"):
        if head:
            out.add_column(head, justify="left" if head == "engine" else "right", no_wrap=True)
    for row in rows:
        if row["event"] != "ready":
            continue
        parts = ("decode", "prefill") if model == "smollm2" else ("batch",)
        cells = [row["engine"] + ("" if row["calm"] else " ~"), f"{row[parts[0] + '_per_s']:.1f}"]
        cells.append(times(row, parts[0]))
        cells.append(f"{1000 * row[parts[-1]]:.0f}")
        if model == "smollm2":
            cells.append(times(row, "prefill"))
        cells.append(f"{row['quality']:.1f}" if model == "smollm2" else f"{row['quality']:.3f}")
        out.add_row(*cells, f"{row['bytes'] / 1e6:.0f}", f"{row['peak'] / 1e6:.0f}")
    return out


def times(row: Row, part: str) -> str:
    ratio = row.get(f"{part}_ratio")
    return "" if ratio is None else f"{ratio:.2f}"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def others(path: Path, rows: list[Row]) -> list[Row]:
    """Rows that `path` holds of models and thread counts that were not run now."""
    if not path.exists():
        return []
    now = {(row["model"], row["threads"]) for row in rows}
    held: list[Row] = json.loads(path.read_text())["rows"]
    return [row for row in held if (row["model"], row["threads"]) not in now]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end")
    parser.add_argument("--only", metavar="REGEX", help="engines to run, besides the reference")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", choices=list(ENGINES), nargs="+", default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of every engine")
    parser.add_argument("--save", action="store_true", help="write the rows of --only, too")
    parser.add_argument("--calibrate", type=int, default=0, metavar="N", help="calibration inputs")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    rows: list[Row] = []
    only = re.compile(args.only or "")
    facts = machine.facts()
    facts["versions"] |= {name: version(name) for name in PACKAGES}
    columns = (
        TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with tempfile.TemporaryDirectory() as folder, bar:
        for model in args.model:
            names = [n for n in ENGINES[model] if only.search(n) or n in (LLAMA, DENSE)]
            for threads in args.threads:
                found = measure(model, names, threads, args, folder, bar)
                finish(found)
                console.print(table(model, threads, found))
                rows += found
    for row in rows:
        if row["event"] != "ready":
            console.print(f"{row['engine']} ({row['model']}, {row['threads']} threads) "
                          f"did not run: {row['reason']}", highlight=False)  # fmt: skip
    console.print(f"{facts['cpu']}; medians of {args.rounds} turns; ~ other programs were running")
    if args.save or not args.only:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"end_to_end-{machine.slug()}.json"
        rows = others(path, rows) + rows
        settings = {"rounds": args.rounds, "calibrate": args.calibrate}
        path.write_text(json.dumps({"machine": facts, **settings, "rows": rows}, indent=1) + "\n")
        console.print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
