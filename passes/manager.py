"""Passes and their contracts: requires, run, verify, ensures, after each other.

`SPARSEFX_PRINT=all|changed|<pass>` prints graphs after passes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsefx.ir.errors import PassError
from sparsefx.ir.sites import Traced
from sparsefx.ir.text import text
from sparsefx.ir.verify import verify

Check = Callable[[Traced], str | None]
"""None, or why the graph is not acceptable."""


@dataclass(frozen=True)
class Pass:
    """A rewrite of a graph in place; `run` says whether it changed anything."""

    run: Callable[[Traced], bool]
    requires: tuple[Check, ...] = ()
    ensures: tuple[Check, ...] = ()

    @property
    def name(self) -> str:
        return self.run.__name__


def graph_pass(
    requires: Sequence[Check] = (), ensures: Sequence[Check] = ()
) -> Callable[[Callable[[Traced], bool]], Pass]:
    """Declare a function as a Pass with its contract."""
    return lambda run: Pass(run, tuple(requires), tuple(ensures))


def legal(traced: Traced) -> str | None:
    """The graph obeys `ir.verify.SPEC`."""
    return verify(traced.graph)


def run_passes(traced: Traced, passes: Sequence[Pass]) -> Traced:
    """Run passes in order. Raises PassError with the pass, the reason and the graph."""
    show = os.environ.get("SPARSEFX_PRINT", "")
    for current in passes:
        _demand("before", current, current.requires, traced)
        changed = current.run(traced)
        _demand("after", current, (legal, *current.ensures), traced)
        if show in ("all", current.name) or (show == "changed" and changed):
            print(
                f"# after {current.name}, changed={changed}\n{text(traced.graph)}\n",
                file=sys.stderr,
            )
    return traced


def _demand(when: str, current: Pass, checks: Sequence[Check], traced: Traced) -> None:
    for check in checks:
        if why := check(traced):
            raise PassError(f"{when} {current.name}: {why}\n{text(traced.graph)}")
