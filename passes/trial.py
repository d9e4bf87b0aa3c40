"""Trial: run a model as if some Sites were compressed, without changing it or copying it.

Only packed weights are held; a product with a Site's parameter gets the unpacked weight for as long
as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.format import Format
from sparsefx.ir.op import round_activations
from sparsefx.ir.products import PRODUCTS
from sparsefx.ir.sites import Site
from sparsefx.passes.calibration import Part, stream, within_budget
from sparsefx.passes.collector import Watch, collect
from sparsefx.passes.compress_site import Result, compress_site
from sparsefx.passes.distance import Distance
from sparsefx.passes.recipe import Recipe
from sparsefx.passes.statistics import Statistics


class EachSite:
    """A visitor of `calibration.stream` that changes nothing: shows Sites with their Statistics,
    as many at a time as the budget of second moments allows; None where no batch reaches them."""

    targets = False

    def __init__(
        self,
        model: nn.Module,
        see: Callable[[Site, Statistics | None], None],
        watches: Sequence[Watch] = (),
    ) -> None:
        self.model, self.see, self.watches = model, see, watches

    def part(self, part: Part) -> None:
        """Run it once per group of Sites."""

        def watch(site: Site, weight: Tensor, x: Tensor) -> None:
            for see in self.watches:
                see(site, weight, x)

        for group in within_budget(part.sites):
            weights = {s.name: (s, self.model.get_parameter(s.name)) for s in group}
            statistics = collect(weights, part.run, watch, kept=part.kept)
            for site in group:
                self.see(site, statistics.get(site.name))

    def finish(self, part: Part) -> None:
        """Nothing was changed."""


class Trial:
    """Compressed forms of a model's Sites, made from `calibration`, judged on `held_out`."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Sequence[Any],
        held_out: Sequence[Any],
        distance: Distance,
        recipe: Recipe,
    ) -> None:
        self.model, self.calibration, self.held_out = model, calibration, held_out
        self.distance, self.recipe = distance, recipe
        self.stored: dict[str, Result] = {}

    def compress(
        self, chosen: Mapping[str, tuple[Site, str]], progress: Callable[[str], None]
    ) -> None:
        """Hold what `chosen` (name → Site, format) asks for, and nothing else. Statistics are those
        of the dense model's activations."""
        wanted = {n: Format.parse(f) for n, (_, f) in chosen.items()}
        self.stored = {
            name: held for name, held in self.stored.items()
            if wanted.get(name) == held.packed.format
        }  # fmt: skip
        sites = [
            site
            for name, (site, _) in chosen.items()
            if name not in self.stored and not wanted[name].is_dense
        ]

        def see(site: Site, statistics: Statistics | None) -> None:
            progress(site.name)
            assert statistics is not None, "only Sites that calibration reached have candidates"
            weight = site.matrix(self.model.get_parameter(site.name))
            fmt = wanted[site.name]
            self.stored[site.name] = compress_site(site, weight, fmt, self.recipe, statistics)

        if sites:
            stream(self.model, sites, self.calibration, EachSite(self.model, see))

    @torch.no_grad()
    def losses(self, variants: Iterable[frozenset[str]]) -> list[float]:
        """Mean distance on the held-out batches with each set of Sites compressed."""
        modes = [_Substitute(self.model, [self.stored[n] for n in sorted(v)]) for v in variants]
        sums = [(0.0, 0.0)] * len(modes)
        for batch in self.held_out:
            args, kwargs = split_inputs(batch)
            dense = self.model(*args, **kwargs)
            for i, mode in enumerate(modes):
                with mode:
                    outputs = self.model(*args, **kwargs)
                total, weight = self.distance.between(outputs, dense, batch)
                sums[i] = sums[i][0] + total, sums[i][1] + weight
        return [total / weight if weight else 0.0 for total, weight in sums]


class _Substitute(TorchFunctionMode):
    """While active, products with these parameters multiply by what is stored for them."""

    def __init__(self, model: nn.Module, stored: Iterable[Result]) -> None:
        super().__init__()
        self.stored = {id(model.get_parameter(one.site.name)): one for one in stored}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in PRODUCTS:
            given = (*args, *kwargs.values())
            weight = next((a for a in given if id(a) in self.stored), None)
            if weight is not None:
                one, at = self.stored[id(weight)], 1 if name == "addmm" else 0
                args = [_input(one, a) if i == at else a for i, a in enumerate(args)]
                dense = one.site.parameter_shape(one.dense()).to(weight.dtype)
                args = [dense if a is weight else a for a in args]
                kwargs = {key: dense if a is weight else a for key, a in kwargs.items()}
        return func(*args, **kwargs)


def _input(one: Result, x: Any) -> Any:
    fmt = one.packed.format
    if not fmt.a8 or not isinstance(x, Tensor):
        return x
    if one.site.kind == "conv1x1":
        return round_activations(x.movedim(1, -1), fmt.a8_group).movedim(-1, 1)
    return round_activations(x, fmt.a8_group)
