"""Every graph pass over random graphs, in the pipeline's order and in others: nothing changes.

The oracle is the graph as drawn, run eagerly. A failure names a seed: `SPARSEFX_FUZZ_SEED=<seed>`
with `-k replay` runs that graph alone.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import pytest
import torch
from random_graph_steps import draw
from random_graphs import ROWS, Drawn
from torch import Tensor
from torch.fx import Node

from sparsefx.ir.op import LINEAR
from sparsefx.ir.products import op_name
from sparsefx.ir.sites import Traced
from sparsefx.ir.text import text
from sparsefx.passes import branch_match, normalise
from sparsefx.passes.manager import Pass, run_passes
from sparsefx.passes.pipeline import PASSES

branches, dead, epilogues, folding = (
    sys.modules[f"sparsefx.passes.{name}"]
    for name in ("fuse_branches", "dead_ranks", "fuse_epilogues", "fold")
)
"""Modules; each is named like the pass in it."""
Plant: TypeAlias = Callable[[pytest.MonkeyPatch], None]
DEFAULT, MANY, PART = 150, 2000, 25
AMPLIFIED = 2.0**12
"""Sums of at most 32 terms, some ten deep, and what layers magnify of their rounding."""


def shuffled(traced: Traced, seed: int) -> Iterator[Pass]:
    """Passes in a random order, each when what it requires holds, some twice."""
    rng = random.Random(seed)
    again = [p for p in PASSES if p.name != "pack"]  # packs what `chosen` says, once
    left = [*PASSES, *rng.sample(again, 2)]
    while left:
        ready = [p for p in left if all(check(traced) is None for check in p.requires)]
        if not ready:
            return
        chosen = rng.choice(ready)
        left.remove(chosen)
        yield chosen


def run(drawn: Drawn, rows: int) -> list[Tensor]:
    """Outputs and inputs afterwards: passes may not lose a write to an input either."""
    inputs = [x.clone() for x in drawn.inputs(rows)]
    with torch.no_grad():
        outputs = drawn.gm(*[t.clone() for t in drawn.tensors], *inputs)
    return [*outputs, *inputs]


def check(seed: int) -> Counter[str]:
    """Both orders on the graph of a seed. Raises AssertionError naming what differs."""
    changed: Counter[str] = Counter()
    for order in ("pipeline", "random"):
        drawn = draw(seed)
        sizes = (ROWS, 1, 3) if drawn.dynamic else (ROWS,)
        want = [run(drawn, rows) for rows in sizes]
        traced, before = drawn.traced(), text(drawn.gm.graph)
        done: list[str] = []
        try:
            plan = PASSES if order == "pipeline" else shuffled(traced, seed)
            for current in plan:
                done.append(current.name)
                seen = text(traced.graph)
                run_passes(traced, [current])
                changed[current.name] += text(traced.graph) != seen
            drawn.gm.recompile()
            got = [run(drawn, rows) for rows in sizes]
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"{_where(seed, done)}: {kind}: {error}\n{before}") from error
        if why := _differs(want, got, drawn.casts):
            after = text(traced.graph)
            raise AssertionError(f"{_where(seed, done)}: {why}\n{before}\n--- after\n{after}")
    return changed


def _where(seed: int, done: Sequence[str]) -> str:
    return f"SPARSEFX_FUZZ_SEED={seed}, passes {', '.join(done)}"


def _differs(want: list[list[Tensor]], got: list[list[Tensor]], casts: bool) -> str:
    unit = torch.finfo(torch.float32 if casts else torch.float64).eps
    for old, new in zip(want, got, strict=True):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"output {i} was {a.shape} {a.dtype}, is {b.shape} {b.dtype}"
            bound = AMPLIFIED * unit * max(1.0, float(a.abs().max()))
            if (worst := float((a - b).abs().max())) > bound:
                return f"output {i} differs by {worst:.3g}, more than {bound:.3g}"
    return ""


def search(seeds: Sequence[int]) -> Counter[str]:
    """`check` of every seed: how often each pass changed a graph."""
    total: Counter[str] = Counter()
    for seed in seeds:
        total += check(seed)
    return total


@pytest.mark.parametrize("part", range(DEFAULT // PART))
def test_passes_change_nothing(part: int) -> None:
    search(range(part * PART, (part + 1) * PART))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(MANY // 100))
def test_passes_change_nothing_in_many_graphs(part: int) -> None:
    search(range(part * 100, (part + 1) * 100))


def test_replay() -> None:
    if seed := os.environ.get("SPARSEFX_FUZZ_SEED"):
        check(int(seed))


# --- planted bugs: each must be found -------------------------------------------------------------


def _wrong_order(patch: pytest.MonkeyPatch) -> None:
    """t - W x is taken for W x - t."""
    right = branch_match._addends

    def wrong(total: Node) -> Iterator[tuple[Node, Node, float]]:
        yield from right(total)
        if op_name(total) == "sub" and isinstance(total.args[0], Node):
            yield from ((b, a, s) for a, b, s in right(total))

    patch.setattr(branch_match, "_addends", wrong)


def _second_reader(patch: pytest.MonkeyPatch) -> None:
    """Whoever reads the product alone is given the sum."""
    fuse = branches._fuse

    def wrong(traced: Traced, found: branch_match.Branch) -> None:
        others = [user for user in found.base.users if user is not found.total]
        fuse(traced, found)
        new = next(n for n in reversed(traced.graph.nodes) if n.target is LINEAR and n.args[3])
        for user in others:
            if new < user:
                user.replace_input_with(found.base, new)

    patch.setattr(branches, "_fuse", wrong)
    patch.setattr(branch_match, "_check_readers", lambda *args: None)


def _no_mutation_check(module: str) -> Plant:
    """What is written between two readers is not looked at."""
    return lambda patch: patch.setattr(
        f"sparsefx.passes.{module}.changed_between", lambda *args: None
    )


def _wrong_scale(patch: pytest.MonkeyPatch) -> None:
    """Division by a number is taken for multiplication."""
    right = branch_match._multiple

    def wrong(node: Node, name: str, depth: int) -> branch_match.Chain | None:
        return right(node, "mul", depth)

    patch.setattr(branch_match, "_multiple", wrong)


def _no_bias(patch: pytest.MonkeyPatch) -> None:
    right = normalise.operands
    patch.setattr(normalise, "operands", lambda use: (right(use)[0], None))


def _live_rank(patch: pytest.MonkeyPatch) -> None:
    """The last rank is taken for dead wherever another is."""
    right = dead._dead

    def wrong(traced: Traced, node: Node) -> tuple[Tensor, set[Node]] | None:
        found: tuple[Tensor, set[Node]] | None = right(traced, node)
        if found is not None:
            found[0][-1] = True
        return found

    patch.setattr(dead, "_dead", wrong)


def _no_shift(patch: pytest.MonkeyPatch) -> None:
    """What is added before or after a product is lost when it is folded."""
    right = folding._affine

    def wrong(*args: Any) -> Any:
        found = right(*args)
        return None if found is None else (found[0], torch.zeros_like(found[1]))

    patch.setattr(folding, "_affine", wrong)


def _wrong_activation(patch: pytest.MonkeyPatch) -> None:
    """SiLU is taken for ReLU."""
    right = epilogues._activation

    def wrong(node: Node, name: str) -> str | None:
        found = right(node, name)
        return "relu" if found == "silu" else found

    patch.setattr(epilogues, "_activation", wrong)


PLANTS: dict[str, tuple[Plant, int]] = {
    "wrong order": (_wrong_order, 11),
    "second reader": (_second_reader, 16),
    "wrong scale": (_wrong_scale, 16),
    "no bias": (_no_bias, 4),
    "live rank": (_live_rank, 6),
    "no shift": (_no_shift, 29),
    "wrong activation": (_wrong_activation, 2),
    "mutation, branches": (_no_mutation_check("branch_match"), 21),
    "mutation, folds": (_no_mutation_check("fold"), 56),
    "mutation, siblings": (_no_mutation_check("merge_siblings"), 20),
    "mutation, epilogues": (_no_mutation_check("fuse_epilogues"), 47),
    "mutation, equal expressions": (_no_mutation_check("clean_up"), 38),
}
"""Each with the first seed that shows it: what is drawn by default is enough to find them all."""


@pytest.mark.parametrize(("plant", "seed"), PLANTS.values(), ids=PLANTS)
def test_a_planted_bug_is_found(plant: Plant, seed: int) -> None:
    """A graph differs with the bug, and the same graph does not without it."""
    assert seed < DEFAULT
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError, match=rf"SPARSEFX_FUZZ_SEED={seed},.* differs by"):
            check(seed)
    check(seed)
