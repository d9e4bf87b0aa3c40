"""Smoothing: factors per input channel that make a group's weights round better, folded exactly.

W·diag(s) is stored, and what makes x divides by s (`passes.feeds`), so the product stays what it
was. Sources: SmoothQuant, arXiv 2211.10438, equation 4; AWQ, arXiv 2306.00978, equation 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format
from sparsefx.passes.feeds import Feed
from sparsefx.passes.statistics import Statistics, energy

ALPHAS = tuple(i / 10 for i in range(1, 11))
SAMPLE, BLOCK, FINALISTS = 256, 16, 3
"""Strengths are compared on SAMPLE rows of each weight, in blocks that cover any tile; the best
FINALISTS on all."""
REACH = 2.0**10
"""Factors stay within 1/REACH … REACH, so that folding leaves 16-bit floats room."""


class Found(NamedTuple):
    """Factors (K,) float64, the group's relative output error without and with them, and how."""

    scales: Tensor
    error_before: float
    error_after: float
    how: str
    """The method and its strength, "" when nothing helped and the factors are ones."""


def search(
    weights: Sequence[Tensor],
    statistics: Statistics,
    fmt: Format,
    rows: Sequence[int] | None = None,
) -> Found:
    """The factors, of AWQ's and SmoothQuant's for ten strengths, with the least output error.

    `weights` (N_j, K) read the same rows. The error is ‖x(W − Ŵ)ᵀ‖/‖xWᵀ‖ over all of them, rounded
    to nearest by `fmt`; int8 activations add the expected error of rounding x/s. `rows` are those
    of a Feed: channels with the same one get the same factor. Ones where no candidate helps.
    """
    ones = torch.ones(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    before = _error(weights, statistics, fmt, ones)
    best = Found(ones, before, before, "")
    if not statistics.rows:
        return best
    few = [_sample(weight) for weight in weights]
    tries: list[Found] = []
    for how, scales in candidates(weights, statistics):
        scales = tied(scales, rows)
        tries.append(Found(scales, before, _error(few, statistics, fmt, scales), how))
    for found in sorted(tries, key=lambda t: t.error_after)[:FINALISTS]:
        error = _error(weights, statistics, fmt, found.scales)
        if error < best.error_after:
            best = found._replace(error_after=error)
    return best


def _sample(weight: Tensor) -> Tensor:
    """About SAMPLE rows in evenly spread blocks."""
    n = weight.shape[0]
    if n <= SAMPLE:
        return weight
    starts = torch.linspace(0, n - BLOCK, SAMPLE // BLOCK).long()
    return weight[(starts[:, None] + torch.arange(BLOCK)).flatten()]


def candidates(weights: Sequence[Tensor], statistics: Statistics) -> Iterator[tuple[str, Tensor]]:
    """(method, factors (K,) float64), the weakest first."""
    largest = torch.stack([w.detach().abs().amax(0).double() for w in weights]).amax(0)
    size = (statistics.squares.double() / statistics.rows).sqrt()
    for alpha in ALPHAS:
        yield f"AWQ α={alpha}", _centred(size**alpha)
        yield f"SmoothQuant α={alpha}", smoothquant(statistics.peak, largest, alpha)


def smoothquant(peak: Tensor, largest: Tensor, alpha: float) -> Tensor:
    """max|x|^α / max|W|^(1−α) per channel, from both maxima (K,); ones for channels without any."""
    return _centred(peak.double() ** alpha / largest.double() ** (1 - alpha))


def _centred(scales: Tensor) -> Tensor:
    """Around 1 (their product's root), within REACH; dead channels are left alone."""
    usable = scales.isfinite() & (scales > 0)
    if not bool(usable.any()):
        return torch.ones_like(scales)
    middle = scales[usable].log().mean().exp()
    return torch.where(usable, scales / middle, 1.0).clamp(1 / REACH, REACH)


def tied(scales: Tensor, rows: Sequence[int] | None) -> Tensor:
    """The factors with the geometric mean over channels of the same row."""
    if rows is None or len(set(rows)) == len(rows):
        return scales
    index = torch.tensor(rows, device=scales.device)
    logs = scales.new_zeros(max(rows) + 1).index_add_(0, index, scales.log())
    count = torch.bincount(index).to(scales.dtype).clamp(min=1)
    return (logs / count).exp()[index]


def _error(weights: Sequence[Tensor], statistics: Statistics, fmt: Format, scales: Tensor) -> float:
    """Infinite where a factor takes a group out of the codec's range."""
    second = statistics.second
    moments = torch.diag(statistics.squares) if second is None else second
    lost = had = 0.0
    for weight in weights:
        w = weight.detach().float()
        try:
            stored = fmt.pack((w.double() * scales).float()).unpack() / scales
        except WeightError:
            return float("inf")
        lost += energy(w - stored.float(), moments)
        had += energy(w, moments)
        if fmt.a8:
            lost += _activation_error(w, statistics, fmt, scales)
    return float((max(lost, 0.0) / had) ** 0.5) if had else 0.0


def _activation_error(w: Tensor, statistics: Statistics, fmt: Format, scales: Tensor) -> float:
    """Expected squared output error of rounding x/s to int8: step²/12 per element.

    The step of a group of channels comes from its greatest |x/s| over all rows, an upper bound.
    """
    k = w.shape[1]
    size = fmt.a8_group or k
    reach = statistics.peak.double() / scales
    parts = [reach[start : start + size] for start in range(0, k, size)]
    per_channel = torch.cat([(p.amax() / 127).square().expand(len(p)) / 12 for p in parts])
    columns = (w.double() * scales).square().sum(0)
    return float((per_channel * columns).sum()) * statistics.rows


def rescaled(statistics: Statistics, scales: Tensor) -> Statistics:
    """The statistics of x/s: what the group reads once the factors are folded."""
    s = scales.to(statistics.squares)
    out = Statistics(len(s), s.device, statistics.second is not None)
    out.rows = statistics.rows
    out.squares, out.total = statistics.squares / s.square(), statistics.total / s
    out.peak = statistics.peak / s
    if statistics.second is not None:
        out.second = statistics.second / s[:, None] / s
    return out


def fold(model: nn.Module, feed: Feed, scales: Tensor) -> None:
    """W_j ← W_j·diag(s), what makes x ← itself / s: in place, in float64, rounded once.

    Raises WeightError, with nothing changed, where the Feed cannot be folded, where factors are not
    positive or differ for channels of one row, or where a value leaves its dtype.
    """
    factors = scales.detach().double().cpu()
    divisors = _divisors(feed, factors)
    new: dict[str, Tensor] = {}
    for site in feed.sites:
        matrix = site.matrix(model.get_parameter(site.name)).double()
        new[site.name] = site.parameter_shape(matrix * factors.to(matrix.device))
    for position, name in enumerate(feed.parameters):
        old = model.get_parameter(name).detach().double()
        if feed.producer is not None and position == 0:
            rows = feed.producer.matrix(old)
            by = _padded(divisors, len(rows)).to(old.device)
            new[name] = feed.producer.parameter_shape(rows / by[:, None])
        else:
            offset = 0.0 if position else feed.offset
            new[name] = (old + offset) / _padded(divisors, len(old)).to(old.device) - offset
    write(model, new)


def write(model: nn.Module, new: dict[str, Tensor]) -> None:
    """Round to each parameter's dtype and store all of them, or raise WeightError and none."""
    rounded = {name: t.to(model.get_parameter(name).dtype) for name, t in new.items()}
    for name, tensor in rounded.items():
        if not bool(tensor.isfinite().all()):
            raise WeightError(f"{name}: folding gives values outside {tensor.dtype}; leave it out")
    for name, tensor in rounded.items():
        model.get_parameter(name).data.copy_(tensor)


def _divisors(feed: Feed, scales: Tensor) -> Tensor:
    """What every row of the source is divided by, ones where no channel reads it."""
    who = ", ".join(feed.names)
    if feed.source == "none":
        raise WeightError(f"{who}: no factors can be folded: {feed.reason}")
    if scales.shape != (len(feed.rows),) or not bool(((scales > 0) & scales.isfinite()).all()):
        raise WeightError(f"{who}: factors must be {len(feed.rows)} positive numbers")
    rows = torch.tensor(feed.rows)
    out = torch.ones(int(rows.max()) + 1, dtype=torch.float64)
    out[rows] = scales
    if not torch.equal(out[rows], scales):
        raise WeightError(f"{who}: channels made by one row of {feed.parameters[0]} need one "
                          "factor; use passes.smooth.tied")  # fmt: skip
    return out


def _padded(by: Tensor, size: int) -> Tensor:
    return torch.cat([by, by.new_ones(size - len(by))])
