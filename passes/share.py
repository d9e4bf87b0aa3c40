"""Layer-wise ratios: the share that a format removes, spread over the Sites that have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sparsefx.ir.format import Format
from sparsefx.ir.layouts import Dense
from sparsefx.ir.sites import Site
from sparsefx.passes.calibration import Part, stream
from sparsefx.passes.collector import collect
from sparsefx.passes.criteria import CRITERIA
from sparsefx.passes.criteria.random import site_seed
from sparsefx.passes.ratios import RATIOS, Need, Ratio, with_share
from sparsefx.passes.recipe import Recipe
from sparsefx.passes.statistics import Statistics


def share_out(
    model: nn.Module,
    sites: Sequence[Site],
    formats: Mapping[str, Format],
    ratios: str,
    recipe: Recipe,
    batches: Sequence[Any] | None,
) -> dict[str, Format]:
    """The Format of every Site once each group of one sparse format has shares of its own.

    Raises SpecError for a layout without a share, WeightError where calibration is needed.
    """
    out = dict(formats)
    sparse = [s for s in sites if not isinstance(formats[s.name].layout, Dense)]
    if ratios == "uniform" or not sparse:
        return out
    ratio = RATIOS[ratios]
    measured = _Measure(model, formats, ratio, recipe)
    if ratio.needs and batches is not None:
        stream(model, sparse, batches, measured)
    for fmt in dict.fromkeys(formats[site.name] for site in sparse):
        group = [site for site in sparse if formats[site.name] == fmt]
        share = getattr(fmt.layout, "share", 0.0)
        with_share(fmt.layout, share)
        needs = [Need(s.name, s.n, s.k, measured.numbers.get(s.name, ())) for s in group]
        for site, own in zip(group, ratio.shares(needs, share), strict=True):
            out[site.name] = replace(fmt, layout=with_share(fmt.layout, own))
    return out


class _Measure:
    """The Visitor that takes a ratio's numbers of every Site and changes nothing."""

    targets = False

    def __init__(
        self, model: nn.Module, formats: Mapping[str, Format], ratio: Ratio, recipe: Recipe
    ) -> None:
        self.model, self.formats, self.ratio, self.recipe = model, formats, ratio, recipe
        self.numbers: dict[str, tuple[float, ...]] = {}

    def part(self, part: Part) -> None:
        weights = {s.name: (s, self.model.get_parameter(s.name)) for s in part.sites}
        found = collect(weights, part.run, kept=part.kept)
        for site in part.sites:
            if site.name in found:
                self.numbers[site.name] = self._of(site, found[site.name])

    def finish(self, part: Part) -> None:
        """Nothing was changed, nothing is to be put in place."""

    def _of(self, site: Site, statistics: Statistics) -> tuple[float, ...]:
        weight = site.matrix(self.model.get_parameter(site.name)).float()
        criterion = CRITERIA[self.recipe.criterion]
        if criterion.needs == "gradients":
            criterion = CRITERIA["obs"]
        seed = site_seed(self.recipe.seed, site.name)
        scores = criterion.score(weight, statistics, None, seed)
        layout = self.formats[site.name].layout
        return self.ratio.measure(weight, statistics, layout, scores)
