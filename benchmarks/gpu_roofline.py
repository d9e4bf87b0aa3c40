"""Which format should win on which card: `python -m benchmarks.gpu_roofline`, no GPU needed.

Every kernel is compiled for the card's generation with the configuration that is its default there;
instructions per weight come from its inner loop, bytes from the stored order. The time is the
longest of memory, tensor cores, integer and float lanes, and issue slots, each at its peak: no
kernel is faster, real ones are slower. Nothing is timed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from sparsefx.codegen.triton_aot import Compiled
    from sparsefx.codegen.triton_record import Launch

RESULTS = Path(__file__).parent / "results" / "gpu-roofline.json"
N, K = 8192, 28672
"""Llama-3-70B's down projection."""
DENSE = "dense bf16"
SAMPLE = (512, 2048)
"""N and K of the weight that is packed to learn bytes and configurations."""
PROCESSORS = 132
ROWS = (1, 16, 256, 2048)
FORMATS = (
    ("int4g128", "columns"), ("int3g128", "columns"), ("int2g128", "columns"),
    ("int8", "columns"), ("int8+a8", "columns"), ("tile64x16@50%+int4g128", "columns"),
    ("tile16x1@50%+int4g128", "columns"), ("tile64x16@50%+bf16", "columns"),
    ("tile1x16@50%+int4g128", "lanes"),
    ("2:4+bf16", "masked"), ("bitmap@50%+int4g128", "masked"),
)  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """The least time of one product on a card."""

    card: str
    format: str
    m: int
    microseconds: float
    limit: str
    per_weight: float
    """Instructions per weight that is decoded."""
    bits: float
    """Bits read per weight of the dense matrix."""
    spills: bool


def dense(card: str, m: int) -> Bound:
    """bfloat16, by the peaks alone."""
    from sparsefx.codegen.cards import CARDS

    at = CARDS[card]
    seconds = {
        "memory": 2 * (N * K + m * (N + K)) / at.bandwidth, "tensor": 2 * m * N * K / at.fp16,
    }  # fmt: skip
    limit = max(seconds, key=lambda name: seconds[name])
    return Bound(card, DENSE, m, seconds[limit] * 1e6, limit, 0.0, 16.0, False)


@cache
def compiled(target: str, spec: str, order: str, m: int) -> tuple[Launch, Compiled]:
    """The format's kernel for `m` rows; cards differ only in how many tasks they want."""
    from sparsefx.codegen.triton_record import record

    made = record(spec, order, m, SAMPLE, PROCESSORS)
    return made, made.compile_for(target)


def bound(card: str, spec: str, order: str, m: int) -> Bound:
    """The format's kernel for `m` rows."""
    from sparsefx.codegen.cards import CARDS, Work, roofline

    made, out = compiled(CARDS[card].target, spec, order, m)
    weight, config, per_weight = made.weight, made.config, made.per_weight(out)
    share = _decoded(weight) / (SAMPLE[0] * SAMPLE[1])
    bits = 8 * weight.bytes / (SAMPLE[0] * SAMPLE[1])
    a8 = spec.endswith("+a8")
    work = Work(
        N * K * bits / 8 + 2 * m * (N + K), m, N, int(K * share), "int8" if a8 else "bf16",
        per_weight, int(N * K * share), -(-m // config.block_m),
    )  # fmt: skip
    seconds = dict(roofline(card, work).seconds)
    if config.vector:
        del seconds["tensor"]
    limit = max(seconds, key=lambda name: seconds[name])
    return Bound(
        card, spec, m, seconds[limit] * 1e6, limit, per_weight["all"], bits, out.spilled > 0
    )


def _decoded(weight: object) -> int:
    """Positions that the kernel decodes: stored ones in strips, all under a mask."""
    from sparsefx.codegen.triton_pack import Columns

    if isinstance(weight, Columns):
        return sum(weight.counts) * weight.parts * weight.slice * weight.rows
    return SAMPLE[0] * SAMPLE[1]


def bounds() -> Iterator[Bound]:
    """All cards, formats and numbers of rows that the format's kernel takes."""
    from sparsefx.codegen.cards import CARDS

    jobs = [(c, f, o, m) for c in CARDS for f, o in FORMATS for m in ROWS if o != "lanes" or m <= 4]
    for card in CARDS:
        yield from (dense(card, m) for m in ROWS)
    for job in track(jobs, "compiling", transient=True):
        yield bound(*job)


def show(found: list[Bound], console: Console) -> None:
    """One table per number of rows: formats down, cards across."""
    cards = list(dict.fromkeys(b.card for b in found))
    at = {(b.card, b.format, b.m): b for b in found}
    for m in ROWS:
        table = Table(title=f"least µs, K×N {K}×{N}, M={m} (limit; * spills)", title_justify="left")
        table.add_column("format")
        for card in cards:
            table.add_column(card, justify="right")
        for spec in dict.fromkeys(b.format for b in found):
            cells = []
            for card in cards:
                one = at.get((card, spec, m))
                if one is None:
                    cells.append("")
                    continue
                best = min(b.microseconds for b in found if (b.card, b.m) == (card, m))
                text = f"{one.microseconds:.0f} {one.limit}{'*' * one.spills}"
                cells.append(f"[bold]{text}[/]" if one.microseconds <= 1.02 * best else text)
            table.add_row(spec, *cells)
        console.print(table)


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """A panel per card, formats down, rows of x across: least time relative to dense bf16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    cards = list(dict.fromkeys(b["card"] for b in found))
    formats = [f for f in dict.fromkeys(b["format"] for b in found) if f != DENSE]
    at = {(b["card"], b["format"], b["m"]): b for b in found}
    fig, axes = plt.subplots(
        2, -(-len(cards) // 2), sharex=True, sharey=True, figsize=(13, 8.5), layout="constrained"
    )
    for axis, card in zip(axes.flat, cards, strict=False):
        grid = [[_relative(at, card, f, m) for m in ROWS] for f in formats]
        image = axis.imshow(grid, cmap="RdBu_r", norm=LogNorm(1 / 8, 8), aspect="auto")
        for y, spec in enumerate(formats):
            for x, m in enumerate(ROWS):
                if (one := at.get((card, spec, m))) is not None:
                    text = f"{grid[y][x]:.2f}\n{one['limit']}"
                    far = not 1 / 3 < grid[y][x] < 3
                    color = "white" if far else "black"
                    axis.text(x, y, text, ha="center", va="center", fontsize=7.5, color=color)
        axis.set_title(card, loc="left", fontsize=11)
        axis.set_xticks(range(len(ROWS)), [f"M={m}" for m in ROWS])
        axis.set_yticks(range(len(formats)), formats)
        axis.tick_params(length=0)
    fig.colorbar(image, ax=axes, label="least time / dense bf16's (log)", shrink=0.6)
    fig.suptitle(
        f"Least time of x · Wᵀ, K×N {K}×{N}, over that of dense bf16, and what bounds it.\n"
        "Compiled, not run: every resource at its peak, so real kernels are slower.",
        x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _relative(
    at: dict[tuple[str, str, int], dict[str, Any]], card: str, spec: str, m: int
) -> float:
    one = at.get((card, spec, m))
    return one["microseconds"] / at[card, DENSE, m]["microseconds"] if one else float("nan")


def main() -> None:
    """Print the tables, write and draw them."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    torch.manual_seed(0)
    found = list(bounds())
    show(found, Console(width=150))
    rows = [vars(b) for b in found]
    payload = {"triton": triton.__version__, "n": N, "k": K, "bounds": rows}
    RESULTS.write_text(json.dumps(payload, indent=1) + "\n")
    draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
