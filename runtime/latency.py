"""What one product costs on this machine: measured through the op, kept in the user's cache.

Weights are as many distinct copies as the model has weights (up to `WORKING` bytes of dense ones),
so that a model that leaves the caches is measured outside of them and one that does not is not.
Every format takes turns with the dense product and is told as a share of it, so that what slows
both cancels out. What counts are the least times of many short turns, as other programs only ever
add to a time. Where they took much of the processor even so, figures are used and not kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.codegen import crossover, kernels, native
from sparsefx.ir.cache import Cache
from sparsefx.ir.errors import SpecError
from sparsefx.ir.format import Format

VERSION = 4
"""Of what is kept and how it is measured."""
WORKING = 256 << 20
"""Bytes of dense weights that are multiplied by in turns, at most."""
BOUND = 64
"""From so many rows on arithmetic bounds a product, and 4 copies are enough."""
TURNS = 25
TRIES = 3
"""How often the turns are taken, at most, until nothing disturbs them."""
CALM = 0.9
"""Share of the time that this process must have computed while it was timed."""
SHORTEST = 5e-4
"""Seconds that a turn takes at least, in calls."""
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Product:
    """x (m, k) · Wᵀ (k, n) on a device, W one of a model with `weights` weights."""

    n: int
    k: int
    m: int
    dtype: torch.dtype
    device: str
    weights: int

    @property
    def copies(self) -> int:
        """Distinct weights that take turns: a power of two."""
        most = 4 if self.m >= BOUND else WORKING // max(self.n * self.k * self.dtype.itemsize, 1)
        wanted = min(self.weights // max(self.n * self.k, 1), most)
        return 1 << max(1, wanted.bit_length() - 1)


@dataclass(frozen=True)
class Times:
    """Microseconds of one product by format."""

    us: Mapping[str, float]
    disturbed: Mapping[str, float] = field(default_factory=dict)
    """Formats that were timed on a busy machine: the share of the time that was left for them."""


def clocks() -> tuple[float, float, float]:
    """Seconds: of the wall, computed by this thread, computed by the process."""
    return time.perf_counter(), time.thread_time(), time.process_time()


class Watch:
    """What other programs on the same cores, or a limit on them, take from this process.

    What others do on other cores, to memory or the clock rate, it cannot see.
    """

    def __init__(self) -> None:
        self.start = clocks()

    def share(self) -> float:
        """Of the wall time since the start, how much was computed: 1 where nothing disturbed."""
        wall, own, every = (now - then for now, then in zip(clocks(), self.start, strict=True))
        return min(1.0, max(own, every / torch.get_num_threads()) / max(wall, 1e-9))


class _Busy(Exception):
    """Figures that are not to be kept, in `args`."""


def machine(device: str = "cpu") -> str:
    """What latencies are kept for: processor, torch, instruction set, threads."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    engine = native.engine()
    isa = engine.isa if engine else "no engine"
    threads = torch.get_num_threads()
    return f"{crossover.processor()}, {isa}, {threads} threads, torch {torch.__version__}"


def check_device(device: str) -> None:
    """Raise SpecError where `device` cannot be measured on."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise SpecError(f"auto: device={device} cannot be used here: {first}") from None


def microseconds(
    product: Product, formats: Sequence[str], progress: Callable[[str], None]
) -> Times:
    """Of one product with "dense" and each of `formats`; measured once, then from the cache."""
    cache = Cache()
    where = f"latency {VERSION}|{machine(product.device)}|{crossover.mode()}|{product}"
    dense: list[Run] = []
    disturbed: dict[str, float] = {}

    def measured(text: str) -> bytes:
        if not dense:
            dense.extend(_dense(product))
        runs = dense if text == "dense" else _stored(product, text)
        share, own, calm = _compare(runs, dense, product.device)
        if calm < CALM:
            disturbed[text] = calm
            raise _Busy(share, own)
        return json.dumps((share, own)).encode()

    def kept(text: str) -> tuple[float, float]:
        progress(f"{text} of {product.n}×{product.k}, {product.m} rows")
        try:
            with torch.inference_mode():
                share, own = json.loads(cache.get(f"{where}|{text}", lambda: measured(text)))
        except _Busy as busy:
            share, own = busy.args
        return float(share), float(own)

    found = {text: kept(text) for text in dict.fromkeys(("dense", *formats))}
    base = 1e6 * min(own for _, own in found.values())
    times = {text: share * base for text, (share, _) in found.items()} | {"dense": base}
    return Times({text: float(f"{us:.4g}") for text, us in times.items()}, disturbed)


def _dense(product: Product) -> list[Run]:
    x, weight = _input(product), torch.randn(product.n, product.k)
    copies = [weight.to(product.device, product.dtype, copy=True) for _ in range(product.copies)]
    return [lambda w=w: F.linear(x, w) for w in copies]  # type: ignore[misc]


def _stored(product: Product, text: str) -> list[Run]:
    """The op over distinct copies of one random weight of this format, packed and run once."""
    fmt, random = Format.parse(text), torch.Generator().manual_seed(0)
    with torch.inference_mode(False):  # the engine knows its weights by their version counters
        packed = fmt.pack(torch.randn(product.n, product.k, generator=random))
        pair = [torch.randn(s, generator=random).bfloat16() / 64
                for s in ((fmt.rank, product.k), (product.n, fmt.rank))]  # fmt: skip
        branch = [*pair, torch.ones(fmt.rank).bfloat16()] if fmt.rank else []
        copies = [[[t.to(product.device, copy=True) for t in group] for group in (packed.buffers,
                  branch)] for _ in range(product.copies)]  # fmt: skip
    x, name, n = _input(product), str(fmt), product.n
    runs: list[Run] = [
        lambda w=w, b=b: kernels.linear(x, w, None, b, name, n)  # type: ignore[misc]
        for w, b in copies
    ]
    for run in runs:
        run()
    return runs


def _input(product: Product) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(product.m, product.k, generator=random).to(product.device, product.dtype)


def _compare(runs: Sequence[Run], dense: Sequence[Run], device: str) -> tuple[float, float, float]:
    """One call's least time over that of a dense call, the dense call's own, in seconds, and
    `Watch.share` of the calmest try (1 elsewhere than on CPUs: the process only waits)."""
    turn, other = _Turn(runs, device), _Turn(dense, device)
    pairs: list[tuple[float, float]] = []
    calm = 0.0
    for _ in range(TRIES):
        watch = Watch()
        pairs += [(turn.seconds(), other.seconds()) for _ in range(TURNS)]
        calm = max(calm, watch.share() if device == "cpu" else 1.0)
        if calm >= CALM:
            break
    least, own = (min(times) for times in zip(*pairs, strict=True))
    return float(f"{least / own:.4g}"), float(f"{own:.4g}"), calm


class _Turn:
    """Calls the runs round robin, as many at a time as take SHORTEST seconds."""

    def __init__(self, runs: Sequence[Run], device: str) -> None:
        self.runs, self.device, self.count = cycle(runs), device, 1
        self.seconds()
        self.count = min(max(1, round(SHORTEST / max(self.seconds(), 1e-7))), 10_000)

    def seconds(self) -> float:
        """Of one call, averaged over the next `count`."""
        start = time.perf_counter()
        for run in islice(self.runs, self.count):
            run()
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / self.count
