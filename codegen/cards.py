"""Cards as data, and the time that a product by packed weights takes on each at the very least.

Figures are NVIDIA's own, dense (half of those "with sparsity"), with fp32 sums for fp16:
A100: "A100 Tensor Core GPU" data sheet, 80 GB SXM, and "A100 Tensor Core GPU Architecture".
L4: "L4 Tensor Core GPU" data sheet; "Ada GPU Architecture" for an SM.
RTX 4090: "Ada GPU Architecture", appendix A. On GeForce cards fp32 sums run at half rate.
H100, H200: data sheets, SXM; "H100 Tensor Core GPU Architecture" for an SM and the clock of the
tensor cores. B200: "Blackwell" data sheet, HGX B200, an eighth of it; the clock is the one at which
the data sheet's tensor rate follows from its SMs, and the int32 lanes are taken to be Hopper's.
int8 there needs tcgen05 instructions; code with IMMA, as of Triton 3.6 and 3.7, reaches less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsefx.ir.errors import SpecError, nearest

ISSUE = 128
"""Lanes an SM of all these can issue for per clock: four schedulers, one warp instruction each."""


@dataclass(frozen=True)
class Card:
    """Peak rates; `target` is a name of `triton_aot.TARGETS`.

    `bandwidth` is bytes, `fp16` (and bf16) and `int8` tensor-core operations per second, a
    multiply-add being two, `clock` Hz; `int32` and `fp32` are lanes per SM.
    """

    target: str
    bandwidth: float
    fp16: float
    int8: float
    sms: int
    clock: float
    int32: int
    fp32: int


CARDS = {
    "A100 80GB SXM": Card("sm_80", 2.039e12, 312e12, 624e12, 108, 1.410e9, 64, 64),
    "L4": Card("sm_89", 0.300e12, 121e12, 242.5e12, 58, 2.040e9, 64, 128),
    "RTX 4090": Card("sm_89", 1.008e12, 165.2e12, 660.6e12, 128, 2.520e9, 64, 128),
    "H100 SXM": Card("sm_90", 3.35e12, 989.5e12, 1979e12, 132, 1.830e9, 64, 128),
    "H200": Card("sm_90", 4.8e12, 989.5e12, 1979e12, 132, 1.830e9, 64, 128),
    "B200": Card("sm_100", 8.0e12, 2250e12, 4500e12, 148, 1.860e9, 64, 128),
}


@dataclass(frozen=True)
class Work:
    """One product x (m, k) · Wᵀ (k, n).

    `moved` is all bytes read and written, `dtype` what the tensor cores multiply: "fp16", "bf16" or
    "int8". `per_weight` is `Compiled.per_weight`, of which "all", "integer" and "float" are used;
    `weights` counts the stored ones, each decoded once for every one of `row_blocks` blocks of x.
    """

    moved: float
    m: int
    n: int
    k: int
    dtype: str
    per_weight: Mapping[str, float]
    weights: int
    row_blocks: int


@dataclass(frozen=True)
class Roof:
    """Seconds that each resource needs alone; the longest is `limit` and bounds the time below."""

    seconds: dict[str, float]

    @property
    def limit(self) -> str:
        """The resource that takes longest, the first of equals."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def least(self) -> float:
        """No kernel with this work is faster: all else would have to be hidden behind `limit`."""
        return self.seconds[self.limit]


def roofline(card: str, work: Work) -> Roof:
    """Seconds for "memory", "tensor", "integer", "float" and "issue" (all instructions) on a card.

    The model of Williams, Waterman, Patterson, "Roofline" (2009), with one roof per resource; all
    SMs are taken to be busy. Raises SpecError for an unknown card or dtype.
    """
    if card not in CARDS:
        raise SpecError(f"no card '{card}'{nearest(card, CARDS)}")
    on = CARDS[card]
    rates = {"fp16": on.fp16, "bf16": on.fp16, "int8": on.int8}
    if work.dtype not in rates:
        raise SpecError(f"no tensor-core rate for '{work.dtype}'{nearest(work.dtype, rates)}")
    decoded = work.weights * work.row_blocks / (on.sms * on.clock)
    return Roof(
        {
            "memory": work.moved / on.bandwidth,
            "tensor": 2 * work.m * work.n * work.k / rates[work.dtype],
            "integer": work.per_weight["integer"] * decoded / on.int32,
            "float": work.per_weight["float"] * decoded / on.fp32,
            "issue": work.per_weight["all"] * decoded / ISSUE,
        }
    )
