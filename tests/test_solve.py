"""The solver against all choices of small random problems, and what it promises beyond them."""

from __future__ import annotations

import ctypes
import itertools
import random
from typing import Any

import pytest

from sparsefx.passes.solve import Infeasible, Item, Solution, solve, undominated


def problem(seed: int) -> list[list[Item]]:
    """Up to 6 Sites of up to 5 candidates; the first is dense: value 0 at the greatest cost."""
    draw = random.Random(seed)
    groups = []
    for _ in range(draw.randint(1, 6)):
        dense = draw.uniform(1, 100)
        items = [Item("dense", 0.0, dense)]
        for name in range(draw.randint(0, 4)):
            items.append(Item(f"f{name}", 10 ** draw.uniform(-6, 1), dense * draw.random()))
        groups.append(items)
    return groups


def all_choices(groups: list[list[Item]], budget: float) -> float | None:
    """Least value by trying everything."""
    best = None
    for choice in itertools.product(*groups):
        if sum(item.cost for item in choice) <= budget:
            value = sum(item.value for item in choice)
            best = value if best is None else min(best, value)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_against_all_choices(seed: int) -> None:
    groups = problem(seed)
    dense = sum(group[0].cost for group in groups)
    for share in (0.2, 0.5, 0.8, 1.0):
        want = all_choices(groups, share * dense)
        if want is None:
            with pytest.raises(Infeasible) as error:
                solve(groups, share * dense)
            assert error.value.least == pytest.approx(
                sum(min(i.cost for i in g) for g in groups), rel=1e-12
            )
            assert error.value.least > share * dense
            continue
        found = solve(groups, share * dense)
        assert found.cost <= share * dense
        picked = [groups[g][i] for g, i in enumerate(found.chosen)]
        assert found.value == sum(item.value for item in picked)
        # HiGHS proves bounds to 1e-6 of the objective, here scaled to the sum of all values.
        scale = sum(item.value for group in groups for item in group) / len(groups)
        assert want <= found.value <= want + 1e-6 * scale
        assert 0 <= found.gap <= 1e-6


def test_dense_is_taken_where_it_fits() -> None:
    for seed in range(10):
        groups = problem(seed)
        found = solve(groups, sum(group[0].cost for group in groups))
        assert found.value == 0.0
        assert found.gap == 0.0


def test_ties_go_to_the_lower_cost_and_then_to_the_name() -> None:
    same = [Item("b", 1.0, 2.0), Item("a", 1.0, 2.0), Item("c", 1.0, 3.0), Item("d", 0.0, 9.0)]
    assert [same[i].name for i in undominated(same)] == ["d", "a"]
    assert solve([same], 2.0) == Solution((1,), 1.0, 2.0, 0.0)


def test_the_same_problem_has_the_same_answer() -> None:
    draw = random.Random(1)
    twins = [[Item("dense", 0.0, 4.0), Item("x", 1.0, 1.0), Item("y", 2.0, 0.5)] for _ in range(30)]
    assert solve(twins, 60.0) == solve(twins, 60.0)
    hard = [[Item("dense", 0.0, 1.0)] + [Item(str(i), draw.random(), draw.random())
            for i in range(20)] for _ in range(60)]  # fmt: skip
    assert solve(hard, 15.0) == solve(hard, 15.0)


def test_a_budget_is_kept_exactly() -> None:
    """A solver's tolerance of 1e-6 of the budget would take both."""
    one, two = ([Item("a", 0.0, 1.0), Item("b", value, 0.5)] for value in (1.0, 2.0))
    groups = [one, two]
    found = solve(groups, 2.0 - 1e-9)
    assert found.chosen == (1, 0)
    assert found.cost == 1.5


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Not even by the solver's own C code, whose output Python does not see; afterwards all is."""
    import scipy.optimize

    real, printf = scipy.optimize.milp, ctypes.CDLL(None).puts

    def chatty(*args: Any, **options: Any) -> Any:
        printf(b"a line that no option turns off")
        return real(*args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", chatty)
    groups = [
        [Item("a", 1.0, 2.0), Item("b", 2.0, 1.0)],
        [Item("a", 1.0, 3.0), Item("b", 3.0, 1.0)],
    ]
    assert solve(groups, 4.0).value == 3.0
    print("heard")
    assert capfd.readouterr().out == "heard\n"
