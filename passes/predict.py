"""Seconds from the cost model: a few constants per kernel family, fitted to measured products.

A product of M rows with an (N, K) weight takes, per family,

    launch + a · stored bytes + b · N·K + c · M·N·K + d · M·(N + K)

seconds: streaming the weight, walking its positions, multiplying, and reading and writing rows. A
sum describes the CPU engine better than the larger of the terms (a roofline): unpacking does not
hide behind reading. All of it is affine in M, so competing kernels change places at the crossing of
two lines, which `thresholds` solves; `codegen.crossover` measures the same two lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from sparsefx.ir.format import Format
from sparsefx.passes.cost import Cost, Size, stored_bytes

Vector = tuple[float, ...]
TERMS = ("launch", "stored bytes", "N·K", "M·N·K", "M·(N+K)")


@dataclass(frozen=True)
class Sample:
    """One measured product; `bytes` of the weight as stored, its branch included."""

    family: str
    m: int
    n: int
    k: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Machine:
    """Constants of one machine and thread count."""

    families: Mapping[str, Vector] = field(default_factory=dict)
    """Seconds per unit of each of `TERMS`, by kernel family."""
    launch: float = 5e-6
    """Seconds of an op that computes nothing."""
    bandwidth: float = 1.8e10
    """Bytes per second."""
    peak: float = 1.5e11
    """Multiply-adds per second of dense products."""


def family(fmt: Format) -> str:
    """The kernel family that serves a Format on CPUs."""
    if fmt.is_dense:
        return "torch"
    return "int8 activations" if fmt.a8 else "float activations"


def terms(m: Size, n: int, k: int, weight_bytes: int) -> tuple[Size, ...]:
    """What `TERMS` count, for a product with m rows (a number or a symbol)."""
    return (1, weight_bytes, n * k, m * (n * k), m * (n + k))


def product_seconds(machine: Machine, fmt: Format, m: Size, n: int, k: int) -> Any:
    """Predicted seconds; an expression where m is a symbol."""
    size = 4 * n * k if fmt.is_dense else stored_bytes(fmt, n, k) + 4 * fmt.rank * (n + k + 1)
    return _dot(machine.families[family(fmt)], terms(m, n, k, size))


def sample_seconds(machine: Machine, sample: Sample) -> float:
    """Predicted seconds of a measured product."""
    units = terms(sample.m, sample.n, sample.k, sample.bytes)
    return float(_dot(machine.families[sample.family], units))


def graph_seconds(machine: Machine, cost: Cost) -> Any:
    """Seconds of a whole graph by its totals: launches, then bytes or products, the longer."""
    moved, multiplied = cost.bytes / machine.bandwidth, cost.operations / machine.peak
    return cost.launches * machine.launch + sympy.Max(moved, multiplied)


def slower(before: Cost, after: Cost, machine: Machine | None = None) -> str | None:
    """Why `after` is slower at some size of 1, 64 and 4096, or None; None where shapes are unknown.

    The margin of a millionth is for the rounding of the sums.
    """
    if before.unknown or after.unknown:
        return None
    symbols = {str(s) for s in (*before.symbols, *after.symbols)}
    for size in (1, 64, 4096):
        sizes = dict.fromkeys(symbols, size)
        old, new = (graph_seconds(machine or DEFAULT, c.at(**sizes)) for c in (before, after))
        if new > old * (1 + 1e-6):
            where = f" at {', '.join(sorted(symbols))} = {size}" if symbols else ""
            return f"the graph is slower by the cost model{where}: {float(old)} → {float(new)} s"
    return None


def fit(samples: Sequence[Sample], base: Machine | None = None) -> Machine:
    """Constants ≥ 0 per family with the least sum of squared relative errors."""
    base = base or Machine()
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.family, []).append(sample)
    found = {name: _fit_family(group) for name, group in groups.items()}
    return Machine({**base.families, **found}, base.launch, base.bandwidth, base.peak)


def _fit_family(samples: Iterable[Sample]) -> Vector:
    """Non-negative least squares by dropping the most negative constant until none is left."""
    import numpy as np

    rows = [(terms(s.m, s.n, s.k, s.bytes), s.seconds) for s in samples]
    units = np.array([[float(u) / t for u in units] for units, t in rows])
    scale = np.abs(units).max(axis=0)
    used = list(range(units.shape[1]))
    while used:
        part = np.linalg.lstsq(units[:, used] / scale[used], np.ones(len(rows)), rcond=None)[0]
        if part.min() >= 0:
            break
        used.pop(int(part.argmin()))
    out = [0.0] * units.shape[1]
    for place, constant in zip(used, part if used else (), strict=True):
        out[place] = float(constant / scale[place])
    return tuple(out)


def thresholds(lines: Mapping[str, Any], m: sympy.Symbol) -> list[tuple[int, str]]:
    """(first M, kernel) in order: the cheapest kernel from each M ≥ 1 on, by expressions in `m`.

    Expressions may hold no other symbol. Crossings are solved by sympy; where two are equal the
    kernel named first stays.
    """
    points = {sympy.Integer(1)}
    names = list(lines)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            difference = sympy.nsimplify(sympy.sympify(lines[name] - lines[other]), rational=True)
            roots = sympy.solveset(difference, m, sympy.Interval(1, sympy.oo))
            if isinstance(roots, sympy.FiniteSet):
                points |= {p for r in roots for p in (sympy.ceiling(r), sympy.floor(r) + 1)}
    out: list[tuple[int, str]] = []
    for point in sorted(points):
        costs = {name: sympy.sympify(line).subs(m, point) for name, line in lines.items()}
        best = min(names, key=lambda name: costs[name])
        if not out or best != out[-1][1]:
            out.append((int(point), best))
    return out


def _dot(constants: Sequence[float], units: Sequence[Size]) -> Any:
    return sum((c * u for c, u in zip(constants, units, strict=True)), start=0.0 * units[0])


MACHINES: Mapping[int, Machine] = {
    1: Machine(
        {
            "float activations": (5.86e-05, 7.37e-11, 3.49e-12, 7.08e-12, 1.45e-08),
            "int8 activations": (2.31e-05, 5.37e-11, 5.94e-12, 5.32e-12, 9.38e-10),
            "torch": (1.84e-03, 2.74e-11, 1.10e-10, 6.73e-12, 1.38e-08),
        },
        bandwidth=1.67e10,
        peak=1e11,
    ),
    2: Machine(
        {
            "float activations": (2.49e-05, 4.01e-11, 1.48e-12, 3.61e-12, 7.39e-09),
            "int8 activations": (1.05e-05, 3.64e-11, 6.25e-13, 1.48e-12, 3.04e-09),
            "torch": (7.29e-04, 1.09e-11, 4.34e-11, 3.50e-12, 7.17e-09),
        },
        bandwidth=3.2e10,
        peak=2e11,
    ),
}
"""By number of threads, fitted by `benchmarks.cost` to cpu-intel-xeon-processor-avx512.json."""
DEFAULT = MACHINES[1]
