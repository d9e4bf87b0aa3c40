"""Breaks the CPU engine on purpose, one fault at a time: tests/native must notice each.

`make test-mutations`. Fails if a fault goes unnoticed, does not compile or no longer fits the
source. NEON runs in an emulator where `make test-neon` would.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from native_mutations import MUTATIONS, Mutation
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SOURCE, DRIVER = Path("runtime/native"), Path("tests/native")
RESULTS = ROOT / "benchmarks" / "results" / "mutations.json"
FLAGS = [
    "-std=c++17", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-pthread",
    "-w",
]  # fmt: skip
ISAS = ("amx", "avx512", "avxvnni", "avx2", "neon", "portable")
"""Stems of source files, too. Faults that name none go into the first but amx that runs here."""
TIMEOUT = 600
CAUGHT, SURVIVED, BROKEN, STALE = "caught", "SURVIVED", "does not build", "no longer applies"


@dataclass(frozen=True)
class Tools:
    """What compiles and runs programs for one kind of processor."""

    folder: str
    compile: tuple[str, ...]
    run: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    file: str
    fault: str
    isa: str
    verdict: str
    caught_by: str = ""
    seconds: float = 0


def host_compiler() -> str:
    return os.environ.get("CXX") or next(c for c in ("c++", "g++", "clang++") if shutil.which(c))


HOST = Tools("host", (host_compiler(),), ())
CROSS = Tools(
    "cross",
    (os.environ.get("CROSS", "aarch64-linux-gnu-g++"), "-static"),
    (os.environ.get("EMULATOR", "qemu-aarch64-static"),),
)


def tools(isa: str) -> Tools:
    native = platform.machine().lower() in ("aarch64", "arm64")
    return CROSS if isa == "neon" and not native else HOST


def available(isa: str) -> bool:
    """Whether the tools for this set are installed; not yet whether it runs."""
    used = tools(isa)
    return all(shutil.which(command) for command in (used.compile[0], *used.run))


# --- building ------------------------------------------------------------------------------------


def compile_object(used: Tools, source: Path, out: Path) -> str:
    """What the compiler complains about, "" if nothing."""
    # The driver multiplies by plain loops; they and an emulator take long unless optimised.
    level = "-O1" if source.stem == "check" or used.run else "-O0"
    command = [*used.compile, *FLAGS, level, "-c", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr or "failed" if done.returncode else ""


def link(used: Tools, objects: list[Path], out: Path) -> None:
    command = [*used.compile, "-pthread", "-o", str(out), *map(str, objects), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"linking fails:\n{done.stderr[:2000]}")


@cache
def dependents(file: str) -> frozenset[str]:
    """Stems of the sources that this file is part of."""
    if file.endswith(".cpp"):
        return frozenset({Path(file).stem})
    out, pending = set(), {file}
    including = {
        path: set(re.findall(r'#include "(?:.*/)?([\w.]+)"', path.read_text()))
        for folder in (SOURCE, DRIVER)
        for path in (ROOT / folder).iterdir()
    }
    while pending:
        found = {path for path, names in including.items() if names & pending}
        out |= {path.stem for path in found if path.suffix == ".cpp"}
        pending = {path.name for path in found if path.suffix == ".h"} - pending
    return frozenset(out)


def build_base(used: Tools, folder: Path) -> None:
    """Objects of the engine without fault, and of the driver."""
    folder.mkdir()
    for path in sorted([*(ROOT / SOURCE).glob("*.cpp"), *(ROOT / DRIVER).glob("*.cpp")]):
        if why := compile_object(used, path, folder / f"{path.stem}.o"):
            raise SystemExit(f"{path.name} does not compile:\n{why[:2000]}")
    link(used, sorted(folder.glob("*.o")), folder / "check")


def build_mutant(m: Mutation, isa: str, base: Path, folder: Path) -> str:
    """The driver with one fault in the engine; of the instruction sets only one is rebuilt."""
    used = tools(isa)
    for name in (SOURCE, DRIVER):
        shutil.copytree(ROOT / name, folder / name)
    path = folder / SOURCE / m.file
    path.write_text(path.read_text().replace(m.old, m.new))
    changed = dependents(m.file) - {name for name in ISAS if name != isa}
    objects = []
    for original in sorted((base / used.folder).glob("*.o")):
        objects.append(folder / original.name if original.stem in changed else original)
        if original.stem in changed:
            where = DRIVER if original.stem == "check" else SOURCE
            source = folder / where / f"{original.stem}.cpp"
            if why := compile_object(used, source, objects[-1]):
                return why
    link(used, objects, folder / "check")
    return ""


# --- running -------------------------------------------------------------------------------------


def first_failure(used: Tools, isa: str, program: Path) -> str:
    """The case that fails, or how the program ended instead; "" if all is well."""
    command = [*used.run, str(program), isa]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if found := re.search(r"^FAILED (.*)$", done.stdout, re.MULTILINE):
        return found[1]
    if done.returncode:
        number = -done.returncode if done.returncode < 0 else done.returncode - 128
        known = number in set(signal.Signals)
        return f"crash: {signal.Signals(number).name}" if known else f"exit {done.returncode}"
    return ""


def try_out(m: Mutation, isa: str, base: Path) -> Outcome:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if build_mutant(m, isa, base, folder):
            return Outcome(m.file, m.breaks, isa, BROKEN)
        caught_by = first_failure(tools(isa), isa, folder / "check")
    verdict = CAUGHT if caught_by else SURVIVED
    seconds = round(time.perf_counter() - start, 1)
    return Outcome(m.file, m.breaks, isa, verdict, caught_by, seconds)


def runnable(console: Console, base: Path, wanted: set[str]) -> list[str]:
    """Which of these instruction sets can be checked here; they must pass without a fault."""
    sets = [isa for isa in ISAS if isa in wanted and available(isa)]
    for used in {tools(isa) for isa in sets}:
        build_base(used, base / used.folder)
    out = []
    for isa in sets:
        why = first_failure(tools(isa), isa, base / tools(isa).folder / "check")
        if not why:
            out.append(isa)
        elif "this machine runs" not in why:
            raise SystemExit(f"{isa} fails before anything is broken: {why}")
    console.print("breaking", *out)
    return out


def fits(m: Mutation) -> bool:
    """Whether the text to replace occurs exactly once."""
    path = ROOT / SOURCE / m.file
    return path.exists() and path.read_text().count(m.old) == 1 and m.old != m.new


def run(
    console: Console, mutations: list[Mutation], jobs: int
) -> tuple[list[Outcome], list[Mutation]]:
    """Outcomes, and the faults of instruction sets that this machine lacks."""
    outcomes = [Outcome(m.file, m.breaks, m.isa, STALE) for m in mutations if not fits(m)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        base = Path(name)
        named = {m.isa for m in mutations}
        sets = runnable(console, base, set(ISAS) if "" in named else named)
        default = next((isa for isa in sets if isa != "amx"), "")
        usable = [m for m in mutations if fits(m) and (m.isa or default) in sets]
        started = [pool.submit(try_out, m, m.isa or default, base) for m in usable]
        try:
            for job in track(as_completed(started), "faults", len(started), console=console):
                outcomes.append(job.result())
                if outcomes[-1].verdict != CAUGHT:
                    console.print(*asdict(outcomes[-1]).values(), markup=False)
        finally:
            pool.shutdown(cancel_futures=True)
    return outcomes, [m for m in mutations if fits(m) and m not in usable]


# --- reporting -----------------------------------------------------------------------------------


def show(console: Console, outcomes: list[Outcome]) -> None:
    table = Table("file", "set", "fault", "", "caught by")
    for o in outcomes:
        verdict = o.verdict if o.verdict == CAUGHT else f"[bold red]{o.verdict}[/]"
        table.add_row(o.file, o.isa, o.fault, verdict, o.caught_by)
    console.print(table)


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def in_order(outcomes: list[Outcome]) -> list[Outcome]:
    """As listed in native_mutations.py, and of each fault the last outcome only."""
    last = {(o.file, o.fault): o for o in outcomes}
    return [last[key] for m in MUTATIONS if (key := (m.file, m.breaks)) in last]


def save(outcomes: list[Outcome]) -> None:
    """Faults that were not tried keep the rows that they have."""
    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = in_order([*(Outcome(**row) for row in before), *outcomes])
    found = {
        "machine": {"cpu": cpu_model(), "system": f"{platform.system()} {platform.release()}"},
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(sum(o.seconds for o in rows)),
        "faults": len(rows),
        "verdicts": dict(Counter(o.verdict for o in rows)),
        "per_set": dict(Counter(o.isa for o in rows)),
        "rows": [asdict(o) for o in rows],
    }
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at once")
    parser.add_argument("--only", default="", help="faults whose file or name has this")
    options = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 200)
    chosen = [m for m in MUTATIONS if options.only in f"{m.file} {m.isa} {m.breaks}"]
    outcomes, skipped = run(console, chosen, options.jobs)
    show(console, in_order(outcomes))
    save(outcomes)
    verdicts = Counter(o.verdict for o in outcomes)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    console.print(f"{len(outcomes)} faults: {counts}; {len(skipped)} skipped")
    return int(verdicts[CAUGHT] < len(outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
