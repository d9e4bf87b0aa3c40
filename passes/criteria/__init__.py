"""Criteria: how much every weight is worth. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from sparsefx.passes.criteria import (
    gradient,
    lora_guided,
    magnitude,
    mfac,
    obs,
    random,
    wanda,
)
from sparsefx.passes.criteria.base import Criterion
from sparsefx.passes.gradients import collect

CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("magnitude", magnitude.magnitude),
        Criterion("random", random.random),
        Criterion("wanda", wanda.wanda, "inputs"),
        Criterion("wanda_layer", wanda.wanda_layer, "inputs"),
        Criterion("obs", obs.obs, "inputs"),
        Criterion("taylor", gradient.taylor, "gradients"),
        Criterion("fisher", gradient.fisher, "gradients"),
        Criterion("mfac", mfac.mfac, "gradients", partial(collect, samples=mfac.SAMPLES)),
        Criterion("lora_guided", lora_guided.lora_guided, "gradients", lora_guided.collect_lora),
    )
}

__all__ = ["CRITERIA", "Criterion"]
