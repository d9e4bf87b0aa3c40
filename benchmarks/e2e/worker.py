"""One engine in a process of its own, told by its parent when to run.

    python -m benchmarks.e2e.worker smollm2 '{"engine": "torch fp32", "threads": 1}'

Prints one JSON object per line: `ready` or `missing` first, then an answer to every line read:
"measure" or "quality".
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import warnings
from typing import Any

import torch
from benchmarks.e2e import ENGINES, Session, Settings
from benchmarks.machine import cpu_seconds

from sparsefx.runtime.sparsify import peak_bytes, reset_peak


def main(model: str, settings: Settings) -> None:
    """Build, run once untimed, then serve."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer

    def answer(**event: Any) -> None:
        answers.write(json.dumps(event) + "\n")

    warnings.simplefilter("ignore")
    torch.set_num_threads(settings.threads)
    start = time.perf_counter()
    try:
        session = ENGINES[model][settings.engine].build(settings)
        session.measure()
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        answer(event="missing", reason=f"{type(error).__name__}: {lines[0][:200]}")
        return
    trim()
    reset_peak()
    session.measure()
    answer(
        event="ready", bytes=session.bytes, peak=peak_bytes(), note=session.note,
        setup=time.perf_counter() - start,
    )  # fmt: skip
    for line in sys.stdin:
        if line.strip() == "quality":
            answer(quality=session.quality())
        else:
            answer(**timed(session))


def timed(session: Session) -> dict[str, float]:
    """The parts' seconds, and how many CPUs other processes used meanwhile."""
    session.measure()  # wakes threads and fills caches after another engine's turn
    own, all_, start = time.process_time(), cpu_seconds(), time.perf_counter()
    parts = session.measure()
    wall = time.perf_counter() - start
    others = max(0.0, cpu_seconds() - all_ - (time.process_time() - own)) / wall
    return {**parts, "others": round(others, 2)}


def trim() -> None:
    """Give back what loading and compressing needed."""
    gc.collect()
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


if __name__ == "__main__":
    main(sys.argv[1], Settings(**json.loads(sys.argv[2])))
