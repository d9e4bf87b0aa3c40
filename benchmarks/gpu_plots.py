"""The picture of a GPU run: speed-up over cuBLAS bf16 per engine and M.

python -m benchmarks.gpu_plots benchmarks/results/gpu-….json     # draws a run anew
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS, PEER, LIMIT, INK = "#0b6e99", "#d98e04", "#333333", "#222222"
PANELS = (1, 16, 2048)


def draw(result: dict[str, Any], path: Path) -> None:
    """Dots on a log axis, an engine a line, for the first shape of the run; a tick is its limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in result["rows"] if r["times_reference"] is not None]
    if not rows:
        return
    k, n = rows[0]["k"], rows[0]["n"]
    rows = [r for r in rows if (r["k"], r["n"]) == (k, n)]
    measured = sorted({r["m"] for r in rows})
    panels = [m for m in PANELS if m in measured] or measured[:3]
    found = {m: {r["engine"]: r for r in rows if r["m"] == m} for m in panels}
    names = list({r["engine"]: r["ours"] for r in reversed(rows)})
    names.sort(key=lambda name: float(found[panels[0]].get(name, {}).get("times_reference", 0)))
    fig, axes = plt.subplots(
        1, len(panels), sharey=True, figsize=(3.4 + 3.4 * len(panels), 1.6 + 0.25 * len(names)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, m in zip(axes[0], panels, strict=True):
        _panel(axis, m, names, found[m])
    card = result["machine"]["card"]
    note = "\na rehearsal on the processor: the figures mean nothing" * result["rehearsal"]
    fig.suptitle(
        f"One linear layer, K×N {k}×{n}, on {card}: times as fast as cuBLAS bf16{note}",
        x=0.01, ha="left", fontsize=12, color=INK,
    )  # fmt: skip
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _panel(axis: Any, m: int, names: list[str], found: dict[str, dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for y, name in enumerate(names):
        if name not in found:
            continue
        row = found[name]
        color, times = OURS if row["ours"] else PEER, row["times_reference"]
        limit = times / row["share"]
        axis.plot([times, limit], [y, y], color=color, lw=1.5, alpha=0.35, zorder=2)
        axis.plot(limit, y, "|", color=LIMIT, ms=8, mew=1.6, zorder=3)
        axis.plot(times, y, "o", color=color, ms=6, zorder=4)
        axis.annotate(
            f"{times:.2f}", (times, y), xytext=(-7, 0), textcoords="offset points", ha="right",
            va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axis.axvline(1, color=PEER, ls=":", lw=1.3, zorder=1)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low / 1.5, high)
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", color="#dddddd", lw=0.8, zorder=0)
    axis.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.set_title(f"M = {m}", loc="left", fontsize=10.5, color=INK)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
