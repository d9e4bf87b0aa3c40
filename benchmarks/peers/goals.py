"""The numbers to reach: one list, each a figure computed from the rows of one run and its limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import REFERENCE
from benchmarks.peers.ours import CODES

Row = dict[str, Any]
SHAPE = (4096, 4096)


class Results:
    """Rows of a run, found by engine, M and threads at `SHAPE`."""

    def __init__(self, rows: list[Row], overhead_us: float | None) -> None:
        self.overhead_us = overhead_us
        self._rows = {
            (r["engine"], r["m"], r["threads"]): r for r in rows if (r["k"], r["n"]) == SHAPE
        }

    def get(self, field: str, engine: str, m: int, threads: int = 1) -> float:
        """Raises KeyError when that row was not measured."""
        return float(self._rows[engine, m, threads][field])

    def overhead(self) -> float:
        """Microseconds of an op call. Raises KeyError when not measured."""
        if self.overhead_us is None:
            raise KeyError("overhead_us")
        return self.overhead_us


@dataclass(frozen=True)
class Goal:
    """`figure` must be `limit` or more (`at_most`: or less); a missing row makes it unknown."""

    text: str
    figure: Callable[[Results], float]
    limit: float
    unit: str = "×"
    at_most: bool = False

    def judge(self, results: Results) -> dict[str, Any]:
        """The goal as data: text, limit, figure and whether it is met (None: not measured)."""
        try:
            figure: float | None = self.figure(results)
        except KeyError:
            figure = None
        met = None
        if figure is not None:
            met = figure <= self.limit if self.at_most else figure >= self.limit
        sign = "≤" if self.at_most else "≥"
        wanted = f"{sign} {self.limit:g} {self.unit}"
        return {"goal": self.text, "wanted": wanted, "figure": figure, "met": met}


def faster(engine: str, times: float, m: int = 1, than: str = REFERENCE) -> Goal:
    """`engine` takes at most 1 / `times` of the time of `than`."""
    return Goal(
        f"{engine} over {than}, M={m}",
        lambda r: r.get("ms", than, m) / r.get("ms", engine, m),
        times,
    )


def near_limit(engine: str, percent: float, m: int = 1) -> Goal:
    """`engine` reaches that share of the read bandwidth."""
    return Goal(
        f"{engine}, share of the memory limit, M={m}",
        lambda r: 100 * r.get("memory_ms", engine, m) / r.get("ms", engine, m),
        percent,
        "%",
    )


def costs(engine: str, percent: float, m: int, without: str) -> Goal:
    """`engine` takes at most so much more time than `without`."""
    return Goal(
        f"{engine}, time added to {without}, M={m}",
        lambda r: 100 * (r.get("ms", engine, m) / r.get("ms", without, m) - 1),
        percent,
        "%",
        at_most=True,
    )


def scales(engine: str, times: float, m: int = 128) -> Goal:
    """Two threads are so many times as fast as one."""
    return Goal(
        f"{engine}, 2 threads over 1, M={m}",
        lambda r: r.get("ms", engine, m, 1) / r.get("ms", engine, m, 2),
        times,
    )


DYNAMIC, LEVEL_1 = "ORT DynamicQuantizeMatMul", "ORT 4 bit block 128 level 1"
TILE = "tile16x1@50%+int4g128+a8"
GOALS = [
    faster("int4g128+a8", 1.1),
    near_limit("int4g128+a8", 85),
    faster("bitmap@50%+int4g128+a8", 1.4),
    faster("2:4+int4g128+a8", 1.3),
    faster("tile1x16@50%+int4g128+a8", 1.6),
    faster(TILE, 2.2),
    faster(TILE, 1.3, than="ORT 2 bit block 128"),
    faster("tile16x1@75%+int4g128+a8", 4.5),
    faster("int3g128+a8", 1.2),
    faster(TILE, 1.6, m=128, than=DYNAMIC),
    faster(TILE, 3, m=128),
    faster("int8+a8", 1, m=128, than=DYNAMIC),
    *(faster(spec, 2, than=LEVEL_1) for spec in CODES),
    costs("int4g128+r32+a8", 5, 1, "int4g128+a8"),
    costs("int4g128+r32+a8", 8, 128, "int4g128+a8"),
    *(scales(spec, 1.7) for spec in ("int4g128+a8", TILE, "int8+a8")),
    Goal("one op call on a 16×16 weight", lambda r: r.overhead(), 8, "µs", True),
]
