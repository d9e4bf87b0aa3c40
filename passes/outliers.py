"""The outlier probe: may this layer's activations be int8, and with how many scales per row?

An int8 scale reaches to the greatest value it covers, so one outlying column costs every other
column its precision. For each Site with `+a8` the probe measures, on calibration inputs, how far
rounding moves the layer's output, and keeps one scale per row, takes one per group, or refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefx.ir.codecs import Int
from sparsefx.ir.format import Format
from sparsefx.ir.op import round_activations
from sparsefx.ir.sites import Site

LIMIT = 10 ** (-30 / 20)
"""Greatest relative error that rounding activations may add to a layer's output: 30 dB, 3.2 %.

4-bit weights in groups of 128 (normal values: a step of 2.7σ/7, so an error of 0.11σ) leave 19 dB.
Errors of weights and of activations are independent, so their powers add: 30 dB add a twelfth, and
such a layer's error grows by √1.08, 4 %. Rounding a row costs crest/(127·√12) of its norm, where
crest = max|x|/rms(x): 30 dB is a crest of 14. Normal rows of thousands of columns have 4, an
outlying column brings up to √K.

SmolLM2-135M bears it out: int4g64 raises log perplexity by 0.29, activations under this limit by
another 0.03, one scale per row everywhere by 0.06.
"""
ROWS = 64
"""Rows of a call that are measured, spread evenly over it."""
GROUP = 128
"""Columns per scale that are tried when neither the activations nor the codec name a group."""
NOT_PROBED = "int8 activations not probed for outliers: no calibration inputs reached this layer"


@dataclass(frozen=True)
class Errors:
    """Greatest ‖(Q(x) − x)·Wᵀ‖ / ‖x·Wᵀ‖ of any call, rounded per row and per group."""

    row: float
    group: float
    column: int
    """Where the greatest activation was when `row` was measured."""
    peak: float
    """That activation over the mean of all."""


class Probe:
    """Watches products with weights that ask for `+a8` and keeps the worst Errors of each."""

    def __init__(self, formats: Mapping[str, Format]) -> None:
        """`formats` are those asked for, by the Site's name."""
        self.formats = {name: fmt for name, fmt in formats.items() if fmt.a8}
        self.worst: dict[str, Errors] = {}

    def watch(self, site: Site, weight: Tensor, x: Tensor) -> None:
        """See one product of the parameter `weight` with x (…, K)."""
        fmt = self.formats.get(site.name)
        if fmt is None:
            return
        found = measure(x, site.matrix(weight), group_of(fmt))
        known = self.worst.get(site.name)
        if found is not None and known is not None:
            worse = max(found, known, key=lambda errors: errors.row)
            found = replace(worse, group=max(found.group, known.group))
        if found is not None:
            self.worst[site.name] = found

    def decide(self, site: Site, fmt: Format) -> tuple[Format, str]:
        """The Format to use where `fmt` was asked for, and why it is another ("" if it is not).

        A group that was asked for by number is kept or refused, never changed.
        """
        if not fmt.a8:
            return fmt, ""
        found, group = self.worst.get(site.name), group_of(fmt)
        if found is None:
            return fmt, NOT_PROBED
        if (found.group if fmt.a8_group else found.row) <= LIMIT:
            return fmt, ""
        where = f"outlier in column {found.column}, {found.peak:.0f} × the mean"
        errors = f"{found.row:.2%} per row, {found.group:.2%} per group of {group}"
        why = f"{where}; relative error {errors}, limit {LIMIT:.2%}"
        if found.group <= LIMIT:
            return replace(fmt, a8_group=group), f"int8 activations per group of {group}: {why}"
        return fmt.float_activations, f"int8 activations refused: {why}"


def group_of(fmt: Format) -> int:
    """Columns per activation scale that are tried where one scale per row is too coarse."""
    codec_group = fmt.codec.group_size if isinstance(fmt.codec, Int) else 0
    return fmt.a8_group or codec_group or GROUP


def measure(x: Tensor, weight: Tensor, group: int) -> Errors | None:
    """Errors of x (…, K) times `weight` (N, K), from at most `ROWS` rows; None without a row."""
    rows = x.detach().reshape(-1, x.shape[-1])
    count = min(ROWS, len(rows))
    spread = torch.arange(count, device=x.device) * (len(rows) - 1) // max(count - 1, 1)
    rows = rows[spread].float()
    rows = rows[rows.isfinite().all(-1)]
    if not rows.numel():
        return None
    errors = [round_activations(rows, size) - rows for size in (0, group)]
    exact, *wrong = (torch.cat([rows, *errors]) @ weight.float().T).chunk(3)
    row, by_group = (float((e.norm() / exact.norm()).nan_to_num(0.0, torch.inf)) for e in wrong)
    peaks = rows.abs().amax(0)
    column = int(peaks.argmax())
    return Errors(row, by_group, column, float(peaks[column] / rows.abs().mean()))
