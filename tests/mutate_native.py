"""Breaks the CPU engine on purpose, one fault at a time: a test must fail.

`make test-mutations`. Fails if a fault goes unnoticed or no longer fits the source.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

from native_mutations import MUTATIONS, Mutation
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "runtime" / "native"
RESULTS = ROOT / "benchmarks" / "results" / "mutations.json"
FLAGS = [
    "-std=c++17", "-O0", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-fPIC", "-fvisibility=hidden", "-pthread", "-w",
]  # fmt: skip
TESTS = ("test_native.py", "test_native_use.py")
ISAS = ("avx512", "avx2", "neon", "portable")
"""Where faults in shared headers go: the first that runs here. Stems of its source file, too."""
TIMEOUT = 240
STARTING = threading.Lock()
"""multiprocessing starts and reaps processes from one thread at a time."""


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; `caught_by` is empty if nothing noticed it."""

    mutation: Mutation
    caught_by: str
    seconds: float


def compiler() -> str:
    return os.environ.get("CXX") or next(c for c in ("c++", "g++", "clang++") if shutil.which(c))


def stale() -> list[str]:
    """Faults whose text does not occur exactly once in its file."""
    out = []
    for m in MUTATIONS:
        path = SOURCE / m.file
        count = path.read_text().count(m.old) if path.exists() else 0
        if count != 1 or m.old == m.new:
            out.append(f"{m.file}: {count} × {m.old!r}")
    return out


# --- building ------------------------------------------------------------------------------------


def compile_object(folder: Path, name: str, out: Path) -> None:
    command = [compiler(), *FLAGS, "-c", str(folder / name), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} does not compile:\n{done.stderr[:2000]}")


def link(objects: list[Path], out: Path) -> None:
    command = [compiler(), "-shared", "-pthread", "-o", str(out), *map(str, objects)]
    if sys.platform == "linux":
        command.append("-ldl")
    subprocess.run(command, check=True)


@cache
def dependents(file: str) -> frozenset[str]:
    """Sources that this file is part of."""
    if file.endswith(".cpp"):
        return frozenset({file})
    out = set()
    for source in SOURCE.glob("*.cpp"):
        command = [compiler(), "-std=c++17", "-MM", str(source)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if re.search(rf"\b{re.escape(file)}\b", listed):
            out.add(source.name)
    return frozenset(out)


def build_mutant(m: Mutation, isa: str, base: Path, folder: Path) -> Path:
    """The engine with one fault; what holds it is rebuilt, but of the instruction sets only one."""
    source = folder / "src"
    shutil.copytree(SOURCE, source)
    path = source / m.file
    path.write_text(path.read_text().replace(m.old, m.new))
    others = {f"{name}.cpp" for name in (*ISAS, "amx")} - {f"{m.isa or isa}.cpp"}
    changed = dependents(m.file) - others
    objects = []
    for original in sorted(base.glob("*.o")):
        name = f"{original.stem}.cpp"
        objects.append(folder / original.name if name in changed else original)
        if name in changed:
            compile_object(source, name, objects[-1])
    link(objects, folder / "lib.so")
    return folder / "lib.so"


# --- testing -------------------------------------------------------------------------------------


def run_tests(library: str, isa: str, log: str, first: str) -> None:
    """In a process of its own: the tests up to the first failure, beginning with `first`."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ |= {"SPARSEFX_NATIVE": library, "SPARSEFX_ISA": isa}
    import pytest

    from sparsefx.codegen.native import engine, why_missing

    if engine() is None:
        print(why_missing())
        os._exit(99)
    tests = [str(ROOT / "tests" / name) for name in ([first] if first else []) + [*TESTS]]
    os._exit(int(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests])))


def noticed(library: Path, isa: str, log: Path, first: str = "") -> str:
    """The test that fails with this library, "" if none does."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_tests, args=(str(library), isa, str(log), first))
    with STARTING:
        process.start()
    ended = wait([process.sentinel], TIMEOUT)
    with STARTING:
        if not ended:
            process.kill()
            return "hangs"
        process.join()
    text = log.read_text(errors="replace")
    if process.exitcode == 0:
        return ""
    if found := re.search(r"^FAILED \S*?(test_\w+\.py::\w+)", text, re.MULTILINE):
        return found[1]
    if process.exitcode is not None and process.exitcode < 0:
        inside = re.findall(r"/(test_native\w*\.py)\", line \d+ in (test_\w+)", text)
        return "::".join(inside[-1]) if inside else "crash"
    raise SystemExit(f"the tests do not run with {library}:\n{text[-3000:]}")


def caught_before() -> dict[str, str]:
    """The test that noticed each fault the last time, so that it is tried first."""
    if not RESULTS.exists():
        return {}
    code = "".join((ROOT / "tests" / name).read_text() for name in TESTS)
    rows = json.loads(RESULTS.read_text())["rows"]
    found = {row["fault"]: row["caught_by"] for row in rows}
    return {k: test for k, test in found.items() if f"def {test.partition('::')[2]}(" in code}


@contextmanager
def baseline() -> Iterator[tuple[Path, str]]:
    """A folder of the engine's objects without fault, and the instruction set to break."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(compile_object, SOURCE, path.name, base / f"{path.stem}.o")
                for path in SOURCE.glob("*.cpp")
            ]
            for job in jobs:
                job.result()
        link(sorted(base.glob("*.o")), base / "lib.so")
        from sparsefx.codegen.native import Engine

        runs = Engine(base / "lib.so").isas
        isa = next(isa for isa in ISAS if isa in runs)
        for used in {isa, *(m.isa or isa for m in MUTATIONS if (m.isa or isa) in runs)}:
            if why := noticed(base / "lib.so", used, base / f"{used}.log"):
                raise SystemExit(f"{why} fails before anything is broken ({used})")
        yield base, isa


def try_out(m: Mutation, isa: str, base: Path, number: int, first: str) -> Outcome:
    start, folder = time.perf_counter(), base / f"mutant{number}"
    folder.mkdir()
    library = build_mutant(m, isa, base, folder)
    caught_by = noticed(library, m.isa or isa, folder / "log", first)
    shutil.rmtree(folder)
    return Outcome(m, caught_by, round(time.perf_counter() - start, 1))


def run(console: Console) -> tuple[list[Outcome], str, list[str]]:
    """Outcomes, the instruction set that was broken, and those skipped as they do not run here."""
    from sparsefx.codegen.native import Engine

    before = caught_before()
    with baseline() as (base, isa), ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = Engine(base / "lib.so").isas
        usable = [m for m in MUTATIONS if not m.isa or m.isa in runs]
        jobs = [
            pool.submit(try_out, m, isa, base, i, before.get(m.breaks, ""))
            for i, m in enumerate(usable)
        ]
        outcomes: list[Outcome] = []
        try:
            for job in jobs:
                outcomes.append(job.result())
                last, count = outcomes[-1], f"{len(outcomes)}/{len(usable)}"
                console.print(count, last.mutation.breaks, "→", last.caught_by or "SURVIVED")
        finally:
            pool.shutdown(cancel_futures=True)
    return outcomes, isa, sorted({m.isa for m in MUTATIONS if m not in usable})


# --- reporting -----------------------------------------------------------------------------------


def show(console: Console, outcomes: list[Outcome]) -> None:
    table = Table("file", "fault", "caught by")
    for o in outcomes:
        verdict = o.caught_by or "[bold red]SURVIVED[/]"
        table.add_row(o.mutation.file, o.mutation.breaks, verdict)
    console.print(table)


def save(outcomes: list[Outcome], isa: str, skipped: list[str], seconds: float) -> None:
    rows = [
        {"file": o.mutation.file, "fault": o.mutation.breaks, "caught_by": o.caught_by}
        for o in outcomes
    ]
    found = {
        "isa": isa, "skipped": skipped, "seconds": round(seconds), "faults": len(outcomes),
        "survived": sum(not o.caught_by for o in outcomes), "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    console, start = Console(), time.perf_counter()
    if gone := stale():
        console.print("These faults no longer fit the source:", *gone, sep="\n", markup=False)
        return 1
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch", "pytest", "hypothesis", "sparsefx.codegen.native"]
    )
    outcomes, isa, skipped = run(console)
    show(console, outcomes)
    save(outcomes, isa, skipped, time.perf_counter() - start)
    survived = sum(not o.caught_by for o in outcomes)
    console.print(f"{len(outcomes)} faults in {isa}, {survived} unnoticed; skipped: {skipped}")
    return int(survived > 0)


if __name__ == "__main__":
    raise SystemExit(main())
