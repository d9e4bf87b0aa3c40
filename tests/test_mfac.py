"""M-FAC against the explicit Fisher matrix and its inverse, and what it allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsefx.passes.criteria.base import DAMPING
from sparsefx.passes.criteria.mfac import BLOCK, Fisher, mfac
from sparsefx.passes.gradients import GradientError, Gradients

EPS64 = torch.finfo(torch.float64).eps


def gradients(m: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(m, *shape, generator=generator)
    return mixed * torch.rand(shape, generator=generator).square()


def explicit(g: Tensor, damping: float) -> Tensor:
    """F (d, d) in float64, one rank-one sum after the other."""
    out = damping * torch.eye(g.shape[1], dtype=torch.float64)
    for one in g.double():
        out += torch.outer(one, one) / len(g)
    return out


def collected(g: Tensor) -> Gradients:
    out = Gradients(g.shape[1], g.shape[2], torch.device("cpu"), samples=len(g))
    for one in g:
        out.add(one)
    return out


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("m", [1, 5, 40])
def test_every_query_is_that_of_the_explicit_inverse(m: int, damping: float) -> None:
    g = gradients(m, 24)
    fisher, matrix = Fisher(g, damping), explicit(g, damping)
    inverse = torch.linalg.inv(matrix)
    # Both inverses are float64: relative error ≤ a few d·eps times the condition number
    bound = 10 * 24 * EPS64 * float(torch.linalg.cond(matrix))
    scale = float(inverse.abs().max())
    diagonal = fisher.inverse_diagonal()
    torch.testing.assert_close(diagonal, inverse.diagonal(), rtol=bound, atol=bound * scale)
    v = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(fisher.solve(v), inverse @ v, rtol=bound, atol=24 * bound * scale)
    for row, column in ((0, 0), (3, 17), (23, 1)):
        assert abs(fisher.inverse_element(row, column) - inverse[row, column]) <= 2 * bound * scale


def test_the_recursion_of_the_paper_gives_the_same_inverse() -> None:
    """F⁻¹ₜ = F⁻¹ₜ₋₁ − (F⁻¹ₜ₋₁·g)(F⁻¹ₜ₋₁·g)ᵀ / (m + gᵀ·F⁻¹ₜ₋₁·g), from I / damping."""
    g, damping = gradients(6, 12), 0.1
    inverse = torch.eye(12, dtype=torch.float64) / damping
    for one in g.double():
        step = inverse @ one
        inverse = inverse - torch.outer(step, step) / (len(g) + one @ step)
    torch.testing.assert_close(Fisher(g, damping).inverse_diagonal(), inverse.diagonal())


def test_a_sliding_window_is_as_good_as_a_new_start() -> None:
    g, new = gradients(6, 24), gradients(4, 24, seed=9)
    window = Fisher(g, 0.1)
    for index, one in zip((2, 0, 5, 2), new, strict=True):
        window.replace(index, one)
        g[index] = one
    fresh = Fisher(g, 0.1)
    torch.testing.assert_close(window.inverse_diagonal(), fresh.inverse_diagonal())
    v = torch.ones(24, dtype=torch.float64)
    torch.testing.assert_close(window.solve(v), fresh.solve(v))


def test_scores_are_obs_with_the_explicit_inverse_of_each_block() -> None:
    n, k = 11, 200  # 5 rows a block, the last block has 1
    g = gradients(7, n, k)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(2))
    got = mfac(weight, None, collected(g), 0)
    damping = DAMPING * float(g.square().mean())
    assert BLOCK // k == 5
    for start in range(0, n, 5):
        rows = g[:, start : start + 5].flatten(1)
        inverse = torch.linalg.inv(explicit(rows, damping)).diagonal()
        want = weight[start : start + 5].double().square().flatten() / inverse
        torch.testing.assert_close(got[start : start + 5].flatten().double(), want)


def test_the_order_of_gradients_does_not_matter_and_zeros_mean_magnitude() -> None:
    g = gradients(9, 6, 32)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    a, b = (mfac(weight, None, collected(x), 0) for x in (g, g.flip(0)))
    torch.testing.assert_close(a, b)
    assert torch.equal(a, mfac(weight, None, collected(g), 1))
    still = mfac(weight, None, collected(torch.zeros(3, 6, 32)), 0)
    assert torch.equal(still, weight.square())


def test_sums_alone_do_not_do() -> None:
    sums = Gradients(2, 4, torch.device("cpu"))
    sums.add(torch.ones(2, 4))
    with pytest.raises(GradientError, match="samples="):
        mfac(torch.ones(2, 4), None, sums, 0)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most bytes of any tensor that an operation makes; views make none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.size = max(self.size, leaf.numel() * leaf.element_size())
        return out


def test_no_tensor_grows_with_the_square_of_the_weights() -> None:
    m, n, k = 4, 64, 256
    weight, found = torch.randn(n, k), collected(gradients(m, n, k))
    with Largest() as largest:
        mfac(weight, None, found, 0)
    assert largest.size == max(4 * n * k, 8 * m * BLOCK)  # the scores, or one block in float64
    with Largest() as largest:
        fisher = Fisher(found.samples.flatten(1), 0.1)
        fisher.inverse_diagonal()
        fisher.solve(weight.flatten())
        fisher.replace(1, weight.flatten())
    assert largest.size == 8 * m * n * k  # d·m in float64; d·d would be 4096 times that
