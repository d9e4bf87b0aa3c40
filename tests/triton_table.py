"""What the compiler made of Triton kernels on every target, against a committed table.

Compiling needs a process without TRITON_INTERPRET: `apart` starts one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsefx.codegen.triton_aot import TARGETS
from sparsefx.codegen.triton_record import Launch

MORE_REGISTERS = 16
"""Registers a kernel may take above the table: other versions of Triton differ by a few."""

Table = dict[str, dict[str, dict[str, Any]]]


def build(launches: Mapping[str, Launch], targets: Sequence[str], progress: bool = False) -> Table:
    """{name: {target: {registers, spills, shared, mma, per_weight}}}.

    Bytes for spills and shared, counts by name for mma, instructions in the loop for per_weight
    (null without a loop), which is there to be read and not compared. An entry takes seconds.
    """
    table: Table = {}
    for name, launch in launches.items():
        table[name] = {target: _entry(launch, target) for target in targets}
        if progress:
            print(name, json.dumps(table[name]), flush=True)
    return table


def _entry(launch: Launch, target: str) -> dict[str, Any]:
    made = launch.compile_for(target)
    return {
        "registers": made.registers,
        "spills": made.spilled,
        "shared": made.shared,
        "mma": made.tensor,
        "per_weight": made.loop and round(launch.per_weight(made)["all"], 2),
    }


def faults(now: Table, recorded: Table) -> list[str]:
    """One line per entry that spills, asks for too much or is worse than recorded or not there."""
    names = [(name, target) for name, entries in now.items() for target in entries]
    known = [(name, target) for name, entries in recorded.items() for target in entries]
    found = [f"{name} on {target} is recorded, and not there" for name, target in known
             if (name, target) not in names]  # fmt: skip
    for name, target in names:
        entry, where = now[name][target], f"{name} on {target}"
        if entry["spills"]:
            found.append(f"{where} spills {entry['spills']} bytes per thread")
        if entry["shared"] > TARGETS[target].shared_limit:
            limit = TARGETS[target].shared_limit
            found.append(f"{where} needs {entry['shared']} bytes of shared memory of {limit}")
        if (name, target) not in known:
            found.append(f"{where} is not recorded")
            continue
        before = recorded[name][target]
        if lost := sorted(before["mma"].keys() - entry["mma"].keys()):
            found.append(f"{where} lost {', '.join(lost)}; it has {sorted(entry['mma']) or 'none'}")
        if entry["registers"] > before["registers"] + MORE_REGISTERS:
            change = f"{before['registers']} to {entry['registers']}"
            found.append(f"{where} went from {change} registers")
    return found


def compare(launches: Mapping[str, Launch], path: Path, targets: Sequence[str]) -> list[str]:
    """All `faults` of `launches` on `targets` against their entries in the table in `path`."""
    recorded = json.loads(path.read_text())["kernels"]
    known = {
        name: {target: entry for target, entry in entries.items() if target in targets}
        for name, entries in recorded.items()
        if name in launches
    }
    return faults(build(launches, targets), known)


def write(launches: Mapping[str, Launch], path: Path) -> None:
    """Records `launches` on all targets as `compare` reads them."""
    import triton

    table = {"triton": triton.__version__, "kernels": build(launches, tuple(TARGETS), True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def apart(module: str, *arguments: str) -> Any:
    """What `python -m module` prints, read as JSON, in a process that compiles kernels."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
