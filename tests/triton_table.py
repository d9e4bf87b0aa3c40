"""What the compiler made of Triton kernels on every target, against a committed table.

Compiling needs a process without TRITON_INTERPRET: `apart` starts one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsefx.codegen.triton_aot import TARGETS, compile_for

MORE_REGISTERS = 16
"""Registers a kernel may take above the table: other versions of Triton differ by a few."""

Table = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Row:
    """A kernel to watch, as `compile_for` takes it; `weights` as `Compiled.per_weight` does."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    weights: int
    warps: int = 4
    stages: int = 3


def build(rows: Sequence[Row], targets: Sequence[str] = tuple(TARGETS)) -> Table:
    """{name: {target: {registers, spills, shared, mma, per_weight}}}.

    Bytes for spills and shared, counts by name for mma, instructions in the loop for per_weight
    (null without a loop), which is there to be read and not compared. An entry takes seconds.
    """
    return {row.name: {target: _entry(row, target) for target in targets} for row in rows}


def _entry(row: Row, target: str) -> dict[str, Any]:
    made = compile_for(row.kernel, row.signature, row.constants, target, row.warps, row.stages)
    return {
        "registers": made.registers,
        "spills": made.spilled,
        "shared": made.shared,
        "mma": made.tensor,
        "per_weight": made.loop and round(made.per_weight(row.weights)["all"], 2),
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


def check(rows: Sequence[Row], path: Path, targets: Sequence[str] = tuple(TARGETS)) -> None:
    """Raises AssertionError with all `faults` of `rows` against the table in `path`."""
    import triton

    recorded = json.loads(path.read_text())
    found = faults(build(rows, targets), recorded["kernels"])
    versions = f"recorded with Triton {recorded['triton']}, this is {triton.__version__}"
    way_out = f"If that is meant, `triton_table.write` the same rows to {path} ({versions})."
    assert not found, "\n".join([*found, way_out])


def write(rows: Sequence[Row], path: Path, targets: Sequence[str] = tuple(TARGETS)) -> None:
    """Records `rows` as `check` reads them."""
    import triton

    table = {"triton": triton.__version__, "kernels": build(rows, targets)}
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
