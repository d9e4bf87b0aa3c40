"""The refit of kept weights against least squares row by row, exact and by ADMM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format
from sparsefx.passes import refit as module
from sparsefx.passes.refit import refit, row_energies
from sparsefx.passes.statistics import Statistics, output_error

EPS = torch.finfo(torch.float32).eps


def rows(count: int, k: int, seed: int = 0) -> Tensor:
    """Correlated inputs of uneven size and mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.5 * torch.randn(k, k, generator=generator) / k**0.5
    size = torch.rand(k, generator=generator) + 0.3
    inputs: Tensor = size * (torch.randn(count, k, generator=generator) @ mix + 0.3)
    return inputs


def measured(x: Tensor) -> Statistics:
    statistics = Statistics(x.shape[1], x.device)
    statistics.add(x)
    return statistics


def case(n: int, k: int, layout: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    weight = torch.randn(n, k, generator=generator)
    mask = Format.parse(layout).layout.select(torch.rand(n, k, generator=generator))
    return weight, mask, rows(4 * k, k, seed)


def by_lstsq(weight: Tensor, mask: Tensor, x: Tensor, damping: float) -> Tensor:
    """Row by row in float64: min ‖x·(w − ŵ)‖² + λ·‖(w − ŵ) on the mask‖², as one tall system."""
    x, weight = x.double(), weight.double()
    ridge = damping * (x * x).sum(0).mean()
    out = torch.zeros_like(weight)
    for i, keep in enumerate(mask):
        tall = torch.cat((x[:, keep], ridge.sqrt() * torch.eye(int(keep.sum()))))
        goal = torch.cat((x @ weight[i], ridge.sqrt() * weight[i, keep]))
        out[i, keep] = torch.linalg.lstsq(tall, goal[:, None]).solution[:, 0]
    return out


def condition(x: Tensor, damping: float) -> float:
    moments = x.T.double() @ x.double()
    ridge = damping * float(moments.diagonal().mean())
    return float(torch.linalg.cond(moments + ridge * torch.eye(len(moments))))


@pytest.mark.parametrize("damping", [0.01, 1e-6])
@pytest.mark.parametrize(
    "layout", ["bitmap@50%", "2:4", "tile4x4@25%", "tile16x1@50%", "bitmap@90%"]
)
@pytest.mark.parametrize(("n", "k"), [(20, 32), (7, 12), (33, 64)])
def test_exact_is_least_squares(n: int, k: int, layout: str, damping: float) -> None:
    weight, mask, x = case(n, k, layout)
    got = refit(weight, mask, measured(x), damping)
    want = by_lstsq(weight, mask, x, damping)
    # Normal equations in float32: the error is eps times the condition number, over K roundings
    bound = 4 * k * EPS * condition(x, damping) * float(want.abs().max())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
    assert not bool(got[~mask].any())


def test_batches_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask, x = case(40, 24, "bitmap@50%")
    whole = refit(weight, mask, measured(x), 0.01)
    monkeypatch.setattr(module, "BUDGET", 1)
    torch.testing.assert_close(refit(weight, mask, measured(x), 0.01), whole)


@pytest.mark.parametrize("layout", ["bitmap@50%", "2:4", "tile16x1@50%"])
def test_admm_comes_as_near_as_its_rate_says(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ADMM with penalty 1 on a quadratic is Douglas–Rachford splitting: its fixed point nears by
    ½ + ½·max(|1 − a| / (1 + a), |b − 1| / (b + 1)) a step, a and b the extreme eigenvalues.
    """
    weight, mask, x = case(24, 32, layout)
    want = by_lstsq(weight, mask, x, 0.01)
    moments = x.T.double() @ x.double()
    moments += 0.01 * moments.diagonal().mean() * torch.eye(32)
    scale = moments.diagonal().sqrt()
    unit = moments / scale / scale[:, None]
    a, b = (float(v) for v in torch.linalg.eigvalsh(unit)[[0, -1]])
    rate = 0.5 + 0.5 * max(abs(1 - a) / (1 + a), abs(b - 1) / (b + 1))
    target, start = weight * scale, torch.where(mask, weight, 0) * scale
    first = (target @ unit + start) @ torch.linalg.inv(unit + torch.eye(32))
    fixed = want * scale + (target - want * scale) @ unit
    monkeypatch.setattr(module, "EXACT", 0)
    for steps in (10, 40, 160):
        monkeypatch.setattr(module, "STEPS", steps)
        got = refit(weight, mask, measured(x), 0.01)
        away = ((got.double() - want) * scale).norm()
        rounding = 8 * 32 * EPS * float(target.norm())  # of the inverse, once a step, damped by it
        assert float(away) <= rate ** (steps - 1) * float((first - fixed).norm()) + rounding
        assert not bool(got[~mask].any())


def test_wide_weights_go_by_admm_and_end_near_the_exact_answer() -> None:
    weight, mask, x = case(16, module.EXACT + 32, "bitmap@50%")
    statistics = measured(x)
    assert statistics.second is not None
    damped = statistics.second.clone()
    damped.diagonal().add_(0.01 * float(damped.diagonal().mean()))
    exact, masked = module._exact(weight, mask, damped), torch.where(mask, weight, 0)
    errors = [
        output_error(weight, w, statistics)
        for w in (exact, refit(weight, mask, statistics, 0.01), masked)
    ]
    assert errors[0] <= errors[1] < errors[2]
    assert errors[1] - errors[0] < 0.02 * (errors[2] - errors[0])


@pytest.mark.parametrize("exact", [True, False])
def test_no_row_gets_worse(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with few, dead, repeated or huge inputs, where factors are bad or missing."""
    if not exact:
        monkeypatch.setattr(module, "EXACT", 0)
    for seed, damping in ((0, 0.01), (1, 1e-9), (2, 1.0)):
        weight, mask, x = case(24, 40, "bitmap@50%", seed)
        x = x[:10]
        x[:, 5], x[:, 7] = 0, x[:, 8]
        x[:, 9] *= 1e4
        statistics = measured(x)
        assert statistics.second is not None
        got = refit(weight, mask, statistics, damping)
        before = row_energies(weight - torch.where(mask, weight, 0), statistics.second)
        after = row_energies(weight - got, statistics.second)
        assert bool(got.isfinite().all())
        assert bool((after <= before).all())
        assert float(after.sum()) < float(before.sum())


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_to_do(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:
        monkeypatch.setattr(module, "EXACT", 0)
    weight, _, x = case(6, 16, "bitmap@50%")
    everything = torch.ones(6, 16, dtype=torch.bool)
    assert torch.equal(refit(weight, everything, measured(x), 0.01), weight)
    assert not bool(refit(weight, ~everything, measured(x), 0.01).any())
    still = refit(weight, everything, measured(torch.zeros(4, 16)), 0.01)
    assert torch.equal(still, weight)
    assert refit(weight[:0], everything[:0], measured(x), 0.01).shape == (0, 16)


def test_the_order_of_batches_and_a_second_run() -> None:
    weight, mask, x = case(12, 32, "bitmap@50%")
    there, back = Statistics(32, x.device), Statistics(32, x.device)
    for part in torch.split(x, 16):
        there.add(part)
    for part in reversed(torch.split(x, 16)):
        back.add(part)
    a, b = (refit(weight, mask, s, 0.01) for s in (there, back))
    bound = 4 * 32 * EPS * condition(x, 0.01) * float(a.abs().max())
    torch.testing.assert_close(a, b, rtol=0, atol=bound)
    assert torch.equal(a, refit(weight, mask, there, 0.01))


def test_bad_calls_are_refused() -> None:
    weight, mask, x = case(4, 16, "bitmap@50%")
    with pytest.raises(WeightError, match="second moments"):
        refit(weight, mask, Statistics(16, x.device, moments=False), 0.01)
    with pytest.raises(WeightError, match=r"mask must be bool \(4, 16\)"):
        refit(weight, mask.float(), measured(x), 0.01)
