"""Coordinate descent on codes and scales: never worse, at a fixed point, every format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.ir.codecs import Float, Int
from sparsefx.ir.format import Format
from sparsefx.passes.descend import descend, fit_scales
from sparsefx.passes.sparsegpt import sparsegpt
from sparsefx.passes.statistics import Statistics, energy, output_error

SPECS = ("int4g16", "uint3g16", "int8", "2:4+int4g16", "tile4x2@50%", "bitmap@50%+uint4", "2:4")


def problem(n: int, k: int, seed: int = 0) -> tuple[Tensor, Statistics]:
    """A weight and correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=random) @ torch.randn(k, k, generator=random)
    seen = Statistics(k, x.device)
    seen.add(x)
    return torch.randn(n, k, generator=random), seen


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(1, 7), (8, 64), (5, 150)])
def test_descent_beats_the_sweep_and_keeps_the_pattern(spec: str, shape: tuple[int, int]) -> None:
    fmt = Format.parse(spec)
    if fmt.rejects(*shape):
        pytest.skip("the layout does not fit this shape")
    weight, seen = problem(*shape)
    assert seen.second is not None
    before = sparsegpt(weight, fmt, None, seen, 0.01)
    after = descend(weight, before, seen.second)
    errors = [output_error(weight, p.unpack(), seen) for p in (before, after)]
    assert errors[1] <= errors[0]
    masks = before.mask(), after.mask()
    assert (masks[0] is None and masks[1] is None) or torch.equal(*masks)  # type: ignore[arg-type]
    assert after.format == fmt


def test_no_single_code_can_be_improved() -> None:
    """Brute force: after convergence no other code in any one position lowers the error."""
    weight, seen = problem(2, 8)
    assert seen.second is not None
    fmt = Format.parse("int3g8")
    packed = descend(weight, fmt.pack(weight), seen.second, rounds=30)
    codes, _, grid = packed.read()
    codec = fmt.codec
    assert isinstance(codec, Int)
    wide = grid.columns(0, 8, codec.group(8))
    codes = codes.view(2, 8)
    best = energy(weight - codec.decode(codes, wide), seen.second)
    for i in range(codes.numel()):
        for code in range(codec.low, codec.high + 1):
            other = codes.clone()
            other.view(-1)[i] = code
            found = energy(weight - codec.decode(other, wide), seen.second)
            assert found >= best * (1 - 1e-5)


def test_floats_end_at_least_squares() -> None:
    """Without rounding the descent converges to the exact refit of the kept weights."""
    weight, seen = problem(6, 12)
    assert seen.second is not None
    fmt = Format.parse("2:4")
    packed = descend(weight, fmt.pack(weight), seen.second, rounds=2000)
    mask = packed.mask()
    assert mask is not None
    assert isinstance(fmt.codec, Float)
    moments = seen.second.double()
    for row in range(6):
        kept = mask[row]
        right = (weight[row].double() @ moments)[kept]
        exact = torch.zeros(12, dtype=torch.float64)
        exact[kept] = torch.linalg.solve(moments[kept][:, kept], right)
        lost = [energy((weight[row] - w).float()[None], seen.second)
                for w in (exact, packed.unpack()[row])]  # fmt: skip
        assert lost[1] <= lost[0] * 1.01


def test_scales_are_the_least_squares_ones() -> None:
    """Against a dense least-squares solution per row; damping is 1e-4 of the mean diagonal."""
    weight, seen = problem(3, 48)
    assert seen.second is not None
    fmt = Format.parse("int4g16")
    packed = fmt.pack(weight)
    _, _, grid = packed.read()
    stored = packed.unpack()
    found = fit_scales(weight @ seen.second, stored, grid, fmt.codec, seen.second)
    assert found.scales is not None
    assert grid.scales is not None
    root = torch.linalg.cholesky(seen.second.double() + 1e-6 * torch.eye(48)).T
    for row in range(3):
        units = stored[row].double().view(3, 16) / grid.scales[row].double()[:, None]
        parts = torch.block_diag(*units).double()  # type: ignore[no-untyped-call]
        exact = torch.linalg.lstsq(root @ parts.T, root @ weight[row].double()).solution
        wanted = [float((root @ (weight[row].double() - s.double() @ parts)).square().sum())
                  for s in (exact, found.scales[row])]  # fmt: skip
        assert wanted[1] <= wanted[0] * (1 + 2e-3)


@settings(max_examples=25, deadline=None)
@given(
    spec=st.sampled_from(SPECS), n=st.integers(1, 9), groups=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_never_worse(spec: str, n: int, groups: int, seed: int) -> None:
    fmt, k = Format.parse(spec), 16 * groups
    weight, seen = problem(n, k, seed)
    assert seen.second is not None
    before = fmt.pack(weight)
    after = descend(weight, before, seen.second, rounds=1)
    # Rounding of scales to fp16 moves every value by up to 2⁻¹¹ of itself.
    slack = 2**-10 * output_error(weight, torch.zeros_like(weight), seen)
    now = output_error(weight, after.unpack(), seen)
    assert now <= output_error(weight, before.unpack(), seen) + slack


def test_dead_inputs_change_nothing() -> None:
    weight, _ = problem(4, 16)
    dead = Statistics(16, weight.device)
    dead.add(torch.zeros(5, 16))
    assert dead.second is not None
    before = Format.parse("int4g16").pack(weight)
    after = descend(weight, before, dead.second)
    assert torch.equal(after.unpack(), before.unpack())
