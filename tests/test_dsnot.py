"""DSnoT: the pattern stays, errors never grow, and every swap is that of a plain loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import NM, Bitmap, Dense, Tile
from sparsefx.passes import dsnot as module
from sparsefx.passes.dsnot import dsnot
from sparsefx.passes.refit import row_energies
from sparsefx.passes.statistics import Statistics, energy

LAYOUTS = ["2:4", "1:8", "bitmap@50%", "bitmap@80%", "tile16x1@50%", "tile4x4@25%", "tile1x8@50%"]


def rows(count: int, k: int, seed: int = 0) -> Tensor:
    """Inputs whose means matter, of uneven size and variance."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(k, generator=generator) + 0.3
    return torch.randn(count, k, generator=generator) * size + torch.randn(k, generator=generator)


def measured(x: Tensor) -> Statistics:
    statistics = Statistics(x.shape[1], x.device)
    statistics.add(x)
    return statistics


def case(n: int, k: int, layout: str, seed: int = 0) -> tuple[Tensor, Tensor, Statistics]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed + 50))
    return weight, Format.parse(layout).layout.select(weight.abs()), measured(rows(96, k, seed))


def lost(weight: Tensor, mask: Tensor, statistics: Statistics) -> float:
    return energy(torch.where(mask, 0, weight), statistics.second)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), [(48, 64), (33, 40), (5, 8), (1, 16)])
def test_same_pattern_less_error(n: int, k: int, text: str, seed: int) -> None:
    layout = Format.parse(text).layout
    weight, mask, statistics = case(n, k, text, seed)
    before = mask.clone()
    got = dsnot(weight, mask, statistics, layout)
    assert torch.equal(mask, before)
    assert layout.violation(got) is None
    stored = layout.mask(layout.index(got), n, k)
    assert stored is not None
    assert torch.equal(stored, got)  # whole tiles, full runs
    if isinstance(layout, NM):
        runs = (n, k // layout.m, layout.m)
        assert torch.equal(got.view(runs).sum(2), mask.view(runs).sum(2))
    elif isinstance(layout, Bitmap):
        assert torch.equal(got.sum(1), mask.sum(1))
    elif isinstance(layout, Tile):
        cells = [layout._sums(m.float()) > 0 for m in (got, mask)]
        assert torch.equal(cells[0].sum(1), cells[1].sum(1))
    assert lost(weight, got, statistics) <= lost(weight, mask, statistics)
    assert torch.equal(got, dsnot(weight, mask, statistics, layout))


@pytest.mark.parametrize("text", ["bitmap@50%", "2:4", "tile8x1@50%", "tile2x2@50%"])
def test_it_really_moves_something(text: str) -> None:
    layout = Format.parse(text).layout
    weight, mask, statistics = case(64, 64, text)
    got = dsnot(weight, mask, statistics, layout)
    assert lost(weight, got, statistics) < 0.95 * lost(weight, mask, statistics)


def by_loop(weight: Tensor, mask: Tensor, x: Tensor, run: int, cycles: int, least: float) -> Tensor:
    """The paper's loop for one row in float64: the best mask met on the way."""
    w, x = weight.double(), x.double()
    mean, variance, norms = x.mean(0), x.var(0, unbiased=False), x.norm(dim=0)
    now, best = mask.clone(), mask.clone()

    def squared(m: Tensor) -> float:
        return float((x @ torch.where(m, 0, w)).square().sum())

    for _ in range(cycles):
        error = float((w * mean)[~now].sum())
        if abs(error) <= least * float((x @ w).square().mean().sqrt()):
            break
        gain = [(1 if error > 0 else -1) * float(w[j] * mean[j]) for j in range(len(w))]
        drops = [j for j in range(len(w)) if now[j] and gain[j] < 0]
        runs = {j // run for j in drops}
        grows = [j for j in range(len(w)) if not now[j] and gain[j] > 0 and j // run in runs]
        if not grows:
            break
        grow = max(grows, key=lambda j: gain[j] / float(variance[j]))
        drop = min(
            (j for j in drops if j // run == grow // run),
            key=lambda j: float(w[j].abs() * norms[j]),
        )
        after = error - float(w[grow] * mean[grow]) + float(w[drop] * mean[drop])
        if abs(after) >= abs(error):
            break
        now[grow], now[drop] = True, False
        if squared(now) < squared(best):
            best = now.clone()
    return best


@pytest.mark.parametrize(("text", "run"), [("bitmap@50%", 32), ("2:4", 4), ("4:16", 16)])
@pytest.mark.parametrize(("cycles", "threshold"), [(1, 0.0), (50, 0.01), (50, 0.2)])
def test_every_row_is_that_of_a_plain_loop(
    text: str, run: int, cycles: int, threshold: float
) -> None:
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(8))
    x, layout = rows(96, 32), Format.parse(text).layout
    mask = layout.select(weight.abs())
    got = dsnot(weight, mask, measured(x), layout, cycles, threshold)
    want = [by_loop(w, m, x, run, cycles, threshold) for w, m in zip(weight, mask, strict=True)]
    assert torch.equal(got, torch.stack(want))
    assert not torch.equal(got, mask)


def test_a_tile_of_one_row_is_its_row() -> None:
    """Tiles of one weight, spelt as tiles, move as the bitmap does."""
    weight, mask, statistics = case(24, 32, "bitmap@50%")
    tile = Tile(1, 1, 0.5)
    want = dsnot(weight, mask, statistics, Bitmap())
    assert torch.equal(dsnot(weight, mask, statistics, tile), want)


def test_never_below_the_best_of_all_masks() -> None:
    weight, mask, statistics = case(3, 8, "bitmap@50%", seed=4)
    got = dsnot(weight, mask, statistics, Bitmap())
    for i in range(3):
        keep = int(mask[i].sum())
        masks = [
            torch.zeros(1, 8, dtype=torch.bool).index_fill_(1, torch.tensor(kept), True)
            for kept in itertools.combinations(range(8), keep)
        ]
        row = weight[i : i + 1]
        best, mine, old = (
            min(lost(row, m, statistics) for m in group)
            for group in (masks, [got[i : i + 1]], [mask[i : i + 1]])
        )
        assert best - 1e-6 * old <= mine <= old


def test_rows_that_would_get_worse_keep_their_mask() -> None:
    """Means say swap, the errors say no: large variances come back in, small ones go."""
    x = rows(400, 16)
    x = (x - x.mean(0)) / x.std(0)
    x[:, 8:] = x[:, 8:] * 3
    x += 0.05 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    statistics = measured(x)
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    mask = Bitmap().select(weight.abs() * statistics.norms)
    got = dsnot(weight, mask, statistics, Bitmap(), threshold=0.0)
    assert statistics.second is not None
    old, new = (row_energies(torch.where(m, 0, weight), statistics.second) for m in (mask, got))
    changed = (got != mask).any(1)
    assert 0 < int(changed.sum()) < 64
    assert bool((new[changed] < old[changed]).all())


def test_few_rows_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("bitmap@50%", "2:4", "tile4x4@50%"):
        weight, mask, statistics = case(33, 40, text)
        layout = Format.parse(text).layout
        whole = dsnot(weight, mask, statistics, layout)
        with monkeypatch.context() as patch:
            patch.setattr(module, "BUDGET", 1)
            assert torch.equal(dsnot(weight, mask, statistics, layout), whole)


def test_the_order_of_batches_does_not_matter() -> None:
    weight, mask, _ = case(32, 40, "bitmap@50%")
    x = rows(96, 40)
    there, back = Statistics(40, x.device), Statistics(40, x.device)
    for part in torch.split(x, 8):
        there.add(part)
    for part in reversed(torch.split(x, 8)):
        back.add(part)
    a, b = (lost(weight, dsnot(weight, mask, s, Bitmap()), there) for s in (there, back))
    # A tie may fall the other way, so masks may differ: their errors may not
    assert a == pytest.approx(b, rel=1e-2)


def test_nothing_to_do_and_bad_masks() -> None:
    weight, mask, statistics = case(16, 16, "tile4x4@50%")
    layout = Tile(4, 4, 0.5)
    assert torch.equal(dsnot(weight, mask, statistics, layout, cycles=0), mask)
    everything = torch.ones_like(mask)
    assert torch.equal(dsnot(weight, everything, statistics, Dense()), everything)
    assert torch.equal(dsnot(weight, everything, statistics, layout), everything)
    assert not bool(dsnot(weight, ~everything, statistics, layout).any())
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(WeightError, match="part of a tile"):
        dsnot(weight, mask, statistics, layout)
    with pytest.raises(WeightError, match=r"not 2:4: row 0"):
        dsnot(weight, everything, statistics, NM(2, 4))
    with pytest.raises(WeightError, match="second moments"):
        dsnot(weight, mask, Statistics(16, weight.device, moments=False), Bitmap())


@pytest.mark.parametrize("text", ["bitmap@50%", "tile4x4@50%"])
def test_a_mask_found_worse_when_computed_anew_is_undone(text: str) -> None:
    layout = Format.parse(text).layout
    weight, mask, statistics = case(16, 32, text)
    shape = module._shape(layout, 32)
    assert shape is not None
    assert statistics.second is not None
    nothing = torch.zeros_like(mask)
    old, new = (
        row_energies(torch.where(m, 0, weight), statistics.second).view(-1, shape.rows).sum(1)
        for m in (mask, nothing)
    )
    worse = (new >= old).repeat_interleave(shape.rows)
    assert bool(worse.any())
    got = module._Search(weight, mask, statistics, shape)._not_above(nothing)
    assert torch.equal(got, torch.where(worse[:, None], mask, nothing))
