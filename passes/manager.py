"""Passes and their contracts: requires, run, verify, ensures, after each other.

    SPARSEFX_PRINT=all|changed|<pass>   prints graphs after passes
    SPARSEFX_CHECK=1                    compares the graph's outputs before and after every pass
    SPARSEFX_STOP_AFTER=<pass>          leaves out the passes after it
    SPARSEFX_DUMP=<folder>              writes the graph after every pass as text and SVG

What every pass did, took and saved is kept as PassRecords; `explain(model, passes=True)` shows
them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsefx.ir.errors import PassError, SpecError, nearest
from sparsefx.ir.plugins import Plugged
from sparsefx.ir.sites import Traced
from sparsefx.ir.text import text
from sparsefx.ir.verify import verify

if TYPE_CHECKING:
    from sparsefx.passes.cost import Cost

Check = Callable[[Traced], str | None]
"""None, or why the graph is not acceptable."""
Tool = Callable[[str, bool, Traced], str | None]
"""Called after a pass with its name and whether it changed the graph; gives a note or None."""


@dataclass(frozen=True)
class Pass:
    """A rewrite of a graph in place; `run` says whether it changed anything."""

    run: Callable[[Traced], bool]
    requires: tuple[Check, ...] = ()
    ensures: tuple[Check, ...] = ()
    never_slower: bool = False
    """It claims that no graph gets slower by the cost model; a graph that does is a PassError."""

    @property
    def name(self) -> str:
        return self.run.__name__


@dataclass(frozen=True)
class PassRecord:
    """What one run of a pass did. `seconds` are the pass's own, without checks and tools."""

    name: str
    changed: bool
    seconds: float
    nodes: tuple[int, int]
    """Before and after."""
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()
    """Why it left something as it was, and what tools could not do."""


RECORDS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weight or buffer → PassRecords of the last run over a graph that reads it."""


def graph_pass(
    requires: Sequence[Check] = (), ensures: Sequence[Check] = (), never_slower: bool = False
) -> Callable[[Callable[[Traced], bool]], Pass]:
    """Declare a function as a Pass with its contract."""
    return lambda run: Pass(run, tuple(requires), tuple(ensures), never_slower)


def with_plugins(first: Sequence[Pass], last: Sequence[Pass]) -> Plugged[Pass]:
    """`first`, passes of other packages (entry points `sparsefx.passes`), `last`."""
    ours = {p.name for p in (*first, *last)}

    def check(row: Any) -> str | None:
        if not isinstance(row, Pass):
            return f"{row!r} is no Pass; declare it with @graph_pass"
        return f"there is a pass '{row.name}' already" if row.name in ours else None

    return Plugged("sparsefx.passes", check, first, last)


def legal(traced: Traced) -> str | None:
    """The graph obeys `ir.verify.SPEC`."""
    return verify(traced.graph)


def run_passes(traced: Traced, passes: Iterable[Pass]) -> Traced:
    """Run passes in order. Raises PassError with the pass, the reason and the graph, SpecError for
    an environment variable that says nothing.
    """
    from sparsefx.passes.cost import cost

    chosen, tools = _until(list(passes)), _tools(traced)
    records: list[PassRecord] = []
    now = cost(traced.graph)
    for current in chosen:
        record = _run(current, traced, now)
        now = record.after
        notes = [note for tool in tools if (note := tool(record.name, record.changed, traced))]
        records.append(replace(record, notes=(*record.notes, *notes)))
    for tensor in _tensors(traced):
        RECORDS[tensor] = records
    return traced


def records_of(tensors: Iterable[Tensor]) -> list[list[PassRecord]]:
    """The last run over each graph that read one of `tensors`, in the order of tensors."""
    found = {id(RECORDS[t]): RECORDS[t] for t in tensors if t in RECORDS}
    return list(found.values())


def _run(current: Pass, traced: Traced, before: Cost) -> PassRecord:
    from sparsefx.passes.cost import cost
    from sparsefx.passes.predict import slower

    _demand("before", current, current.requires, traced)
    nodes, known = len(traced.graph.nodes), len(getattr(traced, "notes", ()))
    start = time.perf_counter()
    changed = current.run(traced)
    seconds = time.perf_counter() - start
    _demand("after", current, (legal, *current.ensures), traced)
    after = cost(traced.graph) if changed else before
    if current.never_slower:
        _demand("after", current, (lambda _: slower(before, after),), traced)
    notes = tuple(getattr(traced, "notes", ())[known:])
    sizes = (nodes, len(traced.graph.nodes))
    return PassRecord(current.name, changed, seconds, sizes, before, after, notes)


def _demand(when: str, current: Pass, checks: Sequence[Check], traced: Traced) -> None:
    for check in checks:
        if why := check(traced):
            raise PassError(f"{when} {current.name}: {why}\n{text(traced.graph)}")


def _until(passes: list[Pass]) -> list[Pass]:
    last = os.environ.get("SPARSEFX_STOP_AFTER", "")
    if not last:
        return passes
    names = [p.name for p in passes]
    if last not in names:
        raise SpecError(f"SPARSEFX_STOP_AFTER: no pass '{last}'{nearest(last, names)}")
    return passes[: names.index(last) + 1]


def _tools(traced: Traced) -> list[Tool]:
    """What the environment asks for, begun on the graph as it is before the first pass."""
    out: list[Tool] = []
    if show := os.environ.get("SPARSEFX_PRINT", ""):
        out.append(lambda name, changed, work: _print(show, name, changed, work))
    check = os.environ.get("SPARSEFX_CHECK", "")
    if check not in ("", "0", "1"):
        raise SpecError(f"SPARSEFX_CHECK is '{check}': 0 and 1 are known")
    if check == "1":
        from sparsefx.passes.check import Compared

        out.append(Compared(traced))
    if folder := os.environ.get("SPARSEFX_DUMP", ""):
        from sparsefx.passes.dump import Dumped

        out.append(Dumped(folder, traced))
    return out


def _print(show: str, name: str, changed: bool, traced: Traced) -> None:
    if show in ("all", name) or (show == "changed" and changed):
        print(f"# after {name}, changed={changed}\n{text(traced.graph)}\n", file=sys.stderr)


def _tensors(traced: Traced) -> list[Tensor]:
    """Tensors that lead from a model to this graph: weights, and what dynamo lifted to inputs."""
    lifted = (getattr(n.meta.get("grapharg"), "example", None) for n in traced.graph.nodes)
    return [*traced.weights.values(), *(t for t in lifted if isinstance(t, Tensor))]
