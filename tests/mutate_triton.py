"""Breaks the Triton kernels on purpose, one fault at a time: their tests must notice each.

`make test-mutations-triton`; no GPU is needed. Fails if a fault goes unnoticed or no longer fits
the source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: F401
import pytest
import torch
import triton  # noqa: F401
from rich.console import Console
from rich.table import Table

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, FOLDER = Path("src/sparsefx"), Path("codegen")
TESTS = ["tests/test_triton.py", "tests/test_triton_pack.py"]
SKIPPED = ["tests/test_triton.py::test_any_product"]
"""Samples: what only they notice deserves a test."""
TIMEOUT = 600
CAUGHT, SURVIVED, STALE = "caught", "SURVIVED", "no longer applies"


class Mutation(NamedTuple):
    """One fault in `codegen/`: text that occurs once, what replaces it, what that breaks."""

    file: str
    old: str
    new: str
    breaks: str


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    file: str
    fault: str
    verdict: str
    caught_by: str = ""
    seconds: float = 0


ROWS = "    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)\n"
# fmt: off
KERNELS = [
    ("codes | 0x6400", "codes | 0x6401", "even codes one off in float16"),
    ("(zeros + (128 + OFFSET))", "(zeros + (127 + OFFSET))", "bfloat16 codes one off"),
    ("(zeros + (8388608 + OFFSET)).to(tl.float32)", "(8388608.0 + OFFSET)",
     "zero point skipped where products are vectors"),
    ("return (codes - (zeros + OFFSET)).to(tl.int8)", "return (codes - OFFSET).to(tl.int8)",
     "zero point skipped with int8 activations"),
    (">> (part * WIDTH)) & ((1 << WIDTH) - 1)", ">> (part * WIDTH)) & ((2 << WIDTH) - 1)",
     "a field takes its neighbour's lowest bit along"),
    ("codes |= field(words1, WIDTH1, part) << WIDTH0", "codes |= field(words1, WIDTH1, part)",
     "high bits of a 3-bit code not shifted"),
    ("codes |= field(words2, WIDTH2, part) << (WIDTH0 + WIDTH1)",
     "codes |= field(words2, WIDTH2, part) << WIDTH0",
     "third plane of a 7-bit code shifted too little"),
    ("m_ok, n_ok = ms < M, ns < N", "m_ok, n_ok = ms < M, ns <= N",
     "a row writes into the next one"),
    (f"n_ok = (rows < R) & (ns < N)\n{ROWS}    m_ok", f"n_ok = ns < N\n{ROWS}    m_ok",
     "rows behind a strip's last taken for its own"),
    ("cols = tl.where(start < 0, K, start + s)", "cols = tl.where(start < 0, 0, start) + s",
     "padding slices read the first columns"),
    ("cols = tl.where(cols < 0, K, cols)", "cols = tl.maximum(cols, 0)",
     "padding columns read the first one"),
    ("start = tl.max(cols, axis=0)", "start = tl.min(cols, axis=0)",
     "group of a slice by its padding"),
    ("group_of(block * (PARTS * SLICE), GROUP)",
     "group_of((block - first) * (PARTS * SLICE), GROUP)",
     "scale groups counted from a task's first block"),
    ("group_of(tl.maximum(start, 0), GROUP)", "group_of(tl.maximum(start, 0), GROUP * 2)",
     "two groups share a scale"),
    ("at = (first.to(tl.int64) * SLICE + s[:, None]) * R", "at = s[:, None].to(tl.int64) * R",
     "every task reads the first blocks"),
    ("at += tl.full((), SLICE, tl.int64) * R", "at += SLICE * R", "32-bit step between blocks"),
    ("ms[:, None].to(tl.int64) * K\n    s = ", "ms[:, None] * K\n    s = ",
     "32-bit rows of x"),
    ("part_sum = product(xs, w, tl.zeros_like(total))",
     "total = product(xs, w, total)\n                part_sum = total",
     "sums of earlier slices scaled again"),
    ("(words >> 1) & 0x55555555)", "(words >> 1) & 0x55555554)", "popcount loses a pair of bits"),
    (">> 24) & 0xFF", ">> 23) & 0xFF", "popcount twice too large"),
    ("below = (1 << (j // CELL)) - 1", "below = (2 << (j // CELL)) - 1", "a column counts itself"),
    ("* CELL + (j % CELL)[:, None]", "* CELL", "all columns of a cell read its first code"),
    ("position += tl.load(starts + ns.to(tl.int64) * steps + first, mask=n_ok, other=0)", "",
     "every task reads a row's first codes"),
    ("mask + (ns // mask_rows).to(tl.int64) * words", "mask + ns.to(tl.int64) * words",
     "rows of a tile have masks of their own"),
    ("codes = tl.where(ok, codes, zero[None, :] + OFFSET)", "codes = tl.where(ok, codes, OFFSET)",
     "what is not stored is minus the zero point"),
    ("* groups + group_of(start, GROUP)", "* groups",
     "the first scale of a row for all"),
    ("place = (first.to(tl.int64) * M + ms[:, None])", "place = (first.to(tl.int64) + ms[:, None])",
     "parts of other tasks are added up"),
    ("for _ in range(first, last):", "for _ in range(first, last - 1):",
     "the last part of a split sum is lost"),
    ("mask=n_ok[None, :] & r_ok[:, None]", "mask=n_ok[None, :] | r_ok[:, None]",
     "ranks behind the last are read"),
    ("for r in tl.static_range(0, RANK, 16):", "for r in tl.static_range(0, 16, 16):",
     "ranks from 16 on are left out"),
    ("x * 0.7071067811865476", "x * 0.7", "gelu with one digit"),
    ("0.044715", "0.04", "gelu_tanh with one digit"),
    ("(share + 12582912.0) - 12582912.0", "tl.floor(share + 0.5)",
     "activations not rounded half to even"),
    ("tl.where(reach == 0, 1.0,", "tl.where(reach < 0, 1.0,", "rows of zeros have no scale"),
    ('tl.where(bad > 0, float("nan"), scale)', "scale", "NaN in x goes unnoticed"),
    ("acc *= tl.load(strength", "acc += 0 * tl.load(strength", "the branch's strength is left out"),
]

PACK = [
    ("word |= part[:, i] << (i * width)", "word |= part[:, i] << (i * 4)",
     "fields of narrow planes four bits apart"),
    ("room = -(-total // 32) * 32", "room = total", "rows begin within a word"),
    ("starts = per_step.cumsum(1) - per_step", "starts = per_step.cumsum(1)",
     "steps begin where they end"),
]

LAUNCH = [
    ("edges = [first + (last - first) * i // count for i in range(count + 1)]",
     "edges = [first + most * i for i in range(count)] + [last - (count > 2)]",
     "three tasks or more lose their last block"),
    ("most = max(-(-total // wanted), 1)", "most = max(-(-total // wanted), 1) + 2",
     "tasks larger than their share"),
    ("done += len(part)", "done += 1", "split sums begin at another block's tasks"),
    ("not w.gather and group % (w.parts * w.slice) == 0", "not w.gather",
     "one scale for a block of several groups"),
    ("PRESCALE=config.block_m >= 64 and x.dtype != torch.int8", "PRESCALE=config.block_m >= 64",
     "int8 weights times their scales"),
]
# fmt: on
MUTATIONS = [
    Mutation(f"triton_{name}.py", *fault)
    for name, faults in (("kernels", KERNELS), ("pack", PACK), ("launch", LAUNCH))
    for fault in faults
]


def fits(m: Mutation) -> bool:
    """Whether the text to replace occurs exactly once."""
    return (ROOT / FOLDER / m.file).read_text().count(m.old) == 1


def broken(m: Mutation | None, folder: Path) -> None:
    """A copy of the package in `folder`, all links but for the folder with the fault."""
    package = folder / PACKAGE.name
    package.mkdir()
    for path in (ROOT / PACKAGE).iterdir():
        if path.name != FOLDER.name:
            (package / path.name).symlink_to(path.resolve())
    shutil.copytree(
        ROOT / FOLDER, package / FOLDER.name, ignore=shutil.ignore_patterns("__pycache__")
    )
    if m:
        path = package / FOLDER.name / m.file
        path.write_text(path.read_text().replace(m.old, m.new))


class First:
    """A pytest plugin that remembers the first thing that failed."""

    name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.name = self.name or report.nodeid.rpartition("::")[2]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.name = self.name or f"import of {report.nodeid}"


def first_failure(m: Mutation | None) -> str:
    """The test that fails; "" if all is well. For a process that did not import sparsefx yet."""
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(TIMEOUT)
    first = First()
    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as nowhere:
        broken(m, Path(name))
        options = [
            "-xq",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "-o",
            f"pythonpath={name} tests",
        ]
        skip = [f"--deselect={test}" for test in SKIPPED]
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            code = pytest.main([*options, *TESTS, *skip], plugins=[first])
    signal.alarm(0)
    return first.name or (f"exit {int(code)}" if code else "")


def _late(*_: object) -> None:
    raise TimeoutError(f"not done after {TIMEOUT} seconds")


def try_out(m: Mutation) -> Outcome:
    start = time.perf_counter()
    caught_by = first_failure(m)
    seconds = round(time.perf_counter() - start, 1)
    return Outcome(m.file, m.breaks, CAUGHT if caught_by else SURVIVED, caught_by, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at once")
    parser.add_argument("--only", default="", help="faults whose file or name has this")
    options = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 160)
    chosen = [m for m in MUTATIONS if options.only in f"{m.file} {m.breaks}"]
    outcomes = [Outcome(m.file, m.breaks, STALE) for m in chosen if not fits(m)]
    usable = [m for m in chosen if fits(m)]
    os.chdir(ROOT)
    # Forked for each fault: torch and triton are imported once.
    with get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        if why := pool.apply(first_failure, [None]):
            raise SystemExit(f"{why} fails before anything is broken")
        for done in pool.imap_unordered(try_out, usable):
            outcomes.append(done)
            console.print(*asdict(done).values(), markup=False)
    table = Table("file", "fault", "", "caught by", "s")
    for o in sorted(outcomes, key=lambda o: [m.breaks for m in chosen].index(o.fault)):
        table.add_row(o.file, o.fault, o.verdict, o.caught_by, str(o.seconds))
    console.print(table)
    caught = sum(o.verdict == CAUGHT for o in outcomes)
    console.print(f"{caught} of {len(outcomes)} faults caught")
    return int(caught < len(outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
