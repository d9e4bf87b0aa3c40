"""Integer codecs try clipping points together or one after the other: with one result."""

from __future__ import annotations

import pytest
import torch

from sparsefx.ir.codecs import ints
from sparsefx.ir.codecs.ints import Int


@pytest.mark.parametrize(
    "codec", [Int(4, 16), Int(2), Int(3, 8, False), Int(8, 16), Int(5, 0, False)]
)
@pytest.mark.parametrize("shape", [(16, 16), (7, 100), (1, 1), (3, 0), (0, 8)])
def test_both_ways_find_the_same_grid(
    codec: Int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(shape), torch.randn(shape).round()):  # of equal errors the first
        together = codec.fit(weight)
        with monkeypatch.context() as apart:
            apart.setattr(ints, "AT_ONCE", 0)
            single = codec.fit(weight)
        for a, b in (
            (together.scales, single.scales), (together.zero_points, single.zero_points)
        ):  # fmt: skip
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)
