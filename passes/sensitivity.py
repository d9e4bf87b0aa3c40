"""What every Format would cost every Site: a second-order proxy, from one pass over the data.

The rise of the loss is taken as ½ Σₙ cₙ · ΔWₙ H ΔWₙᵀ: H is the mean of xᵀx over the Site's input
rows, cₙ the squared gradient of the loss at output n summed over the rows of one unit of loss (the
factors of K-FAC, Martens & Grosse, arXiv 1503.05671, the second one diagonal). ΔW comes from
packing bands of rows by magnitude and rounding; what the real algorithm makes of it is measured at
`SPOTS` Sites and applied to all as one ratio per Format. A branch removes the largest eigenvalues
of the error ΔW H ΔWᵀ. Activations rounded to int8 add their own measured error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import round_activations
from sparsefx.ir.products import PRODUCTS
from sparsefx.ir.sites import Site
from sparsefx.passes.calibration import stream
from sparsefx.passes.candidates import DENSE, Candidate, candidates, stored
from sparsefx.passes.compress_site import compress_site
from sparsefx.passes.distance import Distance, narrow
from sparsefx.passes.outliers import ROWS, Probe
from sparsefx.passes.recipe import Recipe
from sparsefx.passes.statistics import Statistics
from sparsefx.passes.trial import EachSite

BAND, BANDS = 16, 8
"""Rows of a weight that are packed to see what a Format costs: this many bands, evenly spread."""
SPOTS = 3
"""Sites at which the real algorithm is run: evenly spread over those of the smallest K."""
BRANCH_ROUNDING = 2**-18
"""Share of the squared error that a branch of any rank leaves: two factors of bfloat16 values, each
with a mean squared relative error of about 2⁻¹⁸ / 3."""
BACKWARD_ROWS = 1024
"""Input elements of a batch that the backward pass sees: bounds the activations it keeps."""
BACKWARD_CALLS = 4


@dataclass
class Sensitivity:
    """Of one Site: its candidates, and for those that may be had what they cost."""

    site: Site
    candidates: list[Candidate] = field(default_factory=list)
    loss: dict[str, float] = field(default_factory=dict)
    """Format → predicted rise of the loss."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Format → bytes stored, branch included."""


# --- gradients at the outputs ------------------------------------------------------------------


class _Gradients(TorchFunctionMode):
    """Sums squared gradients (N,) at the output of every product with one of `weights`."""

    def __init__(self, weights: Mapping[int, Site]) -> None:
        super().__init__()
        self.weights = weights
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "").strip("_") not in PRODUCTS:
            return out
        site = next(
            (self.weights[id(a)] for a in (*args, *kwargs.values()) if id(a) in self.weights), None
        )
        if site is None or not isinstance(out, Tensor) or not torch.is_grad_enabled():
            return out
        if not out.requires_grad:
            out = out.detach().requires_grad_()
        hook: Any = out.register_hook
        hook(lambda gradient: self._add(site, gradient))
        return out

    def _add(self, site: Site, gradient: Tensor) -> None:
        if site.kind == "conv1x1":
            gradient = gradient.movedim(1, -1)
        flat = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        total = flat.square().sum(0)
        self.sums[site.name] = self.sums[site.name] + total if site.name in self.sums else total
        self.rows[site.name] = self.rows.get(site.name, 0) + len(flat)


def curvature(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any], distance: Distance
) -> dict[str, Tensor]:
    """cₙ (N,) float32 of every Site that gradients reach, from at most BACKWARD_CALLS batches.

    The parameters get no gradients; only activations of one (cut) batch are held.
    """
    wanted = {id(model.get_parameter(s.name)): s for s in sites if s.kind in ("linear", "conv1x1")}
    frozen = [p for p in model.parameters() if p.requires_grad]
    mode, random, units = _Gradients(wanted), torch.Generator().manual_seed(0), 0.0
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            for batch in narrow(batches[:BACKWARD_CALLS], BACKWARD_ROWS):
                args, kwargs = split_inputs(batch)
                with mode:
                    outputs = model(*args, **kwargs)
                scalar, unit = distance.probe(outputs, batch, random)
                units += unit
                if not scalar.requires_grad:
                    raise WeightError("'auto' needs gradients; the model's forward forbids them")
                scalar.backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    # Of a mean over rows: Σ (R·g)² / R, with R the rows of one batch.
    count = min(len(batches), BACKWARD_CALLS)
    per_row = {name: rows / count**2 for name, rows in mode.rows.items()}
    return {n: s / units if units else s * per_row[n] for n, s in mode.sums.items()}


# --- pricing -----------------------------------------------------------------------------------


class Rounding:
    """Watches products: ½ Σₙ cₙ · mean over rows of ((Q(x) − x)·Wᵀ)ₙ² of every Site."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights, self.sums, self.rows = weights, dict[str, float](), dict[str, int]()

    def watch(self, site: Site, weight: Tensor, x: Tensor) -> None:
        c = self.weights.get(site.name)
        flat = x.detach().reshape(-1, x.shape[-1])
        rows = flat[:: max(1, len(flat) // ROWS)].float()
        if c is None or not len(rows):
            return
        error = (round_activations(rows) - rows) @ site.matrix(weight).float().T
        self.sums[site.name] = self.sums.get(site.name, 0.0) + float((error.square() @ c).sum()) / 2
        self.rows[site.name] = self.rows.get(site.name, 0) + len(rows)

    def loss(self, name: str) -> float:
        return self.sums.get(name, 0.0) / max(self.rows.get(name, 0), 1)


def sensitivities(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    distance: Distance,
    ignored: Callable[[Site], str],
    recipe: Recipe,
    progress: Callable[[str], None],
) -> list[Sensitivity]:
    """One Sensitivity per Site, in order. Weights are not changed; Hessians come and go as
    `calibration.stream` holds them. A Site that no batch reaches stays dense, with a reason."""
    weights = curvature(model, sites, batches, distance)
    probe = Probe({site.name: Format.parse("int8+a8") for site in sites})
    rounding = Rounding(weights)
    usable = [s for s in sites if s.kind in ("linear", "conv1x1") and not ignored(s)]
    spots = _spots(usable)
    ratios: dict[str, list[float]] = {}
    found: dict[str, Sensitivity] = {}

    def price(site: Site, statistics: Statistics | None) -> None:
        progress(site.name)
        c = weights.get(site.name)
        matrix = site.matrix(model.get_parameter(site.name))
        why = ignored(site)
        plain = site.kind in ("linear", "conv1x1")
        if not why and plain and (c is None or statistics is None):
            why = "calibration never reached it"
        one = Sensitivity(site, candidates(model, site, probe, why), {DENSE: 0.0})
        one.bytes[DENSE] = matrix.numel() * matrix.element_size()
        found[site.name] = one
        if c is not None and statistics is not None:
            pricer = Pricer(matrix.float(), statistics, c)
            pricer.fill(one)
            if site.name in spots:
                pricer.compare(one, recipe, ratios)

    stream(model, usable, batches, EachSite(model, price, (probe.watch, rounding.watch)))
    for site in sites:
        if site.name not in found:
            price(site, None)
    for one in found.values():
        _correct(one, ratios, rounding.loss(one.site.name))
    return [found[site.name] for site in sites]


def _spots(sites: Sequence[Site]) -> set[str]:
    """Names of SPOTS Sites, evenly spread over those of the smallest K, where sweeps are cheap."""
    names = [site.name for site in sites if site.k == min(other.k for other in sites)]
    return {names[round(i * (len(names) - 1) / (SPOTS - 1))] for i in range(SPOTS) if names}


def _correct(one: Sensitivity, ratios: Mapping[str, Sequence[float]], rounding: float) -> None:
    """Turn losses of rounding to nearest into those of the real algorithm; add the activations'."""
    for text in one.loss:
        if text == DENSE:
            continue
        logs = [math.log(ratio) for ratio in ratios.get(str(stored(text)), ())]
        one.loss[text] *= math.exp(sum(logs) / len(logs)) if logs else 1.0
        one.loss[text] += rounding * Format.parse(text).a8


class Pricer:
    """Prices Formats of one weight (N, K) float32, whose outputs count c (N,)."""

    def __init__(self, weight: Tensor, statistics: Statistics, c: Tensor) -> None:
        assert statistics.second is not None
        self.weight, self.statistics, self.c = weight, statistics, c
        self.moments = statistics.second / max(statistics.rows, 1)
        n = len(weight)
        starts = range(0, n, BAND)
        if n > BAND * BANDS:
            starts = range(0, n - BAND + 1, max(1, (n // BAND - 1) // (BANDS - 1)) * BAND)[:BANDS]
        self.rows = torch.cat([torch.arange(s, min(s + BAND, n)) for s in starts])
        power = c * self.power(weight)
        some = float(power[self.rows].sum())
        self.scale = float(power.sum()) / some if some > 0 else n / len(self.rows)
        """Loss of all rows over that of those looked at, as their output power tells."""

    def power(self, weight: Tensor) -> Tensor:
        """diag(W · M · Wᵀ) (N,)."""
        return ((weight @ self.moments) * weight).sum(1)

    def loss(self, packed: Packed) -> float:
        """Of a packed form of the rows looked at."""
        error = self.weight[self.rows] - packed.unpack()
        return float((self.c[self.rows] * self.power(error)).sum()) * self.scale / 2

    def fill(self, one: Sensitivity) -> None:
        """Loss and bytes of every candidate that is not refused; refuses what cannot be packed."""
        n, k = self.weight.shape
        known: dict[str, tuple[float, float]] = {}
        for i, candidate in enumerate(one.candidates):
            fmt, base = Format.parse(candidate.format), stored(candidate.format)
            if candidate.refused or fmt.is_dense:
                continue
            try:
                if str(base) not in known:
                    packed = base.pack(self.weight[self.rows])
                    known[str(base)] = self.loss(packed), packed.stored_bytes * n / len(self.rows)
            except WeightError as error:
                one.candidates[i] = Candidate(candidate.format, str(error))
                continue
            loss, size = known[str(base)]
            one.loss[candidate.format] = loss * (self.left(base, fmt.rank) if fmt.rank else 1.0)
            one.bytes[candidate.format] = round(size) + 2 * fmt.rank * (n + k + 1)

    def left(self, base: Format, rank: int) -> float:
        """Share of the squared output error that a branch of `rank` leaves: two steps of subspace
        iteration (Halko, Martinsson & Tropp, arXiv 0909.4061) on the error of the whole weight."""
        error = self.weight - base.pack(self.weight).unpack()
        total = float(self.power(error).sum())
        random = torch.Generator().manual_seed(0)
        basis = torch.randn(len(error), min(rank + 8, len(error)), generator=random)
        basis = basis.to(error.device)
        for _ in range(2):
            basis = error @ (self.moments @ (error.T @ torch.linalg.qr(basis).Q))
        basis = torch.linalg.qr(basis).Q
        inner = basis.T @ (error @ (self.moments @ (error.T @ basis)))
        top = float(torch.linalg.eigvalsh(inner)[-rank:].sum())
        return max(BRANCH_ROUNDING, 1 - top / total) if total > 0 else 1.0

    def compare(self, one: Sensitivity, recipe: Recipe, ratios: dict[str, list[float]]) -> None:
        """Add, per stored form, the loss of the real algorithm over that of rounding to nearest."""
        rows = self.weight[self.rows]
        for base in dict.fromkeys(stored(text) for text in one.loss if text != DENSE):
            quick = self.loss(base.pack(rows))
            real = self.loss(compress_site(one.site, rows, base, recipe, self.statistics).packed)
            if quick > 0 and real > 0:
                ratios.setdefault(str(base), []).append(real / quick)
