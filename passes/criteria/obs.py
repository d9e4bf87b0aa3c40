"""Optimal Brain Surgeon: the output error of removing one weight and refitting its row.

Source: Hassibi & Stork 1993; Frantar & Alistarh, arXiv 2301.00774 (whose sweep uses the inverse of
what is left of the row instead).
"""

from __future__ import annotations

from torch import Tensor

from sparsefx.ir.errors import WeightError
from sparsefx.passes.criteria.base import DAMPING, given_inputs
from sparsefx.passes.gradients import Gradients
from sparsefx.passes.sparsegpt import inverse_factor
from sparsefx.passes.statistics import Statistics


def obs(
    weight: Tensor, statistics: Statistics | None, gradients: Gradients | None, seed: int
) -> Tensor:
    """w² / [H⁻¹]ⱼⱼ (N, K) with H the damped sum of xᵀx; 0 where an input is always 0."""
    hessian = given_inputs(statistics, "obs").second
    if hessian is None:
        raise WeightError("criterion 'obs' needs second moments; use 'wanda' without them")
    dead = hessian.diagonal() == 0
    factor = inverse_factor(hessian, dead, DAMPING)
    return (weight.float().square() / factor.square().sum(0)).masked_fill(dead, 0)
