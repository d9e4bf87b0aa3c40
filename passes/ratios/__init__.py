"""Layer-wise ratios: how much each Site loses of a share for all. One file and one line each."""

from __future__ import annotations

from collections.abc import Mapping

from sparsefx.passes.ratios import erk, outlier, sensitivity, uniform
from sparsefx.passes.ratios.base import MOST, Need, Ratio, with_share

RATIOS: Mapping[str, Ratio] = {
    ratio.name: ratio
    for ratio in (
        Ratio("uniform", uniform.uniform),
        Ratio("erk", erk.erk),
        Ratio("outlier", outlier.outlier, outlier.outlier_share, "inputs"),
        Ratio("sensitivity", sensitivity.sensitivity, sensitivity.probe_errors, "inputs"),
    )
}

__all__ = ["MOST", "RATIOS", "Need", "Ratio", "with_share"]
