"""SVDQuant: outliers go to the branch, the rest is stored; against quantising the weight alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format, Packed
from sparsefx.passes.lowrank import product as dense
from sparsefx.passes.statistics import Statistics, output_error
from sparsefx.passes.svdquant import svdquant


def planted(n: int = 192, k: int = 256) -> tuple[Tensor, Statistics]:
    """Noise, a few strong directions and a few strong columns, as in diffusion transformers."""
    torch.manual_seed(0)
    weight = 0.05 * torch.randn(n, k) + torch.randn(n, 4) @ torch.randn(4, k)
    weight[:, ::37] += torch.randn(n, 1)
    statistics = Statistics(k, weight.device)
    statistics.add(torch.randn(512, k) * (0.2 + torch.rand(k)))
    return weight, statistics


def bits(packed: Packed) -> int:
    return 8 * sum(b.numel() * b.element_size() for b in packed.buffers)


@pytest.mark.parametrize("weighted", [True, False])
def test_better_than_more_bits_without_a_branch(weighted: bool) -> None:
    weight, given = planted()
    statistics = given if weighted else None
    fmt = Format.parse("int3g32+r16")
    packed, branch = svdquant(weight, statistics, fmt, fmt.pack)
    down, up, scale = branch
    assert (down.shape, up.shape, scale.shape) == ((16, 256), (192, 16), (16,))
    assert {t.dtype for t in branch} == {torch.bfloat16}
    error = output_error(weight, packed.unpack() + dense(branch), statistics)
    alone = Format.parse("int5g32").pack(weight)
    spent = bits(packed) + 16 * (down.numel() + up.numel())
    assert bits(alone) >= 0.85 * spent
    wide = Format.parse("int6g32").pack(weight)
    assert bits(wide) >= spent, "more bits than ours, branch included"
    assert error < output_error(weight, wide.unpack(), statistics)


def test_iterations_never_lose() -> None:
    weight, statistics = planted()
    fmt = Format.parse("2:4+int4g32+r8")
    errors = []
    for count in (1, 2, 4, 8):
        packed, branch = svdquant(weight, statistics, fmt, fmt.pack, count)
        errors.append(output_error(weight, packed.unpack() + dense(branch), statistics))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]


def test_exact_at_full_rank() -> None:
    """What is left is the branch's own rounding: 2^-7 of |up|·|down| from two bfloat16 factors."""
    weight, _ = planted(24, 32)
    fmt = Format.parse("int8+r24")
    packed, branch = svdquant(weight, None, fmt, fmt.pack, 1)
    down, up, _ = (t.float().abs() for t in branch)
    left = (weight - dense(branch) - packed.unpack()).abs()
    assert bool((left <= 1.01 * 2**-7 * (up @ down) + 1e-5).all())


def test_repeats_bit_for_bit_and_needs_a_rank() -> None:
    weight, statistics = planted(32, 64)
    fmt = Format.parse("int4g32+r4")
    first, second = (svdquant(weight, statistics, fmt, fmt.pack) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            (*first[0].buffers, *first[1]), (*second[0].buffers, *second[1]), strict=True
        )
    )
    with pytest.raises(WeightError, match=r"needs '\+rRANK'"):
        svdquant(weight, statistics, Format.parse("int4"), fmt.pack)
