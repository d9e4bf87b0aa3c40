"""Watches a model run and sums what its weights' inputs look like."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparsefx.ir.products import PRODUCTS
from sparsefx.ir.sites import Site
from sparsefx.passes.padding import Kept, without_padding
from sparsefx.passes.statistics import Statistics, shrunk

Watch = Callable[[Site, Tensor, Tensor], None]
"""Sees a product of a Site's parameter with x (…, K); must keep neither."""
Run = Callable[[], Iterable[object]]
"""Runs part of the model on one calibration batch after the other."""


class Collector(TorchFunctionMode):
    """While active, every product with one of `weights` is shown to `watch`, and with `sums` adds
    its input rows to that Site's Statistics.

    Products that read the same tensor (q, k, v) share one Statistics, summed once. Rows of padding
    are neither shown nor summed.
    """

    def __init__(
        self,
        weights: Mapping[str, tuple[Site, Tensor]],
        watch: Watch = lambda site, weight, x: None,
        sums: bool = True,
        moments: bool = True,
    ) -> None:
        super().__init__()
        self.watch, self.sums, self.moments = watch, sums, moments
        self.sites = {id(w): (name, site) for name, (site, w) in weights.items()}
        self.statistics: dict[str, Statistics] = {}
        self.kept: Kept = None
        """Of the batch that is run."""
        self._seen: dict[int, tuple[Tensor, Statistics]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in PRODUCTS:
            given = [*args, *kwargs.values()]
            for arg in given:
                if id(arg) in self.sites:
                    self._add(*self.sites[id(arg)], name, arg, given)
        return func(*args, **kwargs)

    def _add(self, name: str, site: Site, op: str, weight: Tensor, given: Sequence[Any]) -> None:
        x = given[1] if op == "addmm" else given[0]
        if site.kind == "conv1x1":
            x = x.movedim(1, -1)
        if site.kind not in ("linear", "conv1x1") or x.shape[-1] != site.k:
            return
        x = without_padding(x, self.kept)
        self.watch(site, weight, x)
        if not self.sums:
            return
        seen = self._seen.get(id(given[0]))
        if seen is not None and name not in self.statistics:
            self.statistics[name] = seen[1]
        mine = self.statistics.setdefault(name, Statistics(site.k, x.device, self.moments))
        if seen is None or seen[1] is not mine:
            mine.add(x)
        self._seen[id(given[0])] = (given[0], mine)

    def begin(self, kept: Kept) -> None:
        """A new batch: drop the references that tell shared inputs apart."""
        self.kept = kept
        self._seen.clear()


def collect(
    weights: Mapping[str, tuple[Site, Tensor]],
    run: Run,
    watch: Watch = lambda site, weight, x: None,
    sums: bool = True,
    moments: bool = True,
    before: Callable[[], None] = lambda: None,
    kept: Sequence[Kept] = (),
) -> dict[str, Statistics]:
    """Statistics by the Site's name of what `run` shows; none for a Site that is never reached.

    Their second moments are shrunk. `before` is called ahead of every batch, and not watched.
    `kept` tells of every batch which tokens count; all do without it.
    """
    collector, batches = Collector(weights, watch, sums, moments), iter(run())
    for count in itertools.count():
        collector.begin(kept[count] if count < len(kept) else None)
        before()
        with collector:
            if next(batches, collector) is collector:
                break
    return shrunk(collector.statistics)
