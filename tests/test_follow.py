"""Following the dense model: the normal equations against least squares, and what it buys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_compress import compressed
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.sites import Site
from sparsefx.passes.collector import collect
from sparsefx.passes.follow import Drift
from sparsefx.passes.statistics import Statistics

N, K, ROWS = 6, 5, 40


SITE = Site(("w",), (N, K), "linear")


class Block(nn.Module):
    """residual + Linear(x), in one of the ways models write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(K, N), how

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if self.how == "r + y":
            return residual + y
        if self.how == "y + r":
            return y + residual
        residual = residual.clone()
        if self.how == "r += y":
            residual += y
            return residual
        return residual.add_(y)


Data = list[tuple[Tensor, Tensor]]


def two_models(seed: int = 0) -> tuple[Data, Data]:
    """(x, residual) of three batches in the dense model and in the compressed one."""
    torch.manual_seed(seed)
    dense = [(torch.randn(1, ROWS, K), torch.randn(1, ROWS, N)) for _ in range(3)]
    return dense, [(x + 0.3 * torch.randn_like(x), r + 0.2 * torch.randn_like(r)) for x, r in dense]


def measured(block: Block, dense: Data, now: Data) -> tuple[Drift, Statistics]:
    def run(data: Data) -> Iterator[None]:
        for args in data:
            block(*args)
            yield

    weights = {"w": (SITE, block.linear.weight)}
    drift = Drift(weights, lambda: run(dense), lambda: run(now))
    as_summed = patch.object(Statistics, "shrink", lambda self: 0.0)
    with torch.no_grad(), as_summed:
        found = collect(weights, drift.run, before=drift.before)
    return drift, found["w"]


@pytest.mark.parametrize("how", ["r + y", "y + r", "r += y", "r.add_(y)"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_shift_is_the_least_squares_answer(how: str, share: float) -> None:
    """Against `lstsq` in float64 over all rows; nothing but the compressed rows is in Σxᵀx."""
    block = Block(how)
    dense, now = two_models()
    drift, statistics = measured(block, dense, now)
    weight = block.linear.weight.detach()
    assert statistics.rows == 3 * ROWS
    assert statistics.second is not None
    found = drift.shift("w", weight, statistics.second, share, 1e-9)
    assert found is not None
    rows = [
        torch.cat([pair[i][0] for pair in data]).double() for data in (dense, now) for i in (0, 1)
    ]
    then, r_then, x, r = rows
    off = (then - x) @ weight.double().T + r_then - r
    wanted = torch.linalg.lstsq(x, x @ weight.double().T + share * off).solution.T
    # float32 sums of 120 products, solved with a condition of about 1.
    torch.testing.assert_close(found[0].double(), wanted, rtol=0, atol=1e-4)
    power = (x @ weight.double().T).norm()
    assert found[1] == pytest.approx(float(off.norm() / power), rel=1e-4)
    left = (x @ (wanted - weight).T - off).norm() / power
    assert found[2] == pytest.approx(float(left), rel=1e-4)
    assert found[2] < found[1]


def test_factors_folded_between_keep_the_answer() -> None:
    """x/s with W·diag(s): the same outputs, so the shifted weight is W'·diag(s)."""
    block, (dense, now) = Block("r + y"), two_models()
    drift, statistics = measured(block, dense, now)
    assert statistics.second is not None
    weight, scales = block.linear.weight.detach(), torch.rand(K) + 0.5
    plain = drift.shift("w", weight, statistics.second, 0.5, 1e-9)
    drift.rescale("w", scales)
    moments = statistics.second / scales[:, None] / scales
    scaled = drift.shift("w", weight * scales, moments, 0.5, 1e-9)
    assert plain is not None
    assert scaled is not None
    torch.testing.assert_close(scaled[0] / scales, plain[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["other rows", "tokens of an expert", "twice"])
def test_rows_that_do_not_correspond_are_left_alone(case: str) -> None:
    block, (dense, now) = Block("r + y"), two_models()
    if case == "other rows":
        now = [(x[:, 1:], r[:, 1:]) for x, r in now]
    elif case == "tokens of an expert":
        dense, now = ([(x[0], r[0]) for x, r in data] for data in (dense, now))
    else:
        once = block.forward
        twice: Any = lambda x, residual: once(x, residual) + once(x, residual)
        block.forward = twice  # type: ignore[method-assign]
    drift, statistics = measured(block, dense, now)
    assert statistics.second is not None
    assert drift.shift("w", block.linear.weight.detach(), statistics.second, 0.5, 0.01) is None


def test_steps_are_shown_and_can_be_left_out() -> None:
    model, _ = compressed(format="bitmap@50%+int4g16")
    steps = [s["name"] for line in sparsefx.explain(model).lines for s in line.row.steps]
    assert "follow" in steps
    model, _ = compressed(format="bitmap@50%+int4g16", follow=0.0)
    steps = [s["name"] for line in sparsefx.explain(model).lines for s in line.row.steps]
    assert steps
    assert "follow" not in steps
