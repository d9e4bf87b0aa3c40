"""Pruning criteria against brute force and explicit formulas, with every layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import NM, Bitmap, Tile
from sparsefx.passes.criteria import CRITERIA
from sparsefx.passes.criteria.base import DAMPING
from sparsefx.passes.criteria.random import site_seed
from sparsefx.passes.gradients import Gradients
from sparsefx.passes.statistics import Statistics, energy

EPS = torch.finfo(torch.float32).eps
LAYOUTS = [
    "2:4",
    "1:8",
    "tile16x1@50%",
    "tile4x4@25%",
    "tile1x16@50%",
    "bitmap@50%",
    "bitmap@37.3%",
]


def rows(count: int, k: int, seed: int = 0) -> Tensor:
    """Correlated inputs of uneven size and mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator) / k**0.5
    size = torch.rand(k, generator=generator) + 0.3
    inputs: Tensor = size * (torch.randn(count, k, generator=generator) @ mix + 0.5)
    return inputs


def measured(x: Tensor) -> Statistics:
    statistics = Statistics(x.shape[1], x.device)
    statistics.add(x)
    return statistics


def known(n: int, k: int, samples: int = 6, seed: int = 3) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    gradients = Gradients(n, k, torch.device("cpu"), samples)
    for _ in range(samples):
        gradients.add(torch.randn(n, k, generator=generator))
    return gradients


def scores(name: str, weight: Tensor, x: Tensor | None = None, seed: int = 0) -> Tensor:
    x = rows(64, weight.shape[1]) if x is None else x
    return CRITERIA[name].score(weight, measured(x), known(*weight.shape), seed)


# --- every criterion with every layout -----------------------------------------------------------


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize(("n", "k"), [(48, 64), (33, 40), (5, 8), (1, 16)])
def test_every_criterion_with_every_layout(name: str, text: str, n: int, k: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    got = scores(name, weight)
    assert got.shape == (n, k)
    assert got.dtype == torch.float32
    assert bool(got.isfinite().all())
    assert bool((got >= 0).all())
    fmt = Format.parse(text)
    mask = fmt.layout.select(got)
    assert fmt.layout.violation(mask) is None
    assert torch.equal(fmt.pack(weight, mask).unpack(), torch.where(mask, weight, 0))
    assert torch.equal(got, scores(name, weight))


@pytest.mark.parametrize("name", [c.name for c in CRITERIA.values() if c.needs])
def test_missing_data_names_the_criterion_and_a_way_out(name: str) -> None:
    with pytest.raises(WeightError, match=f"'{name}' needs.*use '"):
        CRITERIA[name].score(torch.ones(4, 8), None, None, 0)


def best_mask(weight: Tensor, statistics: Statistics, keep: int) -> Tensor:
    """The (1, K) mask of `keep` positions of least output error, by trying all of them."""

    def error(kept: tuple[int, ...]) -> float:
        lost = weight.clone()
        lost[0, list(kept)] = 0
        return energy(lost, statistics.second)

    best = min(itertools.combinations(range(weight.shape[1]), keep), key=error)
    return torch.zeros_like(weight, dtype=torch.bool).index_fill_(1, torch.tensor(best), True)


@pytest.mark.parametrize(("name", "even"), [("magnitude", True), ("wanda_layer", False)])
def test_the_best_mask_where_theory_says_so(name: str, even: bool) -> None:
    """Magnitude is best for inputs of one size, Wanda for any, as long as they are orthogonal."""
    x = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(1)))[0]
    if not even:
        x = x * torch.linspace(0.2, 3, 8)
    weight = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    mask = Bitmap(share=0.5).select(scores(name, weight, x))
    assert torch.equal(mask, best_mask(weight, measured(x), 4))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_wanda_compares_within_rows(share: float) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(4))
    weight *= torch.linspace(0.1, 10, 24)[:, None]  # across the matrix, whole rows would go
    x = rows(64, 64)
    mask = Bitmap(share=share).select(scores("wanda", weight, x))
    raw = weight.abs() * x.norm(dim=0)
    kept = raw.topk(round(64 * (1 - share)), dim=1).indices
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(1, kept, True))
    runs = NM(2, 4).select(scores("wanda", weight, x))
    assert torch.equal(runs, NM(2, 4).select(raw))
    layer = Bitmap(share=share).select(scores("wanda_layer", weight, x))
    assert torch.equal(layer, Bitmap(share=share).select(raw))
    assert not torch.equal(layer, mask)


def test_wanda_keeps_the_scale_for_tiles() -> None:
    """Rows of equal scores in another order: the ladder is those scores, so tiles see them."""
    values = torch.rand(32, generator=torch.Generator().manual_seed(5))
    weight = torch.stack([values.roll(i) for i in range(32)])
    x = torch.eye(32)
    assert_close(scores("wanda", weight, x), weight, rtol=2 * EPS, atol=0)
    tile = Tile(4, 4, 0.5)
    assert torch.equal(tile.select(scores("wanda", weight, x)), tile.select(weight))


def test_obs_is_the_error_of_removing_one_weight_and_refitting_the_others() -> None:
    n, k = 3, 8
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(6))
    x = rows(64, k)
    hessian = (x.T @ x).double()
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(k)
    want = torch.empty(n, k, dtype=torch.float64)
    for j in range(k):
        rest = [i for i in range(k) if i != j]
        # Removing w_j shifts the others by d: minimise (−w_j, d)·H·(−w_j, d)ᵀ
        shift = torch.linalg.solve(hessian[rest][:, rest], hessian[rest, j])
        left = hessian[j, j] - hessian[j, rest] @ shift
        want[:, j] = weight[:, j].double().square() * left
    # Three factorisations of backward error ≤ 2·K·eps each, amplified by the condition number
    tolerance = 6 * k * EPS * float(torch.linalg.cond(hessian))
    got = scores("obs", weight, x).double()
    assert_close(got, want, rtol=tolerance, atol=0)


def test_obs_drops_what_reads_dead_inputs() -> None:
    x = rows(64, 8)
    x[:, 3] = 0
    got = scores("obs", torch.full((2, 8), 5.0), x)
    assert bool((got[:, 3] == 0).all())
    assert int((got == 0).sum()) == 2


def test_gradient_criteria_are_their_formulas() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))
    samples = known(3, 5).samples.double()
    assert_close(
        scores("taylor", weight).double(), (weight * samples.mean(0)).abs(), rtol=1e-5, atol=1e-6
    )
    assert_close(
        scores("fisher", weight).double(), weight**2 * (samples**2).mean(0), rtol=1e-5, atol=0
    )


def test_random_is_a_function_of_seed_and_site() -> None:
    weight = torch.ones(16, 16)
    first = scores("random", weight, seed=site_seed(0, "a"))
    assert torch.equal(first, scores("random", weight, seed=site_seed(0, "a")))
    assert not torch.equal(first, scores("random", weight, seed=site_seed(0, "b")))
    assert not torch.equal(first, scores("random", weight, seed=site_seed(1, "a")))
    # No process-dependent hash: a number that must never change
    assert site_seed(0, "a") == 21922275445374123
