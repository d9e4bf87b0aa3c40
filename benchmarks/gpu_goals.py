"""The numbers to reach on a GPU: one list, each the worst figure among rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_cases import MAIN, ROWS, Row, Shape
from benchmarks.gpu_peers import GEMLITE, REFERENCE

FEW = (1, 4, 16)
INT4, TILE = "int4g128", "tile64x16@50%+int4g128"
Figures = Iterator[tuple[float, str]]
"""A figure and where it was measured."""


class Results:
    """Rows of a run by engine and M at `shape`, and all of them."""

    def __init__(self, rows: Sequence[Row], shape: Shape = MAIN[0]) -> None:
        self.rows = rows
        self._at = {(r["engine"], r["m"]): r for r in rows if (r["k"], r["n"]) == shape}

    def both(self, engine: str, other: str, ms: Iterable[int]) -> Iterator[tuple[int, float]]:
        """M and the time of `other` over that of `engine`, where both were measured."""
        for m in ms:
            if (engine, m) in self._at and (other, m) in self._at:
                yield m, self._at[other, m]["ms"] / self._at[engine, m]["ms"]

    def get(self, engine: str, m: int) -> Row | None:
        return self._at.get((engine, m))


@dataclass(frozen=True)
class Goal:
    """The least of `figures` must be `limit` or more (`at_most`: the largest, or less)."""

    text: str
    figures: Callable[[Results], Figures]
    limit: float
    unit: str = "×"
    at_most: bool = False

    def judge(self, results: Results) -> dict[str, Any]:
        """As data: text, what is wanted, the worst figure and where, whether it is reached.

        `met` is None where nothing was measured.
        """
        found = sorted(self.figures(results), reverse=self.at_most)
        sign = "≤" if self.at_most else "≥"
        goal = {"goal": self.text, "wanted": f"{sign} {self.limit:g} {self.unit}"}
        if not found:
            return goal | {"figure": None, "where": "", "met": None}
        figure, where = found[0]
        met = figure <= self.limit if self.at_most else figure >= self.limit
        return goal | {"figure": figure, "where": where, "met": met}


def near_bandwidth(engine: str, percent: float, m: int = 1) -> Goal:
    """The weight's bytes alone take that share of the measured copy bandwidth."""

    def figures(results: Results) -> Figures:
        row = results.get(engine, m)
        if row is not None:
            yield 100 * row["weights_share"], f"M={m}"

    return Goal(f"{engine}, share of copy bandwidth, M={m}", figures, percent, "%")


def faster(engine: str, times: float, than: str, ms: Sequence[int]) -> Goal:
    """`engine` takes at most 1 / `times` of the time of `than` at every M."""

    def figures(results: Results) -> Figures:
        for m, ratio in results.both(engine, than, ms):
            yield ratio, f"M={m}"

    rows = ", ".join(map(str, ms))
    return Goal(f"{engine} over {than}, M={rows}", figures, times)


def costs(engine: str, percent: float, without: str) -> Goal:
    """`engine` takes at most so much more time than `without`, at every M."""

    def figures(results: Results) -> Figures:
        for m, ratio in results.both(engine, without, sorted(ROWS)):
            yield 100 * (1 / ratio - 1), f"M={m}"

    return Goal(f"{engine}, time added to {without}", figures, percent, "%", at_most=True)


def never_slower(percent: float) -> Goal:
    """No format at any M and shape takes longer than the reference by more than that."""

    def figures(results: Results) -> Figures:
        for row in results.rows:
            if row["ours"] and row["times_reference"] is not None:
                where = f"{row['engine']}, K×N {row['k']}×{row['n']}, M={row['m']}"
                yield 100 * (1 / row["times_reference"] - 1), where

    return Goal(f"any format, time over {REFERENCE}", figures, percent, "%", at_most=True)


GOALS = [
    near_bandwidth(INT4, 70),
    faster(INT4, 1, GEMLITE, (1,)),
    faster(TILE, 1.6, INT4, FEW),
    faster(TILE, 5, REFERENCE, FEW),
    faster("tile1x16@50%+int4g128", 1.3, INT4, FEW),
    faster("2:4+bf16", 1.5, REFERENCE, FEW),
    faster("tile64x16@50%+bf16", 1.4, REFERENCE, (2048,)),
    costs("int4g128+r32", 3, INT4),
    costs("int8+r32+a8", 3, "int8+a8"),
    never_slower(2),
]
