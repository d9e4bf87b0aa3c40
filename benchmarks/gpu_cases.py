"""What the GPU benchmark measures, in order of importance, and one cell of it."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.gpu_peers import REFERENCE, Layer, Peer, copies
from benchmarks.gpu_timing import DEVICE, Timed, first_line, take_turns

Row = dict[str, Any]
Shape = tuple[int, int]
"""K × N."""
SHAPES: dict[str, tuple[Shape, ...]] = {
    "Llama-3-70B": ((8192, 28672), (8192, 8192), (28672, 8192)),
    "Llama-3-8B": ((4096, 14336), (4096, 4096), (14336, 4096), (4096, 6144)),
    "FLUX": ((3072, 12288), (3072, 3072), (12288, 3072)),
}
MAIN = tuple(shapes[0] for shapes in SHAPES.values())
"""What the short run takes."""
ROWS = (1, 16, 2048, 4, 64, 256)
"""Values of M, the most telling first."""
SAMPLE = 256
"""Results of a row of x that are checked, at most."""
CELL, ENGINE = 15.0, 6.0
"""Seconds that must be left for another cell, and for another engine."""
LEAST = 3 << 26
"""Bytes of weights that an engine passes over, at least; and three times the L2 cache."""


@dataclass
class Run:
    """Everything a run found, and until when it may go on."""

    until: float
    least: int
    seconds: float
    """Seconds of replays per engine and cell."""
    dtype: torch.dtype = torch.bfloat16
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    """What was not measured: reason, engine ("" for all of them), cells ("" for all)."""

    def left(self) -> float:
        return self.until - time.monotonic()

    def miss(self, reason: str, engine: str = "", where: str = "") -> None:
        self.missing.setdefault(reason, {}).setdefault(engine, set()).add(where)


def order(shapes: Sequence[Shape], rows: Sequence[int]) -> list[tuple[Shape, int]]:
    """Cells by importance: the first three M of every shape, then the others."""
    key = {m: i for i, m in enumerate(ROWS)}
    ranked = sorted(rows, key=lambda m: key.get(m, len(ROWS)))
    halves = (ranked[:3], ranked[3:])
    return [(shape, m) for half in halves for shape in shapes for m in half]


def measure(
    cells: Sequence[tuple[Shape, int]], peers: Sequence[Peer], run: Run,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Fill `run.rows`. Weights are kept as long as a later cell needs them."""
    held: dict[Shape, dict[str, list[Layer]]] = {}
    for i, (shape, m) in enumerate(cells):
        if run.left() < CELL:
            for (k, n), rows in cells[i:]:
                run.miss("the time is over", where=f"{k}×{n} M={rows}")
            return
        if shape not in held:
            tell(f"{shape[0]}×{shape[1]}: packing")
            held[shape] = build(shape, peers, run)
        tell(f"{shape[0]}×{shape[1]}, M={m}")
        cell(shape, m, peers, held[shape], run)
        if all(other != shape for other, _ in cells[i + 1 :]):
            del held[shape]


def build(shape: Shape, peers: Sequence[Peer], run: Run) -> dict[str, list[Layer]]:
    """Layers of every engine, of one random weight."""
    k, n = shape
    torch.manual_seed(0)
    weight = torch.randn(n, k, device=DEVICE) * 0.02
    layers: dict[str, list[Layer]] = {}
    for peer in peers:
        if run.left() < CELL:
            run.miss("the time is over", peer.name, f"{k}×{n}")
            continue
        try:
            layers[peer.name] = copies(peer.layer(weight), run.least)
        except Exception as error:  # not here: said in the output
            run.miss(first_line(error), peer.name)
    return layers


def cell(
    shape: Shape, m: int, peers: Sequence[Peer], layers: dict[str, list[Layer]], run: Run
) -> None:
    """Rows of all engines for one shape and M, timed in turns."""
    (k, n), where = shape, f"{shape[0]}×{shape[1]} M={m}"
    torch.manual_seed(m)
    x = torch.randn(m, k, device=DEVICE).to(run.dtype)
    timed: dict[str, Timed] = {}
    found: dict[str, Row] = {}
    for peer in peers:
        if peer.name not in layers or (peer.rows and m not in peer.rows):
            continue
        if run.left() < ENGINE:
            run.miss("the time is over", peer.name, where)
            continue
        try:
            bound = [layer.bind(x) for layer in layers[peer.name]]
            start = time.monotonic()
            timed[peer.name] = Timed(bound)
            first = layers[peer.name][0]
            found[peer.name] = describe(peer, first, shape, m) | {
                "error": error_of(timed[peer.name].first, x, first, n),
                "prepared_s": round(time.monotonic() - start, 2),
            }
        except Exception as error:
            timed.pop(peer.name, None)
            run.miss(first_line(error), peer.name, where)
    for name, times in take_turns(timed, run.seconds).items():
        found[name] |= {
            "ms": 1e3 * statistics.median(times),
            "p90_ms": 1e3 * sorted(times)[int(0.9 * (len(times) - 1))],
            "graph": timed[name].why or "yes",
            "layers": len(layers[name]),
        }
        run.rows.append(found[name])


def describe(peer: Peer, layer: Layer, shape: Shape, m: int) -> Row:
    """What is known of a row without a clock."""
    k, n = shape
    return {
        "k": k, "n": n, "m": m, "engine": peer.name, "ours": peer.ours,
        "weight_bytes": layer.bytes, "bits": 8 * layer.bytes / (n * k),
        "products": layer.products, "unit": layer.unit,
        "kernel": own_part(layer.kernel(m), m),
    }  # fmt: skip


def own_part(kernel: str, m: int) -> str:
    """What is said of M rows in "name M≤1: …; M≤4: …; …"."""
    name, _, rest = kernel.partition(" ")
    parts = [re.fullmatch(r"M≤(\d+): (.*)", part) for part in rest.split("; ")]
    found = sorted((int(part[1]), part[2]) for part in parts if part)
    serving = [text for bound, text in found if m <= bound] or [text for _, text in found[-1:]]
    return f"{name} {serving[0]}" if serving else kernel


def error_of(y: torch.Tensor, x: torch.Tensor, layer: Layer, n: int) -> float | None:
    """Relative RMS error against an fp64 product of a sample of results."""
    if layer.rows is None:
        return None
    columns = torch.arange(0, n, max(n // SAMPLE, 1), device=x.device)
    some = torch.arange(0, len(x), max(len(x) // 16, 1), device=x.device)
    exact = x[some].double() @ layer.rows(columns).T
    got = y[some][:, columns].double()
    return float((got - exact).norm() / exact.norm())


def finish(rows: Sequence[Row], bandwidth: float, peaks: dict[str, float]) -> None:
    """Fill in limits (weights, x and y moved once), shares and ratios to the reference."""
    reference = {
        (r["k"], r["n"], r["m"]): r["ms"] for r in rows if r["engine"] == REFERENCE
    }  # fmt: skip
    for row in rows:
        k, n, m = row["k"], row["n"], row["m"]
        row["memory_ms"] = (row["weight_bytes"] + 2 * m * (n + k)) / bandwidth / 1e6
        row["product_ms"] = 2 * m * n * k * row["products"] / peaks[row["unit"]] / 1e6
        row["bound"] = "memory" if row["memory_ms"] >= row["product_ms"] else row["unit"]
        row["share"] = max(row["memory_ms"], row["product_ms"]) / row["ms"]
        row["weights_share"] = row["weight_bytes"] / bandwidth / 1e6 / row["ms"]
        base = reference.get((k, n, m))
        row["times_reference"] = None if base is None else base / row["ms"]


def least_bytes(l2: int) -> int:
    """Bytes of weights that no cache keeps between two passes."""
    return max(LEAST, 3 * l2)
