"""Benchmarks of rows, each measured in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

Found = dict[str, dict[str, Any]]
"""What was measured, by the row's name."""


def run(
    module: str,
    names: Sequence[str],
    measure: Callable[[str], dict[str, Any]],
    results: Path,
    unasked: Callable[[str], bool] = lambda name: True,
    base: str = "",
) -> Found | None:
    """Measure rows of `python -m module [--only PART]` and write each to `results` at once.

    `unasked` tells which rows are measured without `--only`; `base` is one that is always needed.
    Rows of earlier runs stay until they are run again. Returns all, None in the process that
    measures a single one (`--row NAME`).
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--only", default="", help="rows whose name has this")
    parser.add_argument("--row", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measure(options.row)))
        return None
    saved = json.loads(results.read_text())["rows"] if results.exists() else []
    found: Found = {row["name"]: row for row in saved}
    chosen = [n for n in names if options.only in n and (options.only or unasked(n))]
    if base and base not in {*found, *chosen}:
        chosen.insert(0, base)
    place = {name: i for i, name in enumerate(names)}
    for name in chosen:
        Console(stderr=True).print(f"[dim]{name} …[/]", highlight=False)
        command = [sys.executable, "-m", module, "--row", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        ordered = sorted(found, key=lambda n: place.get(n, len(place)))
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps({"rows": [found[n] for n in ordered]}, indent=1) + "\n")
    return found
