"""Encoders and an image classifier after compression, one-shot and recovered.

    python -m benchmarks.encoders
    python -m benchmarks.encoders --only "minilm 2:4"

MiniLM is judged by retrieval, AntiBERTy by masked residues, EfficientNet-lite0 by agreement with
its dense self on photographs: its 1x1 convolutions and its classifier are compressed. The models,
their calibration data and what they are judged by ship inside packages (see `sparsefx.models`);
EfficientNet needs requirements-zoo.txt too. Every row runs in a process of its own, so that its
peak memory is its own, and is written to benchmarks/results/encoders.json at once: rows of earlier
runs stay until run again.
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

RESULTS = Path(__file__).parent / "results" / "encoders.json"
_ENCODER = {"bitmap@50%+int4g128": 0.01, "2:4+int8": 0.02, "tile16x1@50%+int4g128": 0.04}
LIMITS: dict[str, dict[str, float | None]] = {
    "minilm": {**_ENCODER},
    "antiberty": {**_ENCODER},
    "efficientnet": dict.fromkeys(("bitmap@50%+int8", "2:4+int8", "int4g32", "int8")),
}
"""Model → format → the most that the headline figure may fall after recovery, as a share of dense;
None is no limit."""


@dataclass(frozen=True)
class Training:
    """What a row is calibrated on and, where it is recovered, how it is trained."""

    batches: int
    """Of 64 sentences, of 16 sequences, of 15 crops."""
    parts: int = 1
    """Parts that a batch is trained on in: as many more steps from the same data."""
    epochs: int = 5
    whole_epochs: int = 3

    @property
    def recovery(self) -> dict[str, float]:
        """The spec's field."""
        own = {"epochs": self.epochs, "whole_epochs": self.whole_epochs}
        return {"scale_epochs": 1, "learning_rate": 0.01, **own}


TRAINING = {
    "minilm": Training(36),
    "minilm 2:4+int8 recovered": Training(144, 4, 2, 4),
    "minilm tile16x1@50%+int4g128 recovered": Training(144, 4, 2, 4),
    "antiberty": Training(20, 4, 2, 2),
    "antiberty tile16x1@50%+int4g128 recovered": Training(176, 2, 1, 3),
    "efficientnet": Training(10),
}
"""By model; by the row's name where that needs more."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    format: str
    recovered: bool

    @property
    def name(self) -> str:
        return f"{self.model} {self.format}" + " recovered" * self.recovered

    @property
    def training(self) -> Training:
        """Its own, or its model's."""
        return TRAINING.get(self.name, TRAINING[self.model])

    @property
    def limit(self) -> str:
        """What the headline figure may change by, in percent; empty where nothing is promised."""
        limit = LIMITS[self.model][self.format]
        return "" if limit is None or not self.recovered else f"-{100 * limit:.0f}"


ROWS = [Row(m, f, r) for m, formats in LIMITS.items() for f in formats for r in (False, True)]


def measure(row: Row) -> dict[str, Any]:
    """Judge dense, compress, judge again."""
    import sparsefx
    from sparsefx.models import MODELS
    from sparsefx.runtime.install import packed_modules

    bundle, training = MODELS[row.model](), row.training
    parts = training.parts if row.recovered else 1
    batches = [
        dict(zip(whole, part, strict=True))
        for whole in bundle.calibration(training.batches)
        for part in zip(*(t.chunk(parts) for t in whole.values()), strict=True)
    ]
    dense = bundle.metric(bundle.model)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    spec = {"format": row.format} | ({"recovery": training.recovery} if row.recovered else {})
    start = time.perf_counter()
    model = sparsefx.sparsify(
        bundle.model, spec, example_inputs=bundle.example_inputs,
        calibration=batches,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    packed = [m.packed for m in packed_modules(model).values()]
    return {
        "name": row.name,
        "spec": spec,
        "batches": len(batches),
        "headline": bundle.headline,
        "dense": dense,
        "found": bundle.metric(model),
        "seconds": round(seconds, 1),
        "bits": round(8 * sum(p.stored_bytes for p in packed) / sum(p.n * p.k for p in packed), 3),
        "before_mb": round(before / 1e6),
        "peak_mb": round(sparsefx.explain(model).peak_bytes / 1e6),
        "threads": torch.get_num_threads(),
        "cpu": processor(),
    }


def main() -> None:
    """Measure the chosen rows, each in its own process; print the table, write the results."""
    rows = {row.name: row for row in ROWS}
    found = run("benchmarks.encoders", [*rows], lambda name: measure(rows[name]), RESULTS)
    if found is not None:
        Console().print(_table(found))


def _table(found: Found) -> Table:
    table = Table(title="Quality of encoders and an image classifier after compression")
    for head in ("how", "bits", "figure", "dense", "found", "change %", "at most %", "s"):
        left = head in ("how", "figure")
        table.add_column(head, justify="left" if left else "right", overflow="fold")
    for row in (r for r in ROWS if r.name in found):
        got = found[row.name]
        for figure, dense in got["dense"].items():
            new = got["found"][figure]
            table.add_row(
                row.name, f"{got['bits']:.2f}", figure, f"{dense:.4f}", f"{new:.4f}",
                f"{100 * (new / dense - 1):+.1f}", row.limit, f"{got['seconds']:.0f}",
            )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
