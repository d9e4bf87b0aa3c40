"""Seconds that all graph passes take, against the number of nodes of the graph.

    python -m benchmarks.pass_time             # 100 to 10,000 nodes: a minute on 2 cores

The graphs are decoder blocks (normalisation, q/k/v, attention, output, gate/up, down, residuals) as
dynamo would hand them over, shapes recorded, each weight used once and chosen for `int4g16`.
Quantising the values of a weight is timed apart, as "values"; the matrices are small. Seconds are
CPU time of one thread, the faster of two runs (one above 3,000 nodes) after an untimed one.
"overhead" is what verification and the cost model take beside the passes. Writes
`results/pass_time.json` and `.png`.
"""

from __future__ import annotations

import json
import math
import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.machine import facts
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparsefx.ir.format import Format
from sparsefx.ir.sites import ChosenFormat, Traced, group_sites
from sparsefx.passes.manager import Pass, run_passes
from sparsefx.passes.pipeline import PASSES

pack: Any = import_module("sparsefx.passes.pack")
SIZES = (100, 300, 1000, 3000, 10000)
K = 16
SECONDS = 10.0
"""What 10,000 nodes may take."""
RESULTS = Path(__file__).parent / "results"


class Builder:
    """A graph over (2, 8, K) activations with the shape of every node recorded."""

    def __init__(self) -> None:
        self.owner, self.graph = nn.Module(), fx.Graph()
        self.weights: dict[fx.Node, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)

    def placeholder(self, name: str, like: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = like.to("meta")
        return node

    def weight(self, *shape: int) -> fx.Node:
        name = f"w{len(self.weights)}"
        parameter = nn.Parameter(torch.randn(shape, generator=self.random))
        node = self.placeholder(name, parameter.detach())
        self.weights[node] = parameter
        return node

    def call(self, function: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(function, args)
        seen = fx.node.map_arg(args, lambda n: n.meta["example_value"])
        node.meta["example_value"] = function(*seen)
        return node


def graph_of(size: int) -> fx.GraphModule:
    """Decoder blocks until `size` nodes are there; `.weights` are its parameters by node."""
    b = Builder()
    x = b.placeholder("x", torch.empty(2, 8, K))
    while len(b.graph.nodes) < size - 1:
        h = b.call(F.layer_norm, x, (K,))
        q, k, v = (b.call(F.linear, h, b.weight(K, K)) for _ in range(3))
        mixed = b.call(F.scaled_dot_product_attention, q, k, v)
        x = b.call(operator.add, x, b.call(F.linear, mixed, b.weight(K, K)))
        h = b.call(F.layer_norm, x, (K,))
        gate, up = (b.call(F.linear, h, b.weight(2 * K, K)) for _ in range(2))
        h = b.call(operator.mul, b.call(F.silu, gate), up)
        x = b.call(operator.add, x, b.call(F.linear, h, b.weight(K, 2 * K)))
    b.graph.output(x)
    module = fx.GraphModule(b.owner, b.graph)
    pairs = zip(b.graph.nodes, module.graph.nodes, strict=True)
    module.weights = {new: b.weights[old] for old, new in pairs if old in b.weights}  # type: ignore
    return module


@contextmanager
def values_apart(seconds: dict[str, float]) -> Iterator[None]:
    """Add what quantising takes to `seconds["values"]`, and take it off `seconds["pack"]`."""
    real = pack.compress_site
    seconds["values"] = 0.0

    def compress(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        result = real(*args, **options)
        seconds["values"] += time.process_time() - start
        return result

    with patch.object(pack, "compress_site", compress):
        yield
    seconds["pack"] -= seconds["values"]


def timed(current: Pass, seconds: dict[str, float]) -> Pass:
    """The pass, adding to `seconds` what it takes."""

    @wraps(current.run)
    def run(traced: Traced) -> bool:
        start = time.process_time()
        changed = current.run(traced)
        seconds[current.name] = time.process_time() - start
        return changed

    return replace(current, run=run)


def once(size: int) -> tuple[float, dict[str, float]]:
    """Seconds of `run_passes` over a fresh graph, and of each pass."""
    module = graph_of(size)
    weights: Any = module.weights
    traced = Traced(module.graph, weights)
    names = {id(t): (n.name,) for n, t in traced.weights.items()}
    nodes = {n.name: n for n in traced.weights}
    for site in group_sites(names, [traced]):
        traced.chosen[nodes[site.name]] = ChosenFormat(site, Format.parse("int4g16"))
    seconds: dict[str, float] = {}
    passes = [timed(current, seconds) for current in PASSES]
    with values_apart(seconds):
        start = time.process_time()
        run_passes(traced, passes)
        total = time.process_time() - start
    return total, seconds


def measure() -> list[dict[str, Any]]:
    """One row per size."""
    rows = []
    for size in SIZES:
        once(min(size, 300))
        seconds, passes = min(
            (once(size) for _ in range(2 if size <= 3000 else 1)), key=lambda run: run[0]
        )
        overhead = seconds - sum(passes.values())
        rows.append({"nodes": size, "seconds": seconds, "passes": passes, "overhead": overhead})
        shown = ", ".join(f"{name} {s:.3f}" for name, s in passes.items())
        print(f"{size:6d} nodes: {seconds:.3f} s ({shown}, overhead {overhead:.3f})", flush=True)
    return rows


def slope(rows: list[dict[str, Any]]) -> float:
    """The power of the number of nodes that time grows with, over the last decade."""
    a, b = rows[-3], rows[-1]
    return math.log(b["seconds"] / a["seconds"]) / math.log(b["nodes"] / a["nodes"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds against nodes, log-log, with a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    nodes = [r["nodes"] for r in rows]
    fig, axis = plt.subplots(figsize=(9.5, 5), layout="constrained")
    axis.plot(nodes, [r["seconds"] for r in rows], "o-", color="#222222", lw=2.2, label="all")
    names = [*rows[0]["passes"]]
    colors = plt.get_cmap("tab10").colors
    for name, color in zip(names, colors * 3, strict=False):
        axis.plot(
            nodes, [r["passes"].get(name) for r in rows], ".-", color=color, lw=1.1, label=name
        )
    axis.plot(nodes, [r["overhead"] for r in rows], ".--", color="#888888", lw=1.1,
              label="verify, cost model")  # fmt: skip
    last = rows[-1]
    line = [last["seconds"] * n / last["nodes"] for n in nodes]
    axis.plot(nodes, line, ":", color="#d98e04", label="slope 1")
    axis.axhline(SECONDS, color="#c0392b", lw=1, label=f"limit at 10,000 nodes: {SECONDS:g} s")
    axis.set(xscale="log", yscale="log", xlabel="nodes of the graph", ylabel="CPU seconds")
    axis.set_title(f"Time of all passes: {last['seconds']:.2f} s for {last['nodes']} nodes, "
                   f"as nodes^{result['slope']:.2f}", loc="left", fontsize=11)  # fmt: skip
    axis.grid(color="#dddddd", lw=0.7)
    axis.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    rows = measure()
    result = {"machine": facts(), "rows": rows, "slope": slope(rows)}
    result["met"] = rows[-1]["seconds"] < SECONDS
    path = RESULTS / "pass_time.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".png"))
    print(f"time grows with nodes^{result['slope']:.2f}; wrote {path.name} and .png")


if __name__ == "__main__":
    main()
