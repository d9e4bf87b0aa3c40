"""Timing many engines side by side, so that a drift of the machine hits all of them.

One thread: in every round each engine, in random order, runs its next layer. More threads: each
engine in turn runs all its layers, after the workers of the one before have gone to sleep (they
spin for milliseconds and would take a core) and after one untimed call that wakes its own.
Either way some hundred megabytes of other weights pass between two calls of one layer.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LEAST = 5
PASSES = 10
Calls = Sequence[Callable[[], Any]]


def interleave(
    engines: Mapping[str, Calls], seconds: float, threads: int, done: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of every timed call per engine: `PASSES` over its layers (40 calls at least), less
    when they have taken `seconds`, but `LEAST` calls always."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    wanted = {name: max(PASSES * len(calls), 40) for name, calls in engines.items()}
    live, order = list(engines), random.Random(0)
    while live:
        order.shuffle(live)
        for name in list(live):
            got, calls = times[name], engines[name]
            if threads > 1:
                quiet()
                calls[-1]()
                got += [clock(call) for call in calls]
            else:
                got.append(clock(calls[len(got) % len(calls)]))
            if len(got) >= wanted[name] or (len(got) >= LEAST and sum(got) > seconds):
                live.remove(name)
                done(name)
    return times


def clock(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) * 1e-9


def quiet(limit: float = 0.2) -> None:
    """Return when this process uses no CPU any more, or after `limit` seconds."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(0.002)
        if time.process_time() - used < 0.0004:
            return
