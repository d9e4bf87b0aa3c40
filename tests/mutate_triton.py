"""Breaks the Triton kernels on purpose, one fault at a time: their tests must notice each.

`make test-mutations-triton`; no GPU is needed. Fails if a fault goes unnoticed or no longer fits
the source.
"""

from __future__ import annotations

import argparse
import json
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

import hypothesis  # noqa: F401 — loaded once: every fault's process is forked from here
import pytest
import torch
import triton  # noqa: F401 — likewise
from rich.console import Console
from rich.table import Table

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, FOLDER = Path("src/sparsefx"), Path("codegen")
RESULTS = ROOT / "benchmarks" / "results" / "mutations_triton.json"
KERNEL, ORDER, LARGE = (f"tests/test_triton{name}.py" for name in ("", "_pack", "_large"))
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
PARTS = [
    ("codes | 0x6400", "codes | 0x6401", "even codes one off in float16"),
    ("(zeros + (128 + OFFSET))", "(zeros + (127 + OFFSET))", "bfloat16 codes one off"),
    ("(zeros + (8388608 + OFFSET)).to(tl.float32)", "(8388608.0 + OFFSET)",
     "zero point of codes in planes skipped where products are vectors"),
    ("((zeros + OFFSET) << low)", "(OFFSET << low)", "zero point of codes in place skipped"),
    ("low: tl.constexpr = part * WIDTH % 16", "low: tl.constexpr = part * WIDTH % 8",
     "codes in place taken from the wrong byte"),
    ("return (codes - (zeros + OFFSET)).to(tl.int8)", "return (codes - OFFSET).to(tl.int8)",
     "zero point skipped with int8 activations"),
    (">> (part * WIDTH)) & ((1 << WIDTH) - 1)", ">> (part * WIDTH)) & ((2 << WIDTH) - 1)",
     "a field takes its neighbour's lowest bit along"),
    ("m_ok, n_ok = ms < M, ns < N", "m_ok, n_ok = ms < M, ns <= N",
     "a row writes into the next one"),
    ("low + ms[:, None].to(tl.int64) * rank", "low + ms[:, None] * rank", "32-bit rows of low"),
    ("(words >> 1) & 0x55555555)", "(words >> 1) & 0x55555554)", "popcount loses a pair of bits"),
    (">> 24) & 0xFF", ">> 23) & 0xFF", "popcount twice too large"),
    ("mask=n_ok[None, :] & r_ok[:, None]", "mask=n_ok[None, :] | r_ok[:, None]",
     "ranks behind the last are read"),
    ("for r in tl.static_range(0, RANK, 16):", "for r in tl.static_range(0, 16, 16):",
     "ranks from 16 on are left out"),
    ("x * 0.7071067811865476", "x * 0.7", "gelu with one digit"),
    ("0.044715", "0.04", "gelu_tanh with one digit"),
]

KERNELS = [
    ("codes |= field(words1, WIDTH1, part) << WIDTH0", "codes |= field(words1, WIDTH1, part)",
     "high bits of a 3-bit code not shifted"),
    ("field(words0, WIDTH0, part) | (field(words1, WIDTH1, part) << WIDTH0)",
     "field(words0, WIDTH0, part) | field(words1, WIDTH1, part)",
     "high bits of a 3-bit code not shifted where products are vectors"),
    ("(WIDTH0 + WIDTH1)\n                if not UNIFORM", "WIDTH0\n                if not UNIFORM",
     "third plane of a 7-bit code shifted too little"),
    (f"n_ok = (rows < R) & (ns < N)\n{ROWS}    m_ok", f"n_ok = ns < N\n{ROWS}    m_ok",
     "rows behind a strip's last taken for its own"),
    ("k_ok = (cols >= 0) & (cols < K)", "k_ok = cols < K", "padding reads in front of x"),
    ("mask=(cols >= 0) & (cols < K), other=0).to(tl.float32)",
     "mask=cols < K, other=0).to(tl.float32)", "padding of vectors reads in front of x"),
    ("start = tl.max(cols, axis=0)", "start = tl.min(cols, axis=0)",
     "group of a slice by its padding"),
    ("start = tl.max(cols)\n", "start = tl.min(cols)\n",
     "group of a slice by its padding where products are vectors"),
    ("scale, zero = grid_at(scales, zeros, grid, n_ok)\n        total = tl.zeros(acc.shape",
     "scale, zero = grid_at(scales, zeros, rows, n_ok)\n        total = tl.zeros(acc.shape",
     "the first group's scale for all blocks"),
    ("grid, n_ok & (start < K))\n                if FP8:\n                    w = e4m3(codes",
     "rows, n_ok & (start < K))\n                if FP8:\n                    w = e4m3(codes",
     "the first group's scale for all"),
    ("grid, n_ok & (start < K))\n                if FP8:\n                    w = e4m3(field",
     "rows, n_ok & (start < K))\n                if FP8:\n                    w = e4m3(field",
     "the first group's scale for all where products are vectors"),
    ("at = (first.to(tl.int64) * R + rows[None, :]) * SLICE + s[:, None]",
     "at = rows[None, :].to(tl.int64) * SLICE + s[:, None]", "every task reads the first lanes"),
    ("(block * PARTS + part) * R + rows, mask", "part * R + rows, mask",
     "lanes read their first starts"),
    ("    if GATHER == 3:\n        ns = tl.load(order + ns, mask=n_ok, other=N)",
     "    if GATHER == 4:\n        ns = tl.load(order + ns, mask=n_ok, other=N)",
     "results of sorted rows in sorted order"),
    ("xs *= 1.0 / (1 << (part * WIDTH0 % 16))", "xs *= 1.0 / (1 << (part * WIDTH0 % 8))",
     "codes in place scaled by the wrong power"),
    ("    x_rows = x + ms[:, None].to(tl.int64) * K\n    s = ",
     "    x_rows = x + ms[:, None] * K\n    s = ", "32-bit rows of x"),
    ("x_row = x + tl.program_id(1).to(tl.int64) * K", "x_row = x + tl.program_id(1) * K",
     "32-bit rows of x where products are vectors"),
    ("part_sum = product(xs, w, tl.zeros_like(total))",
     "total = product(xs, w, total)\n                part_sum = total",
     "sums of earlier slices scaled again"),
    ("below = (1 << (j // CELL)) - 1", "below = (2 << (j // CELL)) - 1", "a column counts itself"),
    ("* CELL + (j % CELL)[:, None]", "* CELL", "all columns of a cell read its first code"),
    ("starts + ns.to(tl.int64) * steps + first", "starts + ns.to(tl.int64) * steps",
     "every task reads a row's first codes"),
    ("mask + (ns // mask_rows).to(tl.int64) * words", "mask + ns.to(tl.int64) * words",
     "rows of a tile have masks of their own"),
    ("codes = tl.where(ok, codes, zero[None, :] + OFFSET)", "codes = tl.where(ok, codes, OFFSET)",
     "what is not stored is minus the zero point"),
    ("* groups + group_of(start, GROUP)", "* groups", "the first scale of a row for all"),
    ("place = (first.to(tl.int64) * M + ms[:, None])", "place = (first.to(tl.int64) + ms[:, None])",
     "parts of other tasks are added up"),
    ("place += tl.full((), BLOCK_N, tl.int64) * M", "place += M * BLOCK_N",
     "32-bit step between parts"),
    ("    if order is not None:\n", "    if rank < 0:\n",
     "split sums of sorted rows in sorted order"),
    ("for _ in range(first, last):", "for _ in range(first, last - 1):",
     "the last part of a split sum is lost"),
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
    ("room = -(-counts // size) * size", "room = counts", "groups share slices"),
]

LANES = [
    ("order = counts.argsort(descending=True, stable=True)", "order = torch.arange(n) - 0 * counts",
     "rows are not sorted"),
    ("F.pad(order, (0, -n % ROWS), value=n)", "F.pad(order, (0, -n % ROWS), value=0)",
     "rows that fill the last strip up write the first row"),
    ("NONE = -SLICE", "NONE = 0", "padding lanes read the first columns"),
    ("blocks = -(-per_strip // parts)", "blocks = per_strip // parts",
     "lanes lose their last block"),
    ("kind = torch.int16 if k < 2**15", "kind = torch.int8 if k < 2**15",
     "starts of lanes do not fit"),
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
    ("prescale = config.block_m >= 64 and x.dtype != torch.int8", "prescale = config.block_m >= 64",
     "int8 weights times their scales"),
]
# fmt: on
FAULTS = {"parts": PARTS, "kernels": KERNELS, "pack": PACK, "lanes": LANES, "launch": LAUNCH}
MUTATIONS = [
    Mutation(f"triton_{name}.py", *fault) for name, faults in FAULTS.items() for fault in faults
]


def tests_of(m: Mutation | None) -> list[str]:
    """The files that must notice the fault, the faster first."""
    if m and "32-bit" in m.breaks:
        return [LARGE]
    if m and m.file in ("triton_kernels.py", "triton_parts.py"):
        return [KERNEL]
    return [ORDER, KERNEL] if m else [ORDER, LARGE, KERNEL]


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
            code = pytest.main([*options, *tests_of(m), *skip], plugins=[first])
    signal.alarm(0)
    return first.name or (f"exit {int(code)}" if code else "")


def _late(*_: object) -> None:
    raise TimeoutError(f"not done after {TIMEOUT} seconds")


def in_a_child(m: Mutation) -> str:
    """`first_failure` in a process of its own: reading past an array may kill it."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, first_failure(m).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as found:
        name = found.read()
    signalled = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"signal {-signalled}" if signalled < 0 else name


def try_out(m: Mutation) -> Outcome:
    start = time.perf_counter()
    caught_by = in_a_child(m)
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
    if not options.only:
        rows = sorted((asdict(o) for o in outcomes), key=lambda row: (row["file"], row["fault"]))
        found = {"faults": len(rows), "caught": caught, "rows": rows}
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    console.print(f"{caught} of {len(outcomes)} faults caught")
    return int(caught < len(outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
