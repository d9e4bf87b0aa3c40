"""Solve: one candidate per Site, least value under a budget, by a mixed-integer solver.

The multiple-choice knapsack problem, handed to HiGHS (`scipy.optimize.milp`) after candidates
were dropped that cost more and are worth less than another of their Site.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sparsefx.ir.errors import MissingPackageError, SparsefxError

GAP = 1e-4
"""Where the search stops: far below what predicted losses are off by, and proving the last of it
can take a hundred thousand nodes where many Sites are alike."""
NODES = 20_000
"""Branch-and-bound nodes at most: a count, as a time limit would make plans differ."""


class Infeasible(SparsefxError, ValueError):
    """No choice keeps the budget; `least` is the smallest reachable one."""

    def __init__(self, least: float) -> None:
        super().__init__(f"the budget cannot be kept: at least {least:.6g} is needed")
        self.least = least


@dataclass(frozen=True)
class Item:
    """One candidate of a group. `value` is minimised, `cost` counts against the budget."""

    name: str
    value: float
    cost: float


@dataclass(frozen=True)
class Solution:
    """Index chosen in every group, their sums, and how far from the best they may be."""

    chosen: tuple[int, ...]
    value: float
    cost: float
    gap: float
    """(value − proven lower bound) / value; 0 is optimal."""


def solve(groups: Sequence[Sequence[Item]], budget: float) -> Solution:
    """The choice of least total value whose total cost is at most `budget`.

    Ties go to the lower cost, then to the name. Raises Infeasible, and MissingPackageError
    without SciPy.
    """
    kept = [undominated(items) for items in groups]
    costs = [[groups[g][i].cost for i in members] for g, members in enumerate(kept)]
    least = sum(map(min, costs))
    if least > budget:
        raise Infeasible(least)
    best = [members[0] for members in kept]
    if sum(groups[g][i].cost for g, i in enumerate(best)) <= budget:
        return _solution(groups, best, 0.0)
    limit = budget
    while True:
        chosen, gap = _milp(groups, kept, limit)
        over = sum(groups[g][i].cost for g, i in enumerate(chosen)) - budget
        if over <= 0:
            return _solution(groups, chosen, gap)
        if limit <= least:
            return _solution(groups, [members[-1] for members in kept], 0.0)
        # The solver keeps constraints to 1e-6 of their size; the budget is kept exactly.
        limit = max(least, limit - 2 * over)


def undominated(items: Sequence[Item]) -> list[int]:
    """Indices that no other item beats in both value and cost; values rise, costs fall."""
    order = sorted(range(len(items)), key=lambda i: (items[i].value, items[i].cost, items[i].name))
    out: list[int] = []
    for i in order:
        if not out or items[i].cost < items[out[-1]].cost:
            out.append(i)
    return out


def _milp(
    groups: Sequence[Sequence[Item]], kept: Sequence[Sequence[int]], budget: float
) -> tuple[list[int], float]:
    """Chosen indices and the relative gap; values and costs are scaled to about 1."""
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise MissingPackageError("'auto' solves with SciPy: pip install scipy") from error
    pairs = [(g, i) for g, members in enumerate(kept) for i in members]
    floor = [groups[g][members[-1]].cost for g, members in enumerate(kept)]
    values: Any = np.array([groups[g][i].value for g, i in pairs])
    extra: Any = np.array([groups[g][i].cost - floor[g] for g, i in pairs])
    room = budget - sum(floor)
    unit = max(room, float(extra.max()) * 1e-12) or 1.0
    one = csr_array(
        (np.ones(len(pairs)), ([g for g, _ in pairs], np.arange(len(pairs)))),
        shape=(len(groups), len(pairs)),
    )
    scale = float(np.abs(values).sum()) or 1.0
    with _no_debug_output():
        result: Any = milp(
            values * (len(groups) / scale),
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint((extra / unit)[None], -np.inf, room / unit),
            ],
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
    if result.x is None:  # the cheapest choice keeps the budget, so there is always an answer
        return [m[-1] for m in kept], 1.0
    chosen: dict[int, tuple[float, int]] = {}
    for (g, i), share in zip(pairs, result.x, strict=True):
        chosen[g] = max(chosen.get(g, (-1.0, -1)), (float(share), i), key=lambda c: c[0])
    return [chosen[g][1] for g in range(len(groups))], float(result.mip_gap or 0.0)


@contextmanager
def _no_debug_output() -> Iterator[None]:
    """HiGHS (in SciPy 1.17) writes a line to the process's own standard output per solution that it
    polishes, thousands at times; no option turns it off."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C's own buffer holds goes nowhere too
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _solution(groups: Sequence[Sequence[Item]], chosen: Sequence[int], gap: float) -> Solution:
    items = [groups[g][i] for g, i in enumerate(chosen)]
    return Solution(
        tuple(chosen), sum(item.value for item in items), sum(item.cost for item in items), gap
    )
