"""The picture of a CPU run: time per engine at M=1 and M=128, with the limit of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import READ, REFERENCE

OURS, PEER, LIMIT, INK = "#0b6e99", "#d98e04", "#333333", "#222222"


def draw(result: dict[str, Any], path: Path, shape: tuple[int, int] = (4096, 4096)) -> None:
    """Dots on a log axis, one line per engine, ordered by M=1; a tick marks the engine's limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [
        r for r in result["rows"]
        if (r["k"], r["n"]) == shape and r["threads"] == 1 and r["engine"] != READ
    ]  # fmt: skip
    panels = {m: {r["engine"]: r for r in rows if r["m"] == m} for m in (1, 128)}
    names = sorted(panels[1], key=lambda name: float(panels[1][name]["ms"]), reverse=True)
    if not names:
        return
    fig, axes = plt.subplots(
        1, 2, sharey=True, figsize=(12.5, 1.9 + 0.27 * len(names)), layout="constrained"
    )
    for axis, (m, found) in zip(axes, panels.items(), strict=True):
        _panel(axis, m, names, found)
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_color(OURS if panels[1][name]["ours"] else INK)
    machine = result["machine"]
    speed = machine["bandwidth_gb_s"].get("1", machine["bandwidth_gb_s"].get(1, 0.0))
    fig.suptitle(
        f"One linear layer, K×N {shape[0]}×{shape[1]}, 1 thread of {machine['cpu']} "
        f"(reads {speed:.1f} GB/s)",
        x=0.01, ha="left", fontsize=13, color=INK,
    )  # fmt: skip
    _legend(fig)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _legend(fig: Any) -> None:
    from matplotlib.lines import Line2D

    fig.legend(
        handles=[
            Line2D([], [], color=OURS, marker="o", ls="", label="sparsefx"),
            Line2D([], [], color=PEER, marker="o", ls="", label="other engines"),
            Line2D([], [], color=LIMIT, marker="|", ms=11, mew=2, ls="",
                   label="limit: weight bytes / bandwidth, or products / peak where that is more"),
            Line2D([], [], color=PEER, ls=":", label=REFERENCE),
        ],
        loc="outside lower center", ncols=4, frameon=False, fontsize=9.5,
    )  # fmt: skip


def _panel(axis: Any, m: int, names: list[str], found: dict[str, dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for y, name in enumerate(names):
        if name not in found:
            continue
        row = found[name]
        color = OURS if row["ours"] else PEER
        limit = max(row["memory_ms"], row["product_ms"])
        axis.plot([limit, row["ms"]], [y, y], color=color, lw=1.6, alpha=0.35, zorder=2)
        axis.plot(limit, y, "|", color=LIMIT, ms=9, mew=1.8, zorder=3)
        axis.plot(row["ms"], y, "o", color=color, ms=6.5, zorder=4)
        text = f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}"
        axis.annotate(
            text, (max(row["ms"], limit), y), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=INK, zorder=5,
            bbox={"boxstyle": "square,pad=0.12", "fc": "white", "ec": "none"},
        )  # fmt: skip
    if REFERENCE in found:
        axis.axvline(found[REFERENCE]["ms"], color=PEER, ls=":", lw=1.4, zorder=1)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * 1.45)
    axis.set_yticks(range(len(names)), names, fontsize=9.5)
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", color="#dddddd", lw=0.8, zorder=0)
    axis.tick_params(length=0, colors=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.set_title(f"M = {m}", loc="left", fontsize=11, color=INK)
    axis.set_xlabel("milliseconds (log scale)", color=INK)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
