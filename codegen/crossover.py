"""From how many rows of x on another kernel is faster than the CPU engine.

The cost of each is taken as a line in M, time = a + b · M: unpacking a weight is paid once, a dense
product per row. The lines are measured on a 1024×1024 weight the first time that a format meets
`LEAST` rows (0.2 to 0.5 s), and the crossing is kept per machine in the user's cache, so it is told
in seconds that this thread computed. Those do not grow where other programs share its core; they do
where they share that of a sibling thread, which this one then waits for.
`passes.predict.thresholds` solves the same for any number of kernels over expressions in M.
`SPARSEFX_TUNE=off` always takes the engine, `cached` measures nothing new, `full` is the default.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sparsefx.codegen import native
from sparsefx.ir.cache import Cache
from sparsefx.ir.codecs import Int
from sparsefx.ir.errors import SpecError
from sparsefx.ir.format import Format, Packed

LEAST, MOST, SIZE = 64, 2048, 1024
NEVER = sys.maxsize
CLOCK = time.thread_time
MARGIN = 1.05
"""A kernel whose rows are not at least this much cheaper never takes over."""
Run = Callable[..., Tensor]
_known: dict[str, int] = {}


def mode() -> str:
    """`SPARSEFX_TUNE`: "off", "cached" or "full". Raises SpecError."""
    text = os.environ.get("SPARSEFX_TUNE", "full")
    if text not in ("off", "cached", "full"):
        raise SpecError(f"SPARSEFX_TUNE is '{text}': off, cached and full are known")
    return text


def rows(fmt: Format, dtype: torch.dtype, engine: native.Engine, name: str, rival: Run) -> int:
    """Rows from which on `rival`, called `name`, is faster than `engine`; NEVER if it never is."""
    wanted = mode()
    if wanted == "off" or fmt.rejects(SIZE, SIZE):
        return NEVER
    machine = "|".join((processor(), torch.__version__, engine.isa, str(torch.get_num_threads())))
    key = f"crossover {native.ABI} {MOST} {CLOCK.__name__}|{machine}|{fmt}|{dtype}|{name}"

    def make() -> bytes:
        if wanted == "cached":
            raise LookupError
        with torch.inference_mode():
            return str(crossing(*_lines(fmt, dtype, engine, rival))).encode()

    if key not in _known:
        try:
            _known[key] = int(Cache().get(key, make))
        except LookupError:
            return NEVER
    return _known[key]


def crossing(engine: tuple[float, float], rival: tuple[float, float]) -> int:
    """Where `rival` gets below `engine`, each (seconds for LEAST rows, seconds for MOST rows)."""
    slopes = [(most - least) / (MOST - LEAST) for least, most in (engine, rival)]
    if slopes[0] <= MARGIN * max(slopes[1], 0.0):
        return NEVER
    after = (rival[0] - engine[0]) / (slopes[0] - slopes[1])
    return LEAST + max(0, round(after))


def _lines(
    fmt: Format, dtype: torch.dtype, engine: native.Engine, rival: Run
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds for LEAST and MOST rows of both, the better of three alternating tries."""
    random = torch.Generator().manual_seed(0)
    packed = fmt.pack(torch.randn(SIZE, SIZE, generator=random))

    def other(x: Tensor) -> Tensor:
        return rival(x, packed, None, ())

    runs = (_engine_run(engine, packed), other)
    best: dict[tuple[int, int], float] = {}
    for m in (LEAST, MOST):
        x = torch.randn(m, SIZE, generator=random).to(dtype)
        for _ in range(3):
            for i, run in enumerate(runs):
                start = CLOCK()
                run(x)
                seconds = CLOCK() - start
                best[i, m] = min(seconds, best.get((i, m), seconds))
    return (best[0, LEAST], best[0, MOST]), (best[1, LEAST], best[1, MOST])


def _engine_run(engine: native.Engine, packed: Packed) -> Run:
    weight, a8 = engine.pack(packed), packed.format.a8 and isinstance(packed.format.codec, Int)
    return lambda x: weight.linear(x, a8=a8)


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name: a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} {platform.processor()}"
