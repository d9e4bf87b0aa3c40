"""What outputs are compared by: divergence of distributions for logits, squared error otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsefx.ir.errors import WeightError
from sparsefx.passes.distance import Distance, counted
from sparsefx.passes.distill import LIKELIEST, record


class Head(nn.Module):
    """Answers its input, as `logits` or as it is."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        return {"hidden": x[..., :0], "logits": x} if self.named else x


def divergence(dense: Tensor, found: Tensor) -> float:
    """Σ p log(p / q), a mean over positions, in fp64."""
    p, q = (t.double().softmax(-1) for t in (dense, found))
    return float((p * (p / q).log()).sum(-1).mean())


def recovery_distance(dense: Tensor, found: Tensor, named: bool = True) -> float:
    [output] = record(Head(named), [dense])
    return float(output.distance(Head(named)(found)))


@pytest.mark.parametrize("classes", [2, 3, 25, LIKELIEST - 1, LIKELIEST])
def test_recovery_of_logits_goes_by_their_whole_divergence(classes: int) -> None:
    dense, found = torch.randn(2, 4, 7, classes, generator=torch.Generator().manual_seed(classes))
    want = divergence(dense, found)
    assert recovery_distance(dense, found) == pytest.approx(want, rel=2e-3)
    assert recovery_distance(dense, found + 5) == pytest.approx(want, rel=2e-3)  # same distribution
    assert recovery_distance(dense, dense) == pytest.approx(0, abs=1e-3)


def test_tokens_beyond_the_likeliest_count_as_one() -> None:
    dense, found = 3 * torch.randn(2, 4, 500, generator=torch.Generator().manual_seed(0))
    best = dense.topk(LIKELIEST).indices

    def lumped(t: Tensor) -> Tensor:
        p = t.double().softmax(-1).gather(-1, best)
        return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log()

    want = divergence(lumped(dense), lumped(found))
    assert recovery_distance(dense, found) == pytest.approx(want, rel=2e-3)
    assert want < divergence(dense, found)


@pytest.mark.parametrize(("named", "classes"), [(True, 1), (False, 1), (False, 25)])
def test_other_outputs_go_by_their_squared_error(named: bool, classes: int) -> None:
    """One logit too: a softmax over it is 1 whatever it says."""
    dense = torch.randn(5, classes, generator=torch.Generator().manual_seed(1))
    assert recovery_distance(dense, 1.5 * dense, named) == pytest.approx(0.25, rel=1e-5)
    total, weight = Distance().between(Head(named)(1.5 * dense), Head(named)(dense), dense)
    assert total / weight == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    "outputs",
    [
        {"ids": torch.zeros(2, dtype=torch.int64), "logits": torch.ones(2, 3)},
        SimpleNamespace(hidden=torch.zeros(2, 3), logits=torch.ones(2, 3)),
        (torch.zeros(2, dtype=torch.int64), [torch.ones(2, 3), torch.zeros(4)]),
    ],
)
def test_what_counts(outputs: Any) -> None:
    y, logits = counted(outputs)
    assert torch.equal(y, torch.ones(2, 3))
    assert logits == (not isinstance(outputs, tuple))


@pytest.mark.parametrize("outputs", [None, (), torch.arange(3), {"logits": torch.tensor(1.0)}])
def test_outputs_without_float_rows_are_refused(outputs: Any) -> None:
    with pytest.raises(WeightError, match=r"no float rows.*give loss="):
        counted(outputs)
