"""Compress: turn planned Sites into packed weights, streaming; the dense weights go as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparsefx.ir.bits import pack_bits, unpack_bits
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import Dense
from sparsefx.ir.sites import Site
from sparsefx.passes.calibration import Part, stream
from sparsefx.passes.checkpoint import Checkpoint
from sparsefx.passes.collector import collect
from sparsefx.passes.compress_site import Result, Step, compress_site
from sparsefx.passes.criteria import CRITERIA
from sparsefx.passes.criteria.random import site_seed
from sparsefx.passes.distill import distill, record
from sparsefx.passes.feeds import Feed
from sparsefx.passes.gradients import Loss
from sparsefx.passes.outliers import Probe
from sparsefx.passes.plan import Choice
from sparsefx.passes.recipe import Recipe
from sparsefx.passes.recover import recover
from sparsefx.passes.share import share_out
from sparsefx.passes.smooth import fold, rescaled, search
from sparsefx.passes.spec import Spec
from sparsefx.passes.statistics import Statistics

Install = Callable[[Result], None]
Progress = Callable[[Site], None]


def compress(
    model: nn.Module,
    choices: Sequence[Choice],
    spec: Spec,
    batches: Sequence[Any] | None,
    install: Install,
    progress: Progress = lambda site: None,
    loss: Loss | None = None,
    checkpoint: Checkpoint | None = None,
    feeds: Sequence[Feed] = (),
) -> None:
    """Compress every Site that is not dense and hand each Result to `install`, in call order.

    Without `batches` each Site is compressed on its own. With them, statistics stream block by
    block, and int8 activations may be refused or get more scales (`passes.outliers`); a Site whose
    product shows no input rows falls back to magnitude, with a note. `loss` is what gradient
    criteria differentiate; `checkpoint` keeps finished parts for a run that was cut off; `feeds`
    are what may be smoothed.
    """
    recipe = Recipe.of(spec, batches is not None)
    formats = {c.site.name: c.format for c in choices if not c.dense}
    sites = [c.site for c in choices if not c.dense]
    formats = share_out(model, sites, formats, spec.ratios, recipe, batches)
    visitor = _Compressor(model, spec, recipe, formats, install, progress, checkpoint, feeds)
    if CRITERIA[recipe.criterion].needs == "gradients":
        visitor.masks = gradient_masks(model, sites, formats, recipe, batches or (), loss)
    if batches is None or not (recipe.needs_inputs or visitor.probe.formats or visitor.targets):
        for site in sites:
            install(visitor.one(site, None))
        return
    whole = spec.recovery is not None and spec.recovery.whole_epochs > 0
    outputs = record(model, batches) if whole else []
    stream(model, sites, batches, visitor)
    if spec.recovery is not None and whole:
        visitor.kept = distill(model, visitor.kept, batches, outputs, spec.recovery, spec.seed)
    for result in visitor.kept:
        install(result)


class _Compressor:
    """The Visitor that compresses every part of a model in place."""

    def __init__(
        self,
        model: nn.Module,
        spec: Spec,
        recipe: Recipe,
        formats: Mapping[str, Format],
        install: Install,
        progress: Progress,
        checkpoint: Checkpoint | None,
        feeds: Sequence[Feed] = (),
    ) -> None:
        self.feeds, self.smoothed = feeds, dict[str, Step]()
        self.model, self.spec, self.recipe, self.formats = model, spec, recipe, formats
        self.install, self.progress, self.checkpoint = install, progress, checkpoint
        self.probe = Probe(formats)
        self.masks: Mapping[str, Tensor] = {}
        recovery = spec.recovery
        self.targets = recovery is not None and recovery.epochs + recovery.scale_epochs > 0
        self.done: list[Result] = []
        self.kept: list[Result] = []
        """Results that are trained together before they are put in place."""

    def part(self, part: Part) -> None:
        saved = None if self.checkpoint is None else self.checkpoint.load(part.sites)
        self.done = self.compress(part) if saved is None else saved
        if saved is None and self.checkpoint is not None:
            self.checkpoint.save(self.done, self._trained_along(part))
        for result in self.done:
            write_back(self.model, result)

    def _trained_along(self, part: Part) -> dict[str, Tensor]:
        """Norms and biases of a block, where smoothing or recovery edits them."""
        if part.module is None or not (self.targets or self.feeds):
            return {}
        own = {id(p) for p in part.module.parameters() if p.dim() == 1}
        return {name: p for name, p in self.model.named_parameters() if id(p) in own}

    def compress(self, part: Part) -> list[Result]:
        weights = {s.name: (s, self.model.get_parameter(s.name)) for s in part.sites}
        found = collect(weights, part.run, self.probe.watch, bool(self.recipe.needs_inputs))
        found |= smooth(self.model, self.feeds, part.sites, self.formats, found, self.smoothed)
        done = [self.one(site, found.get(site.name)) for site in part.sites]
        if self.targets and part.module is not None and self.spec.recovery is not None:
            done = recover(self.model, part, done, self.spec.recovery, self.spec.seed)
        return done

    def finish(self, part: Part) -> None:
        if self.spec.recovery is not None and self.spec.recovery.whole_epochs:
            self.kept += self.done
        else:
            for result in self.done:
                self.install(result)
        self.done = []

    def one(self, site: Site, statistics: Statistics | None) -> Result:
        """Compress one Site with what its inputs looked like."""
        self.progress(site)
        fmt, note = self.probe.decide(site, self.formats[site.name])
        recipe, statistics, seen = self.recipe.seen(fmt, statistics, site.k, site.reason)
        mask = None
        if site.name in self.masks:
            bits = unpack_bits(self.masks[site.name], 1, site.n * site.k)
            mask = bits.bool().view(site.n, site.k)
        matrix = site.matrix(self.model.get_parameter(site.name))
        note = "; ".join(filter(None, (seen, note)))
        result = compress_site(site, matrix, fmt, recipe, statistics, None, mask, note)
        before = [self.smoothed[site.name]] if site.name in self.smoothed else []
        return replace(result, steps=(*before, *result.steps))


def smooth(
    model: nn.Module,
    feeds: Sequence[Feed],
    sites: Sequence[Site],
    formats: Mapping[str, Format],
    statistics: Mapping[str, Statistics],
    steps: dict[str, Step],
) -> dict[str, Statistics]:
    """Fold the best factors into every Feed among `sites`; the Statistics that this changes.

    A Feed whose producer was compressed before, or whose Sites differ in Format, stays as it is.
    """
    inside, out = {site.name for site in sites}, dict[str, Statistics]()
    for feed in feeds:
        producer = {feed.producer.name} if feed.producer is not None else set()
        wanted = {formats.get(name) for name in feed.names}
        seen = statistics.get(feed.names[0])
        if feed.source == "none" or not inside >= producer | {*feed.names} or seen is None:
            continue
        fmt = wanted.pop()
        if wanted or fmt is None:
            continue
        weights = [site.matrix(model.get_parameter(site.name)).float() for site in feed.sites]
        found = search(weights, seen, fmt, feed.rows)
        if not found.how:
            continue
        fold(model, feed, found.scales)
        new = rescaled(seen, found.scales)
        out.update(dict.fromkeys(feed.names, new))
        steps.update(dict.fromkeys(feed.names, Step(f"smooth {found.how}", found.error_after)))
    return out


def gradient_masks(
    model: nn.Module,
    sites: Sequence[Site],
    formats: Mapping[str, Format],
    recipe: Recipe,
    batches: Iterable[Any],
    loss: Loss | None,
) -> dict[str, Tensor]:
    """Every pattern by the dense model's gradients, one bit per position."""
    criterion = CRITERIA[recipe.criterion]
    sparse = [site for site in sites if not isinstance(formats[site.name].layout, Dense)]
    out: dict[str, Tensor] = {}
    for site, gradients in criterion.collect(model, sparse, batches, loss):
        weight = site.matrix(model.get_parameter(site.name)).float()
        scores = criterion.score(weight, None, gradients, site_seed(recipe.seed, site.name))
        out[site.name] = pack_bits(formats[site.name].layout.select(scores), 1)
    return out


def write_back(model: nn.Module, result: Result) -> None:
    """Let the dense parameter hold what is stored, so later blocks see the compressed model."""
    weight = model.get_parameter(result.site.name)
    weight.data.copy_(result.site.parameter_shape(result.dense().to(weight.dtype)))
