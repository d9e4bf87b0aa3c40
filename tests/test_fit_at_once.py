"""Integer codecs try clipping points together or one after the other: with one result."""

from __future__ import annotations

import pytest
import torch

from sparsefx.ir.codecs import ints
from sparsefx.ir.codecs.ints import Int
from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format


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


@pytest.mark.parametrize("text", ["int8", "int4g32", "uint4g32", "fp8"])
def test_rows_that_training_left_dead_are_stored_as_zeros(text: str) -> None:
    """Their scales are no fp16; next to the others they are nothing. Alone they are an error."""
    weight = torch.randn(8, 64)
    weight[3] = 1e-9 * torch.randn(64)
    stored = Format.parse(text).pack(weight).unpack()
    assert not stored[3].any()
    assert torch.equal(stored[:3], Format.parse(text).pack(weight[:3]).unpack())
    with pytest.raises(WeightError, match="fp16"):
        Format.parse(text).pack(weight[3:4])
