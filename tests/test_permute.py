"""Co-permutation: the network computes the same, and a selection becomes one dense block."""

from __future__ import annotations

import pytest
import torch
from coupled_models import FROM_ZOO, OWN, TIMM, assert_equal, couplings_of, make, run, twin
from torch import nn

from sparsefx.ir.errors import PassError, SpecError
from sparsefx.passes.coupled import couple
from sparsefx.passes.permute import bring_to_front, permute

ROUNDS_TO_FLOAT32 = ("llama", "phi3")


@pytest.mark.parametrize("name", [*OWN, *FROM_ZOO, TIMM])
def test_output_stays(name: str) -> None:
    model, inputs = make(name)
    couplings = couplings_of(name)
    want = run(model, inputs)
    free = [g for g in couplings.groups if not g.fixed]
    assert free
    torch.manual_seed(1)
    for group in free:
        before = twin(model).state_dict()
        order = torch.randperm(group.size).roll(1).tolist()
        order = order if order != sorted(order) else order[::-1]
        permute(model, couplings, group, order)
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert moved, "nothing moved: the check is empty"
    eps = 2.0**-23 if name in ROUNDS_TO_FLOAT32 else 2.0**-52
    assert_equal(run(model, inputs), want, eps)


def test_bitwise_where_sums_are_exact() -> None:
    """Small integers in float64: every sum is exact, so its order cannot show."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-9, 9, p.shape))
    x = torch.randint(-9, 9, (5, 8)).double()
    couplings = couple(model, x)
    want = run(model, x)
    permute(model, couplings, couplings.group("0"), torch.randperm(16).tolist())
    assert torch.equal(run(model, x)[0], want[0])


def test_selected_heads_become_one_block() -> None:
    model, _ = make("bert")
    couplings = couplings_of("bert")
    group = couplings.group("bert.encoder.layer.0.attention.self.query")
    old = {m.name: model.get_parameter(m.name).detach().clone() for m in group.members}
    bring_to_front(model, couplings, group, [3, 1])
    for name in ("query.weight", "value.bias"):
        key = f"bert.encoder.layer.0.attention.self.{name}"
        new = model.get_parameter(key)
        assert torch.equal(new[:16], old[key][48:64])
        assert torch.equal(new[16:32], old[key][16:32])
    key = "bert.encoder.layer.0.attention.output.dense.weight"
    assert torch.equal(model.get_parameter(key)[:, :16], old[key][:, 48:64])


def test_units_laid_out_differently_may_not_move() -> None:
    """A coupling of the first two elements, crossed by hand: no rule makes such a thing."""
    model, x = make("gated")
    couplings = couple(model, x)
    before = twin(model).state_dict()
    crossed = couplings.atoms.links[0]
    crossed.left_at[:2] = crossed.left_at[1::-1]
    with pytest.raises(PassError, match="lie differently"):
        permute(model, couplings, couplings.group("both"), [2, 1, 0, *range(3, 12)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_refusals_change_nothing() -> None:
    model, _ = make("mlp")
    couplings = couplings_of("mlp")
    before = twin(model).state_dict()
    with pytest.raises(SpecError, match="no order of 16"):
        permute(model, couplings, couplings.group("0"), [0] * 16)
    with pytest.raises(PassError, match="model output"):
        permute(model, couplings, couplings.group("4"), [1, 0, 2, 3])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
