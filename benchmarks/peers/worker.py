"""One shape in a process of its own: build, check, time, report, free.

    python -m benchmarks.peers.worker '{"n": 4096, …}'

Prints one JSON object per line: `start` (a step begins), `row`, `missing`, `machine`, `load`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch
from benchmarks.machine import bandwidth, cpu_seconds, last_level_bytes, memory, peaks
from benchmarks.peers import ENGINES, Layer
from benchmarks.peers.base import Call
from benchmarks.peers.ours import overhead_us
from benchmarks.peers.round_robin import clock, interleave
from torch import Tensor

MOST = 400
"""Layers of one engine at most."""
FEW, LONG = 3, 100
"""From LONG rows on, FEW layers do: a weight is read once per long product."""
SLOW = 0.1
"""An engine that needs so many seconds for a row of products gets by with FEW layers too."""


@dataclass(frozen=True)
class Job:
    """What one worker measures: groups of (threads, M, names of engines), few threads first."""

    n: int
    k: int
    groups: list[tuple[int, int, list[str]]]
    seconds: float
    """Time limit of a row's timed calls."""
    machine: bool = True
    """Also measure bandwidth, peaks and the overhead of an op call."""

    @property
    def threads(self) -> list[int]:
        return list(dict.fromkeys(threads for threads, _, _ in self.groups))

    def names(self, threads: int) -> list[str]:
        """Engines that run with so many threads."""
        found = (name for t, _, names in self.groups if t == threads for name in names)
        return list(dict.fromkeys(found))

    @property
    def steps(self) -> int:
        builds = sum(len(self.names(threads)) for threads in self.threads)
        return builds + 2 * sum(len(names) for _, _, names in self.groups)

    def least_rows(self, name: str) -> int:
        """The smallest M at which an engine runs."""
        return min(m for _, m, names in self.groups if name in names)

    def without(self, gone: str) -> Job:
        groups = [(t, m, [name for name in names if name != gone]) for t, m, names in self.groups]
        return Job(**{**asdict(self), "groups": groups})


@dataclass
class Engine:
    """The layers of one engine and what its output is compared with."""

    layers: list[Layer]
    expected: Tensor | None


def working_set() -> int:
    """Bytes of weights that an engine must go through: 100 MB and 1.5 × the last-level cache."""
    return max(100_000_000, int(1.5 * last_level_bytes()))


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:240]


class Worker:
    """Runs a Job, writing events to `out`."""

    def __init__(self, job: Job, out: TextIO) -> None:
        self.job, self.out = job, out
        self.base = torch.randn(4, job.k, generator=torch.Generator().manual_seed(1))
        self.engines: dict[str, Engine] = {}

    def emit(self, event: str, **fields: Any) -> None:
        self.out.write(json.dumps({"event": event, **fields}) + "\n")
        self.out.flush()

    def missing(self, name: str, error: BaseException, m: int | None = None) -> None:
        threads = torch.get_num_threads()
        self.emit("missing", engine=name, m=m, threads=threads, reason=reason(error))

    def run(self) -> None:
        """All rows of the job."""
        for threads in self.job.threads:
            torch.set_num_threads(threads)
            if self.job.machine:
                extra = {"overhead_us": overhead_us()} if threads == 1 else {}
                self.emit("machine", threads=threads, peaks=peaks(), **extra)
                self.emit("machine", threads=threads, bandwidth=bandwidth())
            self.build_all(threads)
            for t, m, names in self.job.groups:
                if t == threads:
                    with torch.inference_mode():
                        self.rows(m, {n: self.engines[n] for n in names if n in self.engines})
            if self.job.machine:
                self.emit("machine", threads=threads, bandwidth=bandwidth())

    def build_all(self, threads: int) -> None:
        """Build what is not there yet, or is tied to another number of threads."""
        for name in [name for name in self.engines if ENGINES[name].per_threads]:
            del self.engines[name]
        for name in self.job.names(threads):
            self.emit("start", step="build", engine=name)
            if name in self.engines:
                continue
            try:
                self.engines[name] = self.build(name)
            except Exception as error:
                self.missing(name, error)

    def build(self, name: str) -> Engine:
        """As many distinct layers as the longest pass needs and memory allows (2 at least)."""
        n, k = self.job.n, self.job.k
        first = ENGINES[name].layer(n, k, 0)
        few = self.job.least_rows(name) >= LONG
        count = FEW if few else math.ceil(working_set() / first.bytes)
        layers = [first]
        while len(layers) < min(max(count, 2), MOST):
            if len(layers) >= 2 and memory("MemAvailable") < 0.15 * memory("MemTotal"):
                break
            layers.append(ENGINES[name].layer(n, k, len(layers)))
        expected = None
        if first.weight is not None:
            expected = self.base.double() @ first.weight().double().T
        self.pack(layers)
        return Engine(layers, expected)

    def pack(self, layers: list[Layer]) -> None:
        """First calls, in which some engines rearrange their weights, on all cores at once."""
        x, threads = self.base[:1].contiguous(), torch.get_num_threads()
        first = layers[0].bind(x)
        first()
        if clock(first) > SLOW or not layers[0].packs:
            return

        def call(layer: Layer) -> None:
            with torch.inference_mode():
                layer.bind(x)()

        with ThreadPoolExecutor(
            os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            list(pool.map(call, layers[1:]))
        torch.set_num_threads(threads)

    def rows(self, m: int, engines: dict[str, Engine]) -> None:
        """Check and time one number of rows."""
        calls: dict[str, list[Call]] = {}
        errors: dict[str, float | None] = {}
        for name, engine in engines.items():
            self.emit("start", step="warm", engine=name, m=m)
            try:
                calls[name], errors[name] = self.prepare(m, engine)
            except Exception as error:
                self.missing(name, error, m)

        def done(name: str) -> None:
            self.emit("start", step="time", engine=name, m=m)

        threads = torch.get_num_threads()
        start, all_, own = time.perf_counter(), cpu_seconds(), time.process_time()
        times = interleave(calls, self.job.seconds, threads, done)
        others = cpu_seconds() - all_ - (time.process_time() - own)
        others = max(0.0, others / (time.perf_counter() - start))
        self.emit("load", threads=threads, m=m, cores_of_others=round(others, 2))
        for name, got in calls.items():
            self.row(name, m, engines[name], got, errors[name], times[name])

    def prepare(self, m: int, engine: Engine) -> tuple[list[Call], float | None]:
        """Calls of layers that have run once, and the relative error of the first one's output."""
        repeats = -(-m // 4)
        x = self.base.repeat(repeats, 1)[:m].contiguous()
        first = engine.layers[0].bind(x)
        y = first()
        error = None
        if engine.expected is not None:
            want = engine.expected.repeat(repeats, 1)[:m]
            error = float((y.double() - want).norm() / want.norm())
        few = m >= LONG or clock(first) > SLOW
        calls = [first]
        for layer in engine.layers[1 : FEW if few else None]:
            calls.append(layer.bind(x))
            calls[-1]()
        return calls, error

    def row(
        self, name: str, m: int, engine: Engine, calls: list[Call], error: float | None,
        times: list[float],
    ) -> None:  # fmt: skip
        ordered, layer, job = sorted(times), engine.layers[0], self.job
        self.emit(
            "row", engine=name, ours=ENGINES[name].ours, n=job.n, k=job.k, m=m,
            threads=torch.get_num_threads(), ms=1e3 * statistics.median(times),
            min_ms=1e3 * ordered[0], p90_ms=1e3 * ordered[int(0.9 * (len(ordered) - 1))],
            calls=len(times),
            layers=len(calls), working_set_mb=round(len(calls) * layer.bytes / 1e6, 1),
            weight_bytes=layer.bytes, products=layer.products, unit=layer.unit, error=error,
            kernel=layer.kernel(m),
        )  # fmt: skip


def main() -> None:
    """Events go to what was standard output; what libraries print there goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    job = Job(**json.loads(sys.argv[1]))
    start = time.perf_counter()
    with torch.no_grad():  # weights are ordinary tensors; calls run in inference mode
        worker = Worker(job, out)
        worker.run()
    worker.emit("end", seconds=round(time.perf_counter() - start, 1))
    os._exit(0)  # some engines' threads do not end in order


if __name__ == "__main__":
    main()
