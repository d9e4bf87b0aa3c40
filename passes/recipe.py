"""A Recipe: which criterion, solver and after-treatments a weight goes through, from the Spec."""

from __future__ import annotations

from dataclasses import dataclass

from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import Dense
from sparsefx.passes.criteria import CRITERIA
from sparsefx.passes.spec import Spec
from sparsefx.passes.statistics import Statistics

FEW = 32
"""Fewer rows than a FEW-th of K are said in a note: an expert that few tokens were sent to."""

FOLLOWED = 0.5
"""Of what earlier layers lost, the share that a layer makes up for; see `passes.follow`."""


@dataclass(frozen=True)
class Recipe:
    """How one weight is pruned and rounded; every name is a key of its table."""

    criterion: str = "magnitude"
    solver: str = "nearest"
    after: tuple[str, ...] = ()
    damping: float = 0.01
    seed: int = 0
    follow: float = 0.0

    @classmethod
    def of(cls, spec: Spec, calibrated: bool) -> Recipe:
        """The spec's recipe, "auto" filled in. Raises WeightError when it needs calibration."""
        best = cls("obs", "sweep", ("descend",)) if calibrated else cls()
        criterion = best.criterion if spec.criterion == "auto" else spec.criterion
        solver = best.solver if spec.solver == "auto" else spec.solver
        after = best.after if spec.after == ("auto",) else spec.after
        share = FOLLOWED * (solver == "sweep") if spec.follow is None else spec.follow
        recipe = cls(criterion, solver, after, spec.damping, spec.seed, share)
        training = "recovery" * (spec.recovery is not None) or "smooth" * spec.smooth
        why = recipe.needs_inputs or training
        if not calibrated and why:
            raise WeightError(f"{why} needs calibration=…; 'magnitude' with 'nearest' does not")
        return recipe

    @property
    def needs_inputs(self) -> str:
        """What in the recipe reads calibration inputs, "" when nothing does."""
        if CRITERIA[self.criterion].needs:
            return f"criterion '{self.criterion}'"
        if self.solver == "sweep":
            return "solver 'sweep'"
        if self.after:
            return f"after-treatment '{self.after[0]}'"
        return "following the dense model" * (self.follow > 0)

    def seen(
        self, fmt: Format, statistics: Statistics | None, k: int, unseen: str = ""
    ) -> tuple[Recipe, Statistics | None, str]:
        """What is left of the recipe with the inputs that calibration showed, and a note on it."""
        if not self.needs_inputs:
            return self, statistics, ""
        if statistics is None or not statistics.rows:
            needs = CRITERIA[self.criterion].needs
            criterion = "magnitude" if needs == "inputs" else self.criterion
            note = f"{self.name(fmt)} saw no input rows: {unseen or 'calibration never reached it'}"
            return Recipe(criterion, "nearest", (), self.damping, self.seed), None, note
        few = FEW * statistics.rows < k
        return self, statistics, f"only {statistics.rows} calibration rows for K = {k}" * few

    def refuse_gradients(self, why: str) -> None:
        """Raise WeightError, saying `why`, where the criterion reads gradients."""
        if CRITERIA[self.criterion].needs == "gradients":
            raise WeightError(f"criterion '{self.criterion}': {why}; use 'obs' or 'wanda'")

    @property
    def joint(self) -> bool:
        """Whether the sweep itself chooses the pattern, column block by column block."""
        return self.criterion == "obs" and self.solver == "sweep"

    def name(self, fmt: Format) -> str:
        """In short, for tables: "obs+sweep"; a dense layout has no criterion."""
        names = [self.solver] if isinstance(fmt.layout, Dense) else [self.criterion, self.solver]
        return "+".join(names)
