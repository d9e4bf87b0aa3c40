"""Second moments, and how far they are moved towards a multiple of the identity."""

from __future__ import annotations

import pytest
import torch

from sparsefx.passes.statistics import Statistics

K = 12


def gathered(batches: list[torch.Tensor]) -> Statistics:
    out = Statistics(K, torch.device("cpu"))
    for batch in batches:
        out.add(batch)
    return out


def drawn(count: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Σ (K, K) and batches whose rows have these second moments."""
    random = torch.Generator().manual_seed(seed)
    factor = torch.randn(K, K, generator=random) / torch.arange(1, K + 1)
    return factor.T @ factor, [
        torch.randn(rows, K, generator=random) @ factor for _ in range(count)
    ]


def test_one_batch_tells_nothing_about_its_spread() -> None:
    seen = gathered([torch.randn(5, K)])
    assert seen.second is not None
    before = seen.second.clone()
    assert seen.shrink() == 0.0
    assert torch.equal(seen.second, before)
    assert gathered([]).shrink() == 0.0
    assert Statistics(K, torch.device("cpu"), moments=False).shrink() == 0.0


def test_batches_that_agree_are_believed() -> None:
    batch = torch.randn(30, K)
    seen = gathered([batch] * 3)
    assert seen.shrink() < 1e-6
    torch.testing.assert_close(seen.second, 3 * batch.T @ batch)


def test_batches_that_have_nothing_in_common_are_not() -> None:
    """One row along each axis: their mean is the identity's multiple already, so nothing is left
    of it; of two axes only, the share is the greatest there is."""
    axes = [torch.eye(K)[i : i + 1] for i in range(K)]
    seen = gathered(axes)
    seen.shrink()
    torch.testing.assert_close(seen.second, torch.eye(K))
    few = gathered(axes[:2])
    assert few.shrink() == 1.0
    torch.testing.assert_close(few.second, torch.eye(K) * 2 / K)


def test_the_trace_stays_and_the_order_does_not_matter() -> None:
    _, batches = drawn(4, 3)
    there, back = gathered(batches), gathered(batches[::-1])
    assert there.second is not None
    trace = there.second.trace()
    assert there.shrink() == pytest.approx(back.shrink(), rel=1e-5)
    torch.testing.assert_close(there.second.trace(), trace)


def test_the_share_is_the_formula_s() -> None:
    """Against b²/d² written out over the batches."""
    _, batches = drawn(5, 4)
    sums = torch.stack([b.double().T @ b.double() for b in batches])
    total = sums.sum(0)
    variance = (sums - total / 5).square().sum() * 5 / 4
    away = (total - torch.eye(K) * total.trace() / K).square().sum()
    assert gathered(batches).shrink() == pytest.approx(float(variance / away), rel=1e-4)


def test_it_is_nearer_to_the_truth() -> None:
    """Averaged over draws, which is what the share minimises."""
    lost = [0.0, 0.0]
    for seed in range(20):
        truth, batches = drawn(6, 2, seed)
        seen = gathered(batches)
        assert seen.second is not None
        for i in range(2):
            estimate = seen.second / 12
            lost[i] += float((estimate - truth).square().sum() / truth.square().sum())
            seen.shrink()
    assert lost[1] < 0.9 * lost[0]
