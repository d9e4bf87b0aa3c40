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
from sparsefx.passes.calibration import Part, exhaust, stream
from sparsefx.passes.checkpoint import Checkpoint
from sparsefx.passes.collector import collect
from sparsefx.passes.compress_site import Result, Step, compress_site
from sparsefx.passes.criteria import CRITERIA
from sparsefx.passes.criteria.random import site_seed
from sparsefx.passes.distill import distill, record
from sparsefx.passes.feeds import Feed
from sparsefx.passes.follow import Drift
from sparsefx.passes.gradients import Loss
from sparsefx.passes.outliers import Probe
from sparsefx.passes.plan import Choice
from sparsefx.passes.ratios import RATIOS
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
        if RATIOS[spec.ratios].needs:
            why = f"ratio '{spec.ratios}' was measured with 'obs', not '{recipe.criterion}'"
            visitor.notes.update(dict.fromkeys(formats, why))
        visitor.masks = gradient_masks(model, sites, formats, recipe, batches or (), loss)
    seen = recipe.needs_inputs or visitor.probe.formats or feeds or spec.recovery is not None
    if batches is None or not seen:
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
        self.notes: dict[str, str] = {}
        """By the Site's name, what was asked for and not done so, and why."""
        self.model, self.spec, self.recipe, self.formats = model, spec, recipe, formats
        self.install, self.progress, self.checkpoint = install, progress, checkpoint
        self.probe = Probe(formats)
        self.masks: Mapping[str, Tensor] = {}
        recovery = spec.recovery
        self.trained = recovery is not None and recovery.epochs + recovery.scale_epochs > 0
        self.targets = self.trained or recipe.follow > 0
        self.done: list[Result] = []
        self.kept: list[Result] = []
        """Results that are trained together before they are put in place."""

    def part(self, part: Part) -> None:
        saved = None
        if self.checkpoint is not None and self.checkpoint.has(part.sites):
            exhaust(part.beside or list)  # before norms that were trained along come back
            saved = self.checkpoint.load(part.sites)
        self.done = self.compress(part) if saved is None else saved
        if saved is None and self.checkpoint is not None:
            self.checkpoint.save(self.done, self._trained_along(part))
        for result in self.done:
            write_back(self.model, result)

    def _trained_along(self, part: Part) -> dict[str, Tensor]:
        """Norms and biases of a block, where smoothing or recovery edits them."""
        if part.module is None or not (self.trained or self.feeds):
            return {}
        own = {id(p) for p in part.module.parameters() if p.dim() == 1}
        return {name: p for name, p in self.model.named_parameters() if id(p) in own}

    def compress(self, part: Part) -> list[Result]:
        weights = {s.name: (s, self.model.get_parameter(s.name)) for s in part.sites}
        sums = bool(self.recipe.needs_inputs or self.feeds)
        drift = self.drift(weights, part)
        if drift is None:
            found = collect(weights, part.run, self.probe.watch, sums, kept=part.kept)
        else:
            found = collect(
                weights, drift.run, self.probe.watch, sums, True, drift.before, part.kept
            )
            why = "does not follow the dense model: its input rows are not the same tokens there"
            self.remark(drift.refused, why)
        inside = {site.name for site in part.sites}
        for feed in self.feeds:
            if inside.isdisjoint(feed.names):
                continue
            if why := unfoldable(feed, inside, self.formats, found):
                self.remark(feed.names, f"not smoothed: {why}")
            else:
                found |= self.smooth(feed, found[feed.names[0]], drift)
        if self.trained and part.module is None:
            names = [site.name for site in part.sites]
            self.remark(names, "not trained block by block: in no repeated block")
        done = [self.one(site, found.get(site.name), drift) for site in part.sites]
        if self.trained and part.module is not None and self.spec.recovery is not None:
            done = recover(self.model, part, done, self.spec.recovery, self.spec.seed)
        return done

    def remark(self, names: Iterable[str], why: str) -> None:
        """Add `why` to what `explain` says of these Sites."""
        for name in names:
            self.notes[name] = "; ".join(filter(None, (self.notes.get(name), why)))

    def drift(self, weights: Mapping[str, tuple[Site, Tensor]], part: Part) -> Drift | None:
        """What a block's products differ by from the dense model's, to be summed by `collect`."""
        if part.beside is None:
            return None
        if self.recipe.follow:
            return Drift(weights, part.beside, part.run, part.kept)
        exhaust(part.beside)
        return None

    def smooth(self, feed: Feed, seen: Statistics, drift: Drift | None) -> dict[str, Statistics]:
        """Fold the factors that help most into a Feed; the Statistics that this changes."""
        matrices = [s.matrix(self.model.get_parameter(s.name)).float() for s in feed.sites]
        found = search(matrices, seen, self.formats[feed.names[0]], feed.rows)
        if not found.how:
            return {}
        fold(self.model, feed, found.scales)
        if drift is not None:
            for name in feed.names:
                drift.rescale(name, found.scales)
        step = Step(f"smooth {found.how}", found.error_after)
        self.smoothed.update(dict.fromkeys(feed.names, step))
        return dict.fromkeys(feed.names, rescaled(seen, found.scales))

    def finish(self, part: Part) -> None:
        if self.spec.recovery is not None and self.spec.recovery.whole_epochs:
            self.kept += self.done
        else:
            for result in self.done:
                self.install(result)
        self.done = []

    def one(self, site: Site, statistics: Statistics | None, drift: Drift | None = None) -> Result:
        """Compress one Site with what its inputs looked like."""
        self.progress(site)
        fmt, note = self.probe.decide(site, self.formats[site.name])
        recipe, statistics, seen = self.recipe.seen(fmt, statistics, site.k, site.reason)
        mask = None
        if site.name in self.masks:
            bits = unpack_bits(self.masks[site.name], 1, site.n * site.k)
            mask = bits.bool().view(site.n, site.k)
        matrix = site.matrix(self.model.get_parameter(site.name))
        note = "; ".join(filter(None, (seen, note, self.notes.get(site.name))))
        steps = [self.smoothed[site.name]] if site.name in self.smoothed else []
        if drift is not None and statistics is not None and statistics.second is not None:
            matrix, more = followed(site.name, matrix, statistics.second, recipe, drift)
            steps += more
        result = compress_site(site, matrix, fmt, recipe, statistics, None, mask, note)
        return replace(result, steps=(*steps, *result.steps))


def followed(
    name: str, matrix: Tensor, moments: Tensor, recipe: Recipe, drift: Drift
) -> tuple[Tensor, list[Step]]:
    """The weight that makes up for what earlier layers lost, where that helps, and its Steps."""
    found = drift.shift(name, matrix.float(), moments, recipe.follow, recipe.damping)
    if found is None:
        return matrix, []
    new, before, after = found
    better = after < before
    steps = [Step("drift of the inputs", before), Step("follow", after, kept=better)]
    return new if better else matrix, steps


def unfoldable(
    feed: Feed,
    inside: set[str],
    formats: Mapping[str, Format],
    statistics: Mapping[str, Statistics],
) -> str:
    """Why no factors are folded into `feed` among the Sites `inside`, "" where they may be."""
    if feed.source == "none":
        return feed.reason
    if not inside >= {*feed.names}:
        return "other parts of the model read the same input"
    if feed.producer is not None and feed.producer.name not in inside:
        return f"{feed.producer.name}, which makes its input, was compressed before"
    if len({formats[name] for name in feed.names}) > 1:
        return "products that read the same input differ in format"
    return "" if feed.names[0] in statistics else "calibration never reached it"


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
