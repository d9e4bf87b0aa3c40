"""Perplexity of SmolLM2 after compression, calibrated on one novel, judged on another.

    SPARSEFX_AUSTEN=… python -m benchmarks.quality              # every row that takes minutes
    SPARSEFX_AUSTEN=… python -m benchmarks.quality --only recovered

Calibration: up to 128×512 tokens of "Emma"; evaluation: 8×512 tokens of "Persuasion", as printed.
The novels come from Debian's r-cran-janeaustenr (`apt-get install r-cran-janeaustenr`, or
`apt-get download` and `dpkg-deb -x`, with SPARSEFX_AUSTEN naming the `data` folder inside).
Every row runs in a process of its own, so that its peak memory is its own, and is written to
benchmarks/results/quality.json at once: rows of earlier runs stay until they are run again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.rows import Found, run
from rich.console import Console
from rich.table import Table

from sparsefx.codegen.crossover import processor

RESULTS = Path(__file__).parent / "results" / "quality.json"
SPARSE4 = "bitmap@50%+int4g128"
SHORT = {"epochs": 2, "scale_epochs": 1, "learning_rate": 0.01, "whole_epochs": 1}
"""Recovery that takes less than an hour on two cores."""


@dataclass(frozen=True)
class Row:
    """One line of the table: how the model is compressed, and with how many sequences."""

    name: str
    spec: dict[str, Any]
    limit: float | None = None
    """The most that perplexity may grow, as a multiple of dense."""
    sequences: int = 16
    long: bool = False
    """Takes more than some minutes; run when asked for by name."""


def _one_shot(text: str, limit: float | None = None, sequences: int = 16, **spec: Any) -> Row:
    more = " ".join(f"{key}={value}" for key, value in spec.items())
    name = " ".join(filter(None, (text, more, f"({sequences})" if sequences != 16 else "")))
    return Row(name, {"format": text, **spec}, limit, sequences)


def _recovered(text: str, limit: float, sequences: int = 64, **more: int) -> Row:
    recovery = {**SHORT, **more}
    return Row(
        f"{text} recovered", {"format": text, "recovery": recovery}, limit, sequences, long=True
    )


ROWS = (
    _one_shot("bitmap@50%", 1.55),
    _one_shot("int4g128"),
    _one_shot("tile16x1@25%"),
    _one_shot("2:4", 2.4),
    _one_shot("int3g128", 1.6, 64),
    _one_shot(SPARSE4, 1.45, 64),
    _one_shot("2:4+int4g128", 1.9, 64),
    _one_shot("tile16x1@25%+int4g128+r32", 1.6, 64),
    _one_shot(SPARSE4, criterion="random", solver="nearest", after=[]),
    _one_shot(SPARSE4, criterion="magnitude", solver="nearest", after=[]),
    _one_shot(SPARSE4, criterion="wanda", solver="nearest", after=[]),
    _one_shot(SPARSE4, criterion="wanda"),
    _one_shot(SPARSE4, after=[], follow=0.0),
    _one_shot(SPARSE4, follow=0.0),
    _one_shot(SPARSE4),
    _one_shot(SPARSE4, ratios="outlier"),
    _one_shot(SPARSE4, ratios="sensitivity"),
    _one_shot(SPARSE4, smooth=True),
    _recovered(SPARSE4, 1.25),
    _recovered("2:4+int4g128", 1.45, whole_epochs=2),
    _recovered("tile16x1@25%+int4g128+r32", 1.3),
    _recovered("tile16x1@50%+int4g128+r32", 2.2, 32),
)


def measure(row: Row | None) -> dict[str, Any]:
    """Compress, then judge; perplexities, seconds, and bytes of memory before and at the peak."""
    import sparsefx
    from sparsefx.models.smollm2 import causal_lm, perplexity, tokenizer
    from sparsefx.models.text import novel_as_printed
    from sparsefx.runtime.install import packed_modules

    encode = tokenizer()

    def tokens(title: str, count: int) -> torch.Tensor:
        ids = torch.tensor(encode(novel_as_printed(title), verbose=False)["input_ids"])
        return ids[2000 : 2000 + count * 512]

    held_out = tokens("Persuasion", 8)
    if row is None:
        return {"name": "dense", "perplexity": perplexity(causal_lm(), held_out)}
    ids = tokens("EMMA", row.sequences).view(row.sequences, 512)
    batches = [{"input_ids": sequence[None]} for sequence in ids]
    model = causal_lm()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    start = time.perf_counter()
    sparsefx.sparsify(
        model, row.spec, example_inputs={"input_ids": batches[0]["input_ids"][:, :32]},
        calibration=batches,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    packed = [m.packed for m in packed_modules(model).values()]
    return {
        "name": row.name,
        "spec": row.spec,
        "sequences": row.sequences,
        "perplexity": perplexity(model, held_out),
        "seconds": round(seconds, 1),
        "bits": round(8 * sum(p.stored_bytes for p in packed) / sum(p.n * p.k for p in packed), 3),
        "model_mb": round(weights / 1e6),
        "before_mb": round(before / 1e6),
        "peak_mb": round(sparsefx.explain(model).peak_bytes / 1e6),
        "threads": torch.get_num_threads(),
        "cpu": processor(),
    }


def main() -> None:
    """Measure the chosen rows, each in its own process; print the table, write the results."""
    rows = {row.name: row for row in ROWS}
    found = run(
        "benchmarks.quality", ["dense", *rows], lambda name: measure(rows.get(name)), RESULTS,
        lambda name: name in rows and not rows[name].long, base="dense",
    )  # fmt: skip
    if found is not None:
        Console().print(_table(found))


def _table(found: Found) -> Table:
    dense = found["dense"]["perplexity"]
    table = Table(title=f"SmolLM2-135M (dequantised from Q4_1), dense perplexity {dense:.2f}")
    heads = ("how", "bits", "perplexity", "× dense", "at most", "s", "memory before/peak MB")
    for head in heads:
        table.add_column(head, justify="left" if head == "how" else "right", overflow="fold")
    for wanted in ROWS:
        if (row := found.get(wanted.name)) is None:
            continue
        limit = "" if wanted.limit is None else f"{wanted.limit:.2f}"
        table.add_row(
            row["name"], f"{row['bits']:.2f}", f"{row['perplexity']:.1f}",
            f"{row['perplexity'] / dense:.2f}", limit, f"{row['seconds']:.0f}",
            f"{row['before_mb']} / {row['peak_mb']}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
