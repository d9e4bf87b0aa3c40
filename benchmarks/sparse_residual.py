"""What a sparse residual buys (LOST, SLTrain, SpQR: the largest misfits kept apart in 16 bits),
beside the same bits spent on more kept weights, smaller groups, or a low-rank branch.

    python -m benchmarks.sparse_residual

Weights of SmolLM2 with the second moments of their own inputs, by the default algorithm. An entry
of the residual counts as 16 bits, its position as the entropy of its share: no layout stores it in
less. Branch and residual are found the same way: in turns with the rounding, from the error and
from the weight, the best of all kept. Results: benchmarks/results/sparse-residual.json.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sparsefx.ir.format import Format
from sparsefx.ir.sites import Site
from sparsefx.passes.collector import collect
from sparsefx.passes.compress_site import STARTS, TURNS, Bench, compress_site
from sparsefx.passes.recipe import Recipe
from sparsefx.passes.statistics import Statistics, output_error

RESULTS = Path(__file__).parent / "results" / "sparse-residual.json"
LAYERS, PARTS = (3, 15, 27), ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
BATCHES = 8
Rows = list[dict[str, Any]]
RECIPE = Recipe("obs", "sweep", ("descend",))


@dataclass(frozen=True)
class Case:
    """A format, the share of weights kept apart beside it, and a format of about the same bits."""

    format: str
    share: float
    instead: str


CASES = (
    Case("bitmap@50%+int4g128", 0.01, "bitmap@44%+int4g128"),
    Case("2:4+int4g128", 0.01, "bitmap@44%+int4g128"),
    Case("tile16x1@50%+int4g128", 0.01, "tile16x1@44%+int4g128"),
    Case("int3g128", 0.005, "int3g64"),
)


def entry_bits(share: float) -> float:
    """Bits per weight of the matrix that a residual of this share takes at the least."""
    rest = 1 - share
    return 16 * share - share * math.log2(share) - rest * math.log2(rest)


def rank_for(site: Site, bits: float) -> int:
    """The greatest rank whose branch takes no more than `bits` per weight."""
    return int(bits * site.n * site.k / (16 * (site.n + site.k)))


def residual(error: Tensor, moments: Tensor, share: float) -> Tensor:
    """The entries that mend the outputs of `error` (N, K) most, each row's fitted together, in
    float16; 0 elsewhere."""
    toward = error @ moments
    gain = toward.square() / moments.diagonal().clamp(min=1e-12)
    chosen = torch.zeros(error.numel(), dtype=torch.bool)
    chosen[gain.flatten().topk(round(share * error.numel())).indices] = True
    out = torch.zeros_like(error)
    for row, mask in enumerate(chosen.view_as(error)):
        at = mask.nonzero()[:, 0]
        out[row, at] = torch.linalg.lstsq(moments[at][:, at], toward[row, at, None]).solution[:, 0]
    return out.half().float()


def with_residual(
    site: Site, weight: Tensor, case: Case, statistics: Statistics
) -> tuple[float, float]:
    """Bits per weight and output error of the format with its residual."""
    moments = statistics.second
    assert moments is not None
    bench = Bench(site, Format.parse(case.format), RECIPE, statistics)
    best, bits = math.inf, 0.0
    for _, from_error in STARTS:
        misfits = torch.zeros_like(weight)
        if not from_error:
            misfits = residual(weight, moments, case.share)
        for _ in range(TURNS + from_error):
            target = weight - misfits
            packed = bench.improve(target, bench.store(target, weight), weight)
            stored = packed.unpack()
            misfits = residual(weight - stored, moments, case.share)
            best = min(best, output_error(weight, stored + misfits, statistics))
        bits = 8 * packed.stored_bytes / weight.numel() + entry_bits(case.share)
    return bits, best


def plain(site: Site, weight: Tensor, text: str, statistics: Statistics) -> tuple[float, float]:
    """Bits per weight and output error of a format."""
    result = compress_site(site, weight, Format.parse(text), RECIPE, statistics)
    parts = (result.packed.stored_bytes, *(t.numel() * 2 for t in result.branch[:2]))
    return 8 * sum(parts) / weight.numel(), output_error(weight, result.dense(), statistics)


def measure(site: Site, weight: Tensor, statistics: Statistics) -> Rows:
    """Every case and its three alternatives at one weight."""
    rows = []
    for case in CASES:
        rank = rank_for(site, entry_bits(case.share))
        ways = {
            "format": plain(site, weight, case.format, statistics),
            "residual": with_residual(site, weight, case, statistics),
            "branch": plain(site, weight, f"{case.format}+r{rank}", statistics),
            "instead": plain(site, weight, case.instead, statistics),
        }
        rows.append({"site": site.name, "case": case.format, "ways": ways})
    return rows


def main() -> None:
    """Measure, print the table, write the results."""
    from sparsefx.ir.capture import split_inputs
    from sparsefx.models import MODELS

    bundle = MODELS["smollm2"]()
    names = [f"model.layers.{i}.{part}.weight" for i in LAYERS for part in PARTS]
    weights = {name: bundle.model.get_parameter(name) for name in names}
    sites = {n: Site((n,), tuple(w.shape), "linear") for n, w in weights.items()}
    calls = [split_inputs(batch) for batch in bundle.calibration(BATCHES)]
    with torch.no_grad():
        found = collect(
            {n: (sites[n], w) for n, w in weights.items()},
            lambda: (bundle.model(*args, **kwargs) for args, kwargs in calls),
        )
    rows = [
        row
        for name in track(names, "Weights")
        for row in measure(sites[name], weights[name].detach().float(), found[name])
    ]
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    Console().print(_table(rows))


def _table(rows: Rows) -> Table:
    table = Table(title="Bits per weight and relative output error, geometric mean over weights")
    for head in ("format", "beside it", "bits", "error"):
        table.add_column(head, justify="left" if head in ("format", "beside it") else "right")
    for case in CASES:
        found = [row["ways"] for row in rows if row["case"] == case.format]
        for way, format, beside in (
            ("format", case.format, ""),
            ("residual", "", f"{case.share:.1%} of the weights in 16 bits"),
            ("branch", "", "a branch of as many bits"),
            ("instead", case.instead, "instead"),
        ):
            bits = sum(ways[way][0] for ways in found) / len(found)
            error = math.exp(sum(math.log(ways[way][1]) for ways in found) / len(found))
            table.add_row(format, beside, f"{bits:.2f}", f"{error:.4f}")
        table.add_section()
    return table


if __name__ == "__main__":
    main()
