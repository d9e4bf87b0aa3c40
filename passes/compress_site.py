"""One weight: choose the pattern, round, try to do better, add the branch; every step measured."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

from torch import Tensor

from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import Dense
from sparsefx.ir.sites import Site
from sparsefx.passes.criteria import CRITERIA
from sparsefx.passes.criteria.random import site_seed
from sparsefx.passes.gradients import Gradients
from sparsefx.passes.lowrank import Branch, lowrank, product
from sparsefx.passes.recipe import Recipe
from sparsefx.passes.solvers import AFTER, SOLVERS
from sparsefx.passes.statistics import Statistics, energy, output_error
from sparsefx.passes.svdquant import turns

TURNS = 2
"""How often branch and rounding take turns from each start."""
STARTS = (("of the error", True), ("of the weight (SVDQuant)", False))
"""What the branch holds at first, and whether that is the error of storing the whole weight."""


@dataclass(frozen=True)
class Step:
    """One step of a weight's compression and what it left of the outputs."""

    name: str
    error: float
    """Relative output error on calibration inputs after the step (of the weight without them)."""
    kept: bool = True
    """False for a step that was undone, because it made the error greater."""


@dataclass(frozen=True)
class Result:
    """One compressed Site: what is stored, how well it stands for the weight, how it was found."""

    site: Site
    packed: Packed
    branch: Branch
    sqnr_db: float
    """10·log10(‖W‖² / ‖W − stored‖²), branch included; infinite when nothing was lost."""
    algorithm: str
    note: str
    """Why another algorithm or Format than was asked for was used, "" when none was."""
    seconds: float
    steps: tuple[Step, ...] = ()

    def after(self, *steps: Step) -> Result:
        """This Result with more steps in its history."""
        return replace(self, steps=(*self.steps, *steps))

    def dense(self) -> Tensor:
        """The float32 weight (N, K) that is multiplied by, branch included."""
        return effective(self.packed, self.branch)


@dataclass
class Bench:
    """What one weight is compressed with, and the steps taken so far."""

    site: Site
    format: Format
    recipe: Recipe
    statistics: Statistics | None = None
    gradients: Gradients | None = None
    mask: Tensor | None = None
    """A pattern chosen before, (N, K)."""
    steps: list[Step] = field(default_factory=list)

    def store(self, weight: Tensor, target: Tensor) -> Packed:
        """`weight` (N, K) by the solver; errors of steps are relative to `target`'s outputs."""
        mask = self.mask if self.mask is not None else self._mask(weight)
        solve = SOLVERS[self.recipe.solver]
        packed = solve(weight, self.format, mask, self.statistics, self.recipe.damping)
        error = _ratio(weight, target, self.statistics) * self.error(weight, packed)
        self.steps.append(Step(self.recipe.name(self.format), error))
        return packed

    def error(self, weight: Tensor, packed: Packed) -> float:
        """What storing `weight` lost, relative to its own outputs."""
        return output_error(weight, packed.unpack(), self.statistics)

    def improve(self, weight: Tensor, packed: Packed, target: Tensor) -> Packed:
        """The after-treatments, each where it helps, of what is stored for `weight` (N, K)."""
        statistics = self.statistics
        scale = _ratio(weight, target, statistics)
        error = scale * self.error(weight, packed)
        for name in self.recipe.after if statistics is not None else ():
            assert statistics is not None
            found = AFTER[name](weight, packed, statistics)
            now = scale * self.error(weight, found)
            self.steps.append(Step(name, now, kept=now < error))
            if now < error:
                packed, error = found, now
        return packed

    def _mask(self, weight: Tensor) -> Tensor | None:
        """The pattern by the recipe's criterion; None where there is none or the sweep chooses."""
        recipe = self.recipe
        if isinstance(self.format.layout, Dense) or recipe.joint:
            return None
        score = CRITERIA[recipe.criterion].score
        seed = site_seed(recipe.seed, self.site.name)
        return self.format.layout.select(score(weight, self.statistics, self.gradients, seed))


def _ratio(weight: Tensor, target: Tensor, statistics: Statistics | None) -> float:
    """Output of `weight` over that of `target`: what makes errors of one relative to the other."""
    if weight is target:
        return 1.0
    moments = None if statistics is None else statistics.second
    had = energy(target, moments)
    return math.sqrt(max(energy(weight, moments), 0.0) / had) if had > 0 else 1.0


def compress_site(
    site: Site,
    weight: Tensor,
    fmt: Format,
    recipe: Recipe,
    statistics: Statistics | None = None,
    gradients: Gradients | None = None,
    mask: Tensor | None = None,
    note: str = "",
) -> Result:
    """Pack one (N, K) weight. Raises WeightError naming the Site."""
    start = time.perf_counter()
    target = weight.detach().float()
    bench = Bench(site, fmt, recipe, statistics, gradients, mask)
    try:
        packed, branch = _with_branch(bench, target, weight)
    except WeightError as error:
        raise WeightError(f"{site.name}: {error}") from None
    lost = float((target - effective(packed, branch)).square().sum())
    power = float(target.square().sum())
    sqnr = 10 * math.log10(power / lost) if lost and power else math.inf
    seconds = time.perf_counter() - start
    return Result(
        site, packed, branch, sqnr, recipe.name(fmt), note, seconds, tuple(bench.steps)
    )  # fmt: skip


def _with_branch(bench: Bench, target: Tensor, weight: Tensor) -> tuple[Packed, Branch]:
    """What is stored and the branch: of all turns from both starts, the pair with the least error,
    its stored part improved and the branch fitted to that once more.

    Without calibration one turn: what rounding lost.
    """
    statistics, rank = bench.statistics, bench.format.rank
    if not rank:
        packed = bench.store(weight if statistics is None else target, target)
        return bench.improve(target, packed, target), ()
    best: tuple[float, Packed, Branch] | None = None
    for name, from_error in STARTS if statistics is not None else STARTS[:1]:
        found = turns(
            weight, statistics, bench.format, lambda rest: bench.store(rest, target), from_error
        )
        for _ in range(TURNS if statistics is not None else 1):
            pair = next(found)
            better = best is None or pair[0] < best[0]
            bench.steps.append(Step(f"r{rank} {name}", pair[0], kept=better))
            best = pair if better else best
    assert best is not None
    error, packed, branch = best
    if statistics is None or not bench.recipe.after:
        return packed, branch
    improved = bench.improve(target - product(branch), packed, target)
    fitted = lowrank(weight, improved, statistics.second)
    now = output_error(target, effective(improved, fitted), statistics)
    bench.steps.append(Step(f"r{rank} of what is left", now, kept=now < error))
    return (improved, fitted) if now < error else (packed, branch)


def effective(packed: Packed, branch: Branch) -> Tensor:
    """The float32 weight (N, K) that packed buffers and branch stand for together."""
    dense = packed.unpack()
    return dense + product(branch) if branch else dense
