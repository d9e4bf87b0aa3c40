"""What a criterion is, and what it says when its data is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparsefx.ir.errors import WeightError
from sparsefx.ir.sites import Site
from sparsefx.passes.gradients import Gradients, collect
from sparsefx.passes.statistics import Statistics

DAMPING = 0.01
"""Added to the diagonal of matrices that are inverted, as a share of its mean."""

Score = Callable[[Tensor, Statistics | None, Gradients | None, int], Tensor]
Collect = Callable[..., Iterator[tuple[Site, Gradients]]]


@dataclass(frozen=True)
class Criterion:
    """`score(weight, statistics, gradients, seed)`: float32 (N, K), larger is more worth keeping.

    `weight` is (N, K) float32. Scores of one Site are compared with each other only, by
    `Layout.select`, which takes the mean over a tile. Raises WeightError when what it `needs` is
    not given.
    """

    name: str
    score: Score
    needs: Literal["", "inputs", "gradients"] = ""
    collect: Collect = collect
    """(model, sites, batches, loss) → the Gradients it reads, when it needs gradients."""


def given_inputs(statistics: Statistics | None, name: str) -> Statistics:
    if statistics is None or statistics.rows == 0:
        raise WeightError(
            f"criterion '{name}' needs calibration inputs that reach this weight; pass "
            "calibration=… or use 'magnitude'"
        )
    return statistics


def given_gradients(gradients: Gradients | None, name: str) -> Gradients:
    if gradients is None or gradients.count == 0:
        raise WeightError(
            f"criterion '{name}' needs gradients; pass calibration=… with labels or a loss, or use "
            "'wanda'"
        )
    return gradients
