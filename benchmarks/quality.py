"""Perplexity of SmolLM2 after one-shot compression, calibrated on one novel, judged on another.

    SPARSEFX_AUSTEN=… python benchmarks/quality.py    # writes benchmarks/results/quality.json

Calibration: 16×512 tokens of "Emma"; evaluation: 8×512 tokens of "Persuasion", as printed. The
novels come from Debian's r-cran-janeaustenr (`apt-get install r-cran-janeaustenr`, or
`apt-get download` and `dpkg-deb -x`, with SPARSEFX_AUSTEN naming the `data` folder inside).
Every spec runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

LIMITS = {"bitmap@50%": 1.55, "bitmap@50%+int4g128": 1.90, "2:4": 2.4}
"""The most that perplexity may grow, as a multiple of dense."""
SPECS = (*LIMITS, "int4g128", "tile16x1@25%", "int3g128")
RESULTS = Path(__file__).parent / "results" / "quality.json"


def measure(spec: str) -> dict[str, Any]:
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
    if spec == "dense":
        return {"spec": spec, "perplexity": perplexity(causal_lm(), held_out)}
    batches = [{"input_ids": row[None]} for row in tokens("EMMA", 16).view(16, 512)]
    model = causal_lm()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    start = time.perf_counter()
    sparsefx.sparsify(
        model, spec, example_inputs={"input_ids": batches[0]["input_ids"][:, :32]},
        calibration=batches,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    packed = [m.packed for m in packed_modules(model).values()]
    return {
        "spec": spec,
        "perplexity": perplexity(model, held_out),
        "seconds": round(seconds, 1),
        "bits": round(8 * sum(p.stored_bytes for p in packed) / sum(p.n * p.k for p in packed), 3),
        "model_mb": round(weights / 1e6),
        "before_mb": round(before / 1e6),
        "peak_mb": round(sparsefx.explain(model).peak_bytes / 1e6),
    }


def main() -> None:
    """Measure every spec in its own process, print the table, write the results."""
    rows = []
    for spec in ("dense", *SPECS):
        Console(stderr=True).print(f"[dim]{spec} …[/]")
        done = subprocess.run(
            [sys.executable, __file__, spec], stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    dense = rows[0]["perplexity"]
    table = Table(title=f"SmolLM2-135M (dequantised from Q4_1), dense perplexity {dense:.2f}")
    for head in ("spec", "bits", "perplexity", "× dense", "at most", "s", "memory before/peak MB"):
        table.add_column(head, justify="left" if head == "spec" else "right")
    for row in rows[1:]:
        row["ratio"] = round(row["perplexity"] / dense, 3)
        limit = LIMITS.get(row["spec"])
        table.add_row(
            row["spec"], f"{row['bits']:.2f}", f"{row['perplexity']:.1f}", f"{row['ratio']:.2f}",
            "" if limit is None else f"{limit:.2f}", f"{row['seconds']:.0f}",
            f"{row['before_mb']} / {row['peak_mb']}",
        )  # fmt: skip
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"threads": torch.get_num_threads(), "machine": platform.machine(), "cpu": _cpu()}
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((x.partition(":")[2].strip() for x in info.splitlines() if "model name" in x), "")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
