"""Predicted against measured time of stored weights: is the cost model right on this machine?

    python -m benchmarks.cost                                 # results/cpu-<machine>.json
    python -m benchmarks.cost benchmarks/results/cpu-x.json

Reads what `benchmarks.cpu` measured, all of sparsefx's own rows and torch's fp32 products. Rows of
a family and thread count are sorted by shape, M and format and dealt into two halves in turns; the
constants are fitted to one half and judged on the other, and the other way round, so that every
prediction shown was made without the row it is compared with. "new shapes" fits one thread's 4096 ×
4096 rows only and predicts the other shapes. The constants in the file are fitted to all rows.
Writes `results/cost-<machine>.json` and `.png`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.machine import slug

from sparsefx.ir.format import Format
from sparsefx.ir.layouts import NM, Bitmap, Dense
from sparsefx.passes.predict import TERMS, Machine, Sample, family, fit, sample_seconds

RESULTS = Path(__file__).parent / "results"
TORCH = "torch fp32"
WANTED = 0.2
"""Median relative error of what was not fitted."""
Row = dict[str, Any]


def sample(row: Row) -> Sample:
    """A row of the CPU benchmark as the cost model takes it."""
    fmt = Format() if row["engine"] == TORCH else Format.parse(row["engine"])
    return Sample(family(fmt), row["m"], row["n"], row["k"], row["weight_bytes"], row["ms"] / 1e3)


def layout(row: Row) -> str:
    """What a dot is coloured by."""
    if row["engine"] == TORCH:
        return TORCH
    kind = Format.parse(row["engine"]).layout
    names = ((Dense, "dense"), (NM, "n:m"), (Bitmap, "bitmap"))
    return next((name for of, name in names if isinstance(kind, of)), "tile")


def used(rows: Iterable[Row]) -> list[Row]:
    """sparsefx's rows and torch's, in an order in which neighbours differ by format."""
    own = [r for r in rows if r["ours"] or r["engine"] == TORCH]
    return sorted(own, key=lambda r: (r["threads"], sample(r).family, r["k"] * r["n"], r["m"],
                                      r["engine"]))  # fmt: skip


def held_out(rows: list[Row]) -> list[Row]:
    """Rows with "predicted" seconds, each by constants fitted to the half it is not in."""
    out: list[Row] = []
    for key in dict.fromkeys((r["threads"], sample(r).family) for r in rows):
        group = [r for r in rows if (r["threads"], sample(r).family) == key]
        if len(group) < 4 * len(TERMS):  # torch's rows, with few threads or formats
            continue
        for half in (0, 1):
            machine = fit([sample(r) for r in group[half::2]])
            out += [predicted(machine, r) for r in group[1 - half :: 2]]
    return out


def predicted(machine: Machine, row: Row) -> Row:
    found = sample(row)
    guess = sample_seconds(machine, found)
    shown = {k: row[k] for k in ("engine", "threads", "k", "n", "m", "ours")}
    return shown | {"layout": layout(row), "family": found.family, "measured": found.seconds,
                    "predicted": guess, "error": abs(guess / found.seconds - 1)}  # fmt: skip


def new_shapes(rows: list[Row]) -> list[Row]:
    """One thread's rows of other shapes than 4096 × 4096, predicted from those of it."""
    one = [r for r in rows if r["threads"] == 1 and r["ours"]]
    machine = fit([sample(r) for r in one if (r["k"], r["n"]) == (4096, 4096)])
    return [predicted(machine, r) for r in one if (r["k"], r["n"]) != (4096, 4096)]


def summary(rows: list[Row]) -> dict[str, float]:
    errors = sorted(r["error"] for r in rows)
    p90 = quantiles(errors, n=10)[-1] if len(errors) > 1 else errors[0]
    return {"rows": len(errors), "median": median(errors), "p90": p90, "worst": errors[-1]}


def evaluate(rows: list[Row]) -> dict[str, Any]:
    """Errors of what was held out, all predictions, and constants fitted to all rows."""
    tested = held_out(rows)
    ours = [r for r in tested if r["ours"]]
    threads = sorted({r["threads"] for r in rows})
    fits = {t: fit([sample(r) for r in rows if r["threads"] == t]) for t in threads}
    errors = {"held out": summary(ours), "new shapes, 1 thread": summary(new_shapes(rows))}
    for t in threads:
        errors[f"held out, {t} thread(s)"] = summary([r for r in ours if r["threads"] == t])
    for name in sorted({r["family"] for r in ours}):
        errors[f"held out, {name}"] = summary([r for r in ours if r["family"] == name])
    return {"wanted": WANTED, "met": errors["held out"]["median"] < WANTED, "errors": errors,
            "terms": TERMS, "constants": {t: asdict(m)["families"] for t, m in fits.items()},
            "rows": tested}  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Predicted over measured milliseconds, one colour per layout, hollow without int8 x."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"dense": "#0b6e99", "tile": "#d98e04", "bitmap": "#2e8b57", "n:m": "#a23b72",
              "torch fp32": "#999999"}  # fmt: skip
    threads = sorted({r["threads"] for r in result["rows"]})
    fig, axes = plt.subplots(1, len(threads), figsize=(6.2 * len(threads), 6), squeeze=False,
                             sharex=True, sharey=True, layout="constrained")  # fmt: skip
    times = [1e3 * r[key] for r in result["rows"] for key in ("measured", "predicted")]
    ends = [0.7 * min(times), 1.4 * max(times)]
    for axis, count in zip(axes[0], threads, strict=True):
        rows = [r for r in result["rows"] if r["threads"] == count]
        axis.plot(ends, ends, color="#333333", lw=1)
        axis.fill_between(ends, [e / 1.2 for e in ends], [e * 1.2 for e in ends], color="#eeeeee")
        for name, color in colors.items():
            for full in (True, False):
                dots = [r for r in rows if r["layout"] == name
                        and full == (r["family"] != "float activations")]  # fmt: skip
                axis.plot(
                    [1e3 * r["measured"] for r in dots], [1e3 * r["predicted"] for r in dots],
                    "o", ms=6, color=color, mfc=color if full else "white", alpha=0.85,
                    label=name if full and count == threads[0] else None,
                )  # fmt: skip
        error = result["errors"][f"held out, {count} thread(s)"]
        axis.set_title(f"{count} thread(s): median error {100 * error['median']:.1f}%, "
                       f"{error['rows']} rows", loc="left", fontsize=11)  # fmt: skip
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal",
                 xlabel="measured ms", ylabel="predicted ms, fitted to the other half")  # fmt: skip
        axis.grid(color="#dddddd", lw=0.6)
    axes[0][0].plot([], [], "o", color="#555555", mfc="white", label="hollow: float activations")
    axes[0][0].legend(frameon=False, fontsize=9, loc="upper left")
    fig.suptitle(f"Cost model on {result['cpu']}: one linear layer, every format, band ±20%",
                 x=0.01, ha="left", fontsize=12)  # fmt: skip
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> None:
    """Fit, print, write."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / f"cpu-{slug()}.json"
    data = json.loads(source.read_text())
    result = {"source": source.name, "cpu": data["machine"]["cpu"], **evaluate(used(data["rows"]))}
    path = RESULTS / f"cost-{source.stem.removeprefix('cpu-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".png"))
    for name, found in result["errors"].items():
        print(f"{name}: median {100 * found['median']:.1f}%, 90% of rows under "
              f"{100 * found['p90']:.0f}%, worst {100 * found['worst']:.0f}% "
              f"({found['rows']:.0f} rows)")  # fmt: skip
    for threads, families in result["constants"].items():
        for name, constants in families.items():
            units = ", ".join(f"{t} {c:.2e}" for t, c in zip(TERMS, constants, strict=True))
            print(f"{threads} thread(s), {name}: {units} s")
    print(f"{'under' if result['met'] else 'NOT under'} {WANTED:.0%}; wrote {path.name} and .png")


if __name__ == "__main__":
    main()
