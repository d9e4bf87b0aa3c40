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
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "gpu-roofline.json"
N, K = 8192, 28672
"""Llama-3-70B's down projection."""
SAMPLE = (512, 2048)
"""N and K of the weight that is packed to learn bytes and configurations."""
ROWS = (1, 16, 256, 2048)
FORMATS = (
    ("int4g128", "columns"), ("int3g128", "columns"), ("int2g128", "columns"),
    ("int8", "columns"), ("int8+a8", "columns"), ("tile64x16@50%+int4g128", "columns"),
    ("tile16x1@50%+int4g128", "columns"), ("tile64x16@50%+bf16", "columns"),
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
    return Bound(card, "dense bf16", m, seconds[limit] * 1e6, limit, 0.0, 16.0, False)


def bound(card: str, spec: str, order: str, m: int) -> Bound:
    """The format's kernel for `m` rows."""
    from sparsefx.codegen.cards import CARDS, Work, roofline
    from sparsefx.codegen.triton_aot import compile_for, signature_of
    from sparsefx.codegen.triton_pack import Columns
    from sparsefx.codegen.triton_record import record

    at = CARDS[card]
    made = record(spec, order, m, SAMPLE, at.sms)
    weight, config = made.weight, made.config
    signature, constants = signature_of(made.kernel, made.arguments)
    out = compile_for(made.kernel, signature, constants, at.target, config.warps, config.stages)
    decoded = weight.parts * weight.slice if isinstance(weight, Columns) else 32 * weight.cell
    per_weight = out.per_weight(decoded * config.block_n)
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
    """All cards, formats and numbers of rows; a kernel without a loop or fit is left out."""
    from sparsefx.codegen.cards import CARDS

    jobs = [(c, f, o, m) for c in CARDS for f, o in FORMATS for m in ROWS]
    for card in CARDS:
        yield from (dense(card, m) for m in ROWS)
    for job in track(jobs, "compiling", transient=True):
        yield bound(*job)


def show(found: list[Bound], console: Console) -> None:
    """One table per number of rows: formats down, cards across."""
    cards = list(dict.fromkeys(b.card for b in found))
    for m in ROWS:
        table = Table(title=f"least µs, K×N {K}×{N}, M={m} (limit; * spills)", title_justify="left")
        table.add_column("format")
        for card in cards:
            table.add_column(card, justify="right")
        for spec in dict.fromkeys(b.format for b in found):
            cells = []
            for card in cards:
                one = next(b for b in found if (b.card, b.format, b.m) == (card, spec, m))
                best = min(b.microseconds for b in found if (b.card, b.m) == (card, m))
                text = f"{one.microseconds:.0f} {one.limit}{'*' * one.spills}"
                cells.append(f"[bold]{text}[/]" if one.microseconds <= 1.02 * best else text)
            table.add_row(spec, *cells)
        console.print(table)


def main() -> None:
    """Print the tables and write them."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    torch.manual_seed(0)
    found = list(bounds())
    show(found, Console(width=150))
    payload = {"triton": triton.__version__, "n": N, "k": K, "bounds": [vars(b) for b in found]}
    RESULTS.write_text(json.dumps(payload, indent=1) + "\n")


if __name__ == "__main__":
    main()
