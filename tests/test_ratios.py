"""Layer-wise ratios: the share of all is met, and each follows its rule."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.ir.errors import SpecError, WeightError
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import NM, Bitmap, Dense, Layout, Tile
from sparsefx.passes.ratios import MOST, RATIOS, Need, with_share
from sparsefx.passes.ratios.outlier import REACH, TIMES
from sparsefx.passes.ratios.sensitivity import PROBES, lower_hull
from sparsefx.passes.statistics import Statistics, output_error

NUMBERS = {"outlier": 1, "sensitivity": len(PROBES)}


def drawn(name: str, seed: int) -> list[Need]:
    """Sites of any size with numbers as the ratio measures them."""
    generator = torch.Generator().manual_seed(seed)

    def sizes() -> list[int]:
        return torch.randint(1, 4000, (2,), generator=generator).tolist()

    count = int(torch.randint(1, 9, (), generator=generator))
    needs = []
    for i in range(count):
        numbers = torch.rand(NUMBERS.get(name, 0), generator=generator).cumsum(0)
        n, k = sizes()
        needs.append(Need(f"layer{i}", n, k, tuple(numbers.tolist())))
    return needs


def mean(sites: list[Need], shares: list[float]) -> float:
    total = sum(s.n * s.k for s in sites)
    return sum(s.n * s.k * x for s, x in zip(sites, shares, strict=True)) / total


@settings(max_examples=60, deadline=None)
@example("sensitivity", 303, 0.01)  # what was left to spend fell below 0 by rounding
@given(
    name=st.sampled_from(list(RATIOS)),
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.62, 0.9, MOST]),
)
def test_the_share_of_all_is_met_within_bounds(name: str, seed: int, share: float) -> None:
    sites = drawn(name, seed)
    shares = RATIOS[name].shares(sites, share)
    assert len(shares) == len(sites)
    assert all(0 <= x <= MOST for x in shares)
    # Bisection ends at neighbouring doubles; the sums have as many roundings as Sites
    assert mean(sites, shares) == pytest.approx(share, abs=1e-12)
    backwards = RATIOS[name].shares(sites[::-1], share)
    assert backwards[::-1] == pytest.approx(shares, abs=1e-9)


@pytest.mark.parametrize("name", RATIOS)
def test_impossible_shares_are_refused(name: str) -> None:
    for share in (-0.1, 0.96, 1.0):
        with pytest.raises(SpecError, match=r"from 0 to 0\.95"):
            RATIOS[name].shares([Need("a", 4, 4)], share)
    with pytest.raises(SpecError, match="empty: a weight of shape"):
        RATIOS[name].shares([Need("empty", 0, 4)], 0.5)
    assert RATIOS[name].shares([], 0.5) == []


@pytest.mark.parametrize("name", NUMBERS)
def test_unmeasured_sites_are_named(name: str) -> None:
    with pytest.raises(SpecError, match=f"bare: ratio '{name}' was not measured"):
        RATIOS[name].shares([Need("bare", 4, 4)], 0.5)
    if name == "outlier":
        with pytest.raises(WeightError, match="needs calibration"):
            RATIOS[name].measure(torch.ones(4, 4), None, Bitmap(), torch.ones(4, 4))


def test_uniform_is_uniform() -> None:
    assert RATIOS["uniform"].shares([Need("a", 4, 4), Need("b", 400, 4)], 0.37) == [0.37, 0.37]


def test_erk_keeps_in_proportion() -> None:
    sites = [Need("wide", 64, 4096), Need("square", 512, 512), Need("other", 300, 800)]
    keep = [1 - x for x in RATIOS["erk"].shares(sites, 0.7)]
    raw = [(s.n + s.k) / (s.n * s.k) for s in sites]
    assert [a / b for a, b in zip(keep, raw, strict=True)] == pytest.approx([keep[0] / raw[0]] * 3)
    narrow = [*sites, Need("narrow", 2, 2)]
    assert RATIOS["erk"].shares(narrow, 0.7)[3] == 0.0  # more than all of it: dense


def test_outliers_are_counted_as_in_the_paper_and_keep_more() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 16), torch.randn(50, 16)
    weight[0, :4] *= 40
    statistics = Statistics(16, torch.device("cpu"))
    statistics.add(x)
    metric = weight.abs() * x.norm(dim=0)
    want = float((metric > TIMES * metric.mean()).double().mean())
    assert 0 < want < 0.05
    got = RATIOS["outlier"].measure(weight, statistics, Bitmap(), torch.ones(32, 16))
    assert got == pytest.approx((want,))
    sites = [
        Need("none", 64, 64, (0.0,)),
        Need("some", 64, 64, (0.02,)),
        Need("b", 64, 64, (0.05,)),
    ]
    shares = RATIOS["outlier"].shares(sites, 0.7)
    assert shares == sorted(shares, reverse=True)
    assert max(shares) <= 0.7 + REACH + 1e-12
    assert min(shares) >= 0.7 - REACH - 1e-12
    # Inside the bounds the rule is a straight line: 2·REACH from the fewest to the most outliers
    middle = [Need("a", 9, 9, (0.0,)), Need("b", 9, 9, (0.5,)), Need("c", 9, 9, (1.0,))]
    assert RATIOS["outlier"].shares(middle, 0.5) == pytest.approx([0.58, 0.5, 0.42])
    alike = [Need("a", 9, 9, (0.1,)), Need("b", 30, 9, (0.1,))]
    assert RATIOS["outlier"].shares(alike, 0.5) == pytest.approx([0.5, 0.5])


# --- sensitivity ---------------------------------------------------------------------------------


def along(points: list[tuple[float, float]], x: float) -> float:
    """The broken line through `points` at x."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1 + 1e-12:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise AssertionError(x)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_sensitivity_is_the_best_of_a_fine_grid(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(40, 10), (20, 40), (30, 20)]
    steep = torch.rand(3, generator=generator) * 4 + 0.05
    bumps = torch.rand(3, len(PROBES), generator=generator) * 0.1
    sites = [
        Need(
            str(i), n, k, tuple(float(steep[i] * p * p + bumps[i, j]) for j, p in enumerate(PROBES))
        )
        for i, (n, k) in enumerate(sizes)
    ]
    lines = [lower_hull([(0.0, 0.0), *zip(PROBES, s.numbers, strict=True)]) for s in sites]
    found = RATIOS["sensitivity"].shares(sites, share)
    cost = sum(along(line, x) for line, x in zip(lines, found, strict=True))
    total, best = share * 1800, float("inf")
    for a, b in itertools.product(torch.linspace(0, MOST, 96).tolist(), repeat=2):
        c = (total - 400 * a - 800 * b) / 600
        if 0 <= c <= MOST:
            best = min(best, sum(along(line, x) for line, x in zip(lines, (a, b, c), strict=True)))
    assert cost <= best + 1e-9
    assert mean(sites, found) == pytest.approx(share, abs=1e-12)


def test_the_hull_is_below_all_points_and_convex() -> None:
    points = [(0.0, 0.0), (0.2, 0.5), (0.4, 0.3), (0.6, 0.31), (0.8, 2.0), (0.95, 2.0)]
    hull = lower_hull(points)
    assert hull == [(0.0, 0.0), (0.6, 0.31), (0.95, 2.0)]
    assert all(along(hull, x) <= y + 1e-12 for x, y in points)


@pytest.mark.parametrize("layout", [Bitmap(), Tile(4, 2, 0.5)])
def test_probes_are_measured_with_the_layout_and_its_scores(layout: Layout) -> None:
    torch.manual_seed(1)
    weight, scores = torch.randn(10, 12), torch.rand(10, 12)
    statistics = Statistics(12, torch.device("cpu"))
    statistics.add(torch.randn(40, 12))
    got = RATIOS["sensitivity"].measure(weight, statistics, layout, scores)
    for share, error in zip(PROBES, got, strict=True):
        kept = weight * with_share(layout, share).select(scores)
        assert error == pytest.approx(output_error(weight, kept, statistics) ** 2)
    with pytest.raises(SpecError, match="2:4"):
        RATIOS["sensitivity"].measure(weight, statistics, NM(2, 4), scores)


# --- shares of layouts ---------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    layout=st.sampled_from([Bitmap(), Tile(16, 1, 0.5), Tile(4, 4, 0.25)]),
    share=st.floats(0, MOST),
)
def test_a_layout_with_a_share_of_its_own_still_spells_itself(layout: Tile, share: float) -> None:
    got = with_share(layout, share)
    assert Format.parse(str(got)).layout == got
    if isinstance(got, Dense):
        assert share < 1e-6
    else:
        assert isinstance(got, type(layout))
        assert (got.rows, got.cols) == (layout.rows, layout.cols)
        assert abs(got.share - share) <= 5.1e-7  # half of the last place shown


@pytest.mark.parametrize("layout", [NM(2, 4), Dense()])
def test_a_layout_without_a_share_is_refused(layout: Layout) -> None:
    with pytest.raises(SpecError, match=f"'{layout}' keeps the same share everywhere.*bitmap"):
        with_share(layout, 0.5)


def test_shares_are_met_by_masks() -> None:
    """From shares to masks: all weights together lose the share, to a weight a Site."""
    torch.manual_seed(2)
    sites = [Need("a", 48, 64), Need("b", 16, 200), Need("c", 100, 30)]
    kept, total = 0, 0
    for site, share in zip(sites, RATIOS["erk"].shares(sites, 0.6), strict=True):
        scores: Tensor = torch.rand(site.n, site.k)
        kept += int(with_share(Bitmap(), share).select(scores).sum())
        total += site.n * site.k
    assert 0 <= kept - 0.4 * total <= len(sites) + 1e-6 * total
