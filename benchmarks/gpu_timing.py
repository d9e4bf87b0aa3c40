"""Clocks of the GPU benchmark, and the speeds that the card itself reaches.

Calls are replayed as CUDA graphs, so that no time of the processor counts; engines take turns, so
that a drift of the card's clock hits all of them. Without a GPU everything runs on the processor,
which only tells that it runs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LEAST, MOST = (5, 25) if GPU else (1, 1)
"""Timed replays of an engine."""
REPLAY = 1e-3
"""Seconds that one replay takes at least, up to `PASSES` passes over the layers."""
PASSES = 16
FLUSH = 1 << 28
"""Bytes written before calls that no graph could hold: the processor gets ahead meanwhile."""


class Timed:
    """Calls over several layers of one engine; `run()` times them all once.

    The first call of each compiles, tunes and rearranges weights; `first` is the result of the very
    first. `why` tells why there is no graph.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.why = "" if GPU else "no GPU"
        self.graph: Any = None
        self._calls = calls
        self.count = len(calls)
        self.first = calls[0]()
        for call in calls[1:]:
            call()
        if GPU:
            once = clock(self._all)
            self.count *= min(max(round(REPLAY / once), 1), PASSES)
            self._capture()

    def _all(self) -> None:
        for i in range(self.count):
            self._calls[i % len(self._calls)]()

    def _capture(self) -> None:
        """Make `graph`, or say why not: a capture that failed would leave torch's memory locked."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._calls[0]()
        except RuntimeError as error:
            self.why = first_line(error)
            return
        finally:
            torch.cuda.set_sync_debug_mode("default")
        try:
            self.graph = captured(self._all)
        except Exception as error:
            self.why = first_line(error)
        torch.cuda.synchronize()

    def run(self) -> float:
        """Seconds of one call."""
        if self.graph is not None:
            return clock(self.graph.replay) / self.count
        if GPU:
            torch.zeros(FLUSH, dtype=torch.int8, device=DEVICE)
        return clock(self._all) / self.count


def captured(call: Callable[[], Any]) -> Any:
    """`call` as a graph, replayed once. `torch.cuda.graph` would empty torch's cache of memory."""
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            call()
        finally:
            graph.capture_end()
    graph.replay()
    return graph


def clock(call: Callable[[], Any]) -> float:
    """Seconds of one call, on the GPU's clock where there is one."""
    if not GPU:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def take_turns(engines: Mapping[str, Timed], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every timed replay; in each round every engine runs once, in any order.

    An engine stops after `MOST` replays, or `LEAST` once they have taken `seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    live, order = list(engines), random.Random(0)
    while live:
        order.shuffle(live)
        for name in list(live):
            got, engine = times[name], engines[name]
            got.append(engine.run())
            spent = sum(got) * engine.count
            if len(got) >= MOST or (len(got) >= LEAST and spent > seconds):
                live.remove(name)
    return times


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def copy_bandwidth() -> float:
    """GB/s read and written while a buffer over 1 GB is copied: the median of ten."""
    size = (5 << 28) if GPU else 1 << 20
    source = torch.ones(size, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    times = [clock(lambda: target.copy_(source)) for _ in range(12)][2:]
    return 2 * size / statistics.median(times) / 1e9


def peaks() -> dict[str, float]:
    """GOP/s (2 · M · N · K) of the best bf16 and int8 product of torch among three sizes."""
    best = {"bf16": 0.0, "int8": 0.0}
    for size in (4096, 8192, 16384) if GPU else (64,):
        halves = torch.randn(size, size, device=DEVICE).bfloat16()
        codes = torch.randint(-127, 128, (size, size), device=DEVICE, dtype=torch.int8)
        for unit, run in (
            ("bf16", partial(torch.matmul, halves, halves.T)),
            ("int8", partial(torch._int_mm, codes, codes.T)),
        ):
            run()
            seconds = min(clock(run) for _ in range(5))
            best[unit] = max(best[unit], 2 * size**3 / seconds / 1e9)
    return best


def facts() -> dict[str, Any]:
    """The card and the versions, as they say themselves."""
    import triton

    about: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    if not GPU:
        return about | {"card": "no GPU", "l2_bytes": 1 << 16, "processors": 0}
    card = torch.cuda.get_device_properties(0)
    return about | {
        "card": card.name,
        "processors": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size,
        "memory_gb": round(card.total_memory / 2**30, 1),
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
    }
