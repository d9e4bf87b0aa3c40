"""Which configuration a Triton kernel runs with: a default by rule, a better one by measurement.

With `SPARSEFX_TUNE=full` (the default) the first product of a weight's shape, format and number of
rows times some dozens of configurations within `BUDGET` seconds and keeps the best per device in
the user's cache; `cached` measures nothing new, `off` always takes the default. The default and
unpacking with a dense product (cuBLAS) are always among the candidates.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from sparsefx.codegen.crossover import mode
from sparsefx.codegen.triton_launch import Config
from sparsefx.codegen.triton_pack import Columns, Masked, power
from sparsefx.ir.cache import Cache

BUCKETS = (1, 2, 4, 16, 32, 64, 128, 512, 2048)
"""Numbers of rows that are tuned for; others use the next larger one's configuration."""
BUDGET = 20.0
"""Seconds that one search may take; what was not tried by then is left out."""
MARGIN = 0.98
"""Unpacking to dense takes over if it takes less than this share of the best kernel's time."""
MODULES = ("kernels", "parts", "launch", "pack", "lanes")
"""Files whose edit makes older measurements void."""
Measure = Callable[[Config | None], float]
"""Seconds of one product; None stands for unpacking and a dense product."""


@dataclass(frozen=True)
class Work:
    """What a configuration is chosen for."""

    weight: Columns | Masked
    bucket: int
    a8: bool
    processors: int


def bucket(m: int) -> int:
    """The number of rows that stands for `m`."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


def default(work: Work) -> Config:
    """By rule: tensor cores with split sums up to 64 rows, large blocks beyond."""
    m, weight = work.bucket, work.weight
    most = power(weight.rows) if isinstance(weight, Columns) else 1 << 30
    if isinstance(weight, Columns) and weight.order is not None:
        return Config(1, 32, True, 4 * work.processors, 4)
    if m <= 64:
        return Config(max(16, m), min(64, most), False, 2 * work.processors, 4)
    wide = 64 if work.a8 or isinstance(weight, Masked) else 128
    # Sums of int8 and of floats at once, as scale groups need, fit the registers of 4 warps only.
    grouped = work.a8 and weight.scales is not None and weight.scales.shape[1] > 1
    return Config(128, min(wide, most), False, 0, 4 if grouped else 8)


def candidates(work: Work) -> list[Config]:
    """The default first, then its neighbours, those likely to win before others."""
    first = default(work)
    out = [first]
    most = power(work.weight.rows) if isinstance(work.weight, Columns) else 1 << 30
    shapes = [(first.block_m, n, first.vector) for n in (first.block_n, 32, 64, 128, 16, 256)]
    if isinstance(work.weight, Columns) and work.bucket <= 4 and not work.a8:
        shapes += [(1, n, True) for n in (64, 128, 32)]
    if not first.vector and first.block_m > 16:
        shapes += [(first.block_m // 2, n, False) for n in (64, 128)]
    for m, n, vector in shapes:
        if n > most or m * n > 128 * 128:
            continue
        for warps in (4, 8, 2):
            for share in (1, 2, 4):
                config = Config(m, n, vector, first.tasks * share // 2, warps, first.stages)
                if config not in out:
                    out.append(config)
    return out + [replace(c, stages=stages) for c in out[:4] for stages in (2, 4)]


def choose(work: Work, measure: Measure, device: str, capturing: bool = False) -> Config | None:
    """The configuration for `work`; None where unpacking to a dense product is faster.

    `capturing`: a CUDA graph is being recorded, so nothing may be measured.
    """
    wanted = mode()
    if wanted == "off":
        return default(work)
    key = _key(work, device)
    if key not in _known:
        try:
            _known[key] = _read(Cache().get(key, lambda: _search(work, measure, wanted, capturing)))
        except LookupError:
            return default(work)
    return _known[key]


_known: dict[str, Config | None] = {}


def _search(work: Work, measure: Measure, wanted: str, capturing: bool) -> bytes:
    if wanted == "cached" or capturing:
        raise LookupError
    return json.dumps(None if (best := search(work, measure)) is None else asdict(best)).encode()


def search(work: Work, measure: Measure) -> Config | None:
    """Time the candidates for at most `BUDGET` seconds."""
    end = time.monotonic() + BUDGET
    first = default(work)
    best, least = first, measure(first)
    dense = measure(None)
    for config in candidates(work)[1:]:
        if time.monotonic() > end:
            break
        try:
            seconds = measure(config)
        except Exception as error:  # a configuration that the device has no room for
            if not _too_large(error):
                raise
            continue
        if seconds < least:
            best, least = config, seconds
    return None if dense < MARGIN * least else best


def _too_large(error: Exception) -> bool:
    return type(error).__name__ in ("OutOfResources", "PTXASError")


def _read(payload: bytes) -> Config | None:
    fields = json.loads(payload)
    return None if fields is None else Config(**fields)


def _key(work: Work, device: str) -> str:
    w = work.weight
    kind = type(w).__name__
    return (
        f"triton {_source()}|{torch.__version__}|{device}|{kind}|{w.format}|{w.n}×{w.k}|"
        f"{work.bucket}"
    )


@lru_cache(maxsize=1)
def _source() -> str:
    """Which kernels were timed."""
    folder = Path(__file__).parent
    text = b"".join((folder / f"triton_{n}.py").read_bytes() for n in MODULES)
    return hashlib.sha256(text).hexdigest()[:16]
