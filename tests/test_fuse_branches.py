"""Low-rank branches around packed weights: PEFT's LoRA layers, gates, DoRA, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from branch_cases import (  # noqa: F401
    AS_IT_IS,
    RANK,
    K,
    N,
    One,
    Pair,
    adapted,
    close,
    fresh_graphs,
    products,
    through,
)  # fmt: skip
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.capture import placeholder_weights
from sparsefx.ir.errors import StaleWeightError
from sparsefx.ir.op import LINEAR
from sparsefx.ir.sites import Traced
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.dead_ranks import dead_ranks
from sparsefx.passes.fuse_branches import fuse_branches
from sparsefx.passes.manager import run_passes

# --- golden texts ---------------------------------------------------------------------------------


def test_lora_golden() -> None:
    model, x = adapted(One(), ["q"], "default"), torch.randn(3, K)
    got, seen = through(model, x)
    assert short(seen.before[0]) == LORA_BEFORE
    assert short(seen.after[0]) == LORA_AFTER
    assert not seen.notes
    close(got, model(x), x)


def short(listing: str) -> str:
    """The calls of a graph, with the names of modules cut."""
    lines = [line for line in listing.splitlines() if "= placeholder" not in line]
    joined = "\n".join(lines)
    for old, new in (("l_s_modules_q_modules_", ""), ("l_self_modules_q_modules_", ""),
                     ("modules_", ""), ("_parameters_weight_", ""), ("parameters_", ""),
                     ("_buffers_", "_")):  # fmt: skip
        joined = joined.replace(old, new)
    return joined


LORA_BEFORE = """\
%6 : f32[3, 16] = sparsefx.linear(%l_x_, [%base_layer_values_, %base_layer_scales_], \
%base_layer_bias_, [], 'int8', 16)
%7 : f32[3, 32] = dropout(%l_x_, 0.1, False, False)
%8 : f32[3, 4] = linear(%7, %lora_a_default, None)
%9 : f32[3, 16] = linear(%8, %lora_b_default, None)
%10 : f32[3, 16] = mul(%9, 2.0)
%11 : f32[3, 16] = add(%6, %10)
%12 : f32[3, 16] = to(%11, torch.float32)
%13 : f32[3, 16] = relu(%12)
return [%13]"""

LORA_AFTER = """\
%sparsefx_constant_0 = get_attr sparsefx_constant_0
%7 : f32[3, 16] = sparsefx.linear(%l_x_, [%base_layer_values_, %base_layer_scales_], \
%base_layer_bias_, [%lora_a_default, %lora_b_default, %sparsefx_constant_0], 'int8', 16)
%8 : f32[3, 16] = relu(%7)
return [%8]"""


def test_two_adapters_golden() -> None:
    model, x = adapted(One(), ["q"], "default", "b", use_rslora=True), torch.randn(3, K)
    got, seen = through(model, x)
    assert short(seen.after[0]) == TWO_AFTER
    assert products(seen) == {"packed": 1}
    close(got, model(x), x, slack=2)


TWO_AFTER = """\
%8 = cat([%lora_a_default, %lora_a_b], 0)
%9 = cat([%lora_b_default, %lora_b_b], 1)
%sparsefx_constant_2 = get_attr sparsefx_constant_2
%11 : f32[3, 16] = sparsefx.linear(%l_x_, [%base_layer_values_, %base_layer_scales_], \
%base_layer_bias_, [%8, %9, %sparsefx_constant_2], 'int8', 16)
%12 : f32[3, 16] = relu(%11)
return [%12]"""


def _dora(m: Any, x: Tensor) -> Tensor:
    base: Tensor = m.base(x)
    low = m.magnitude * m.b(m.a(x)) * 2.0
    out: Tensor = base + ((m.magnitude - 1) * (base - m.base.bias) + low)
    return out


def test_dora_with_constant_norms_golden() -> None:
    model, x = Pair(_dora).eval(), torch.randn(3, K)
    got, seen = through(model, x)
    assert "norm" not in seen.after[0]
    assert not seen.notes
    assert [line.partition(" = ")[2][:24] for line in seen.after[0].splitlines()[-5:-1]] == [
        "get_attr sparsefx_consta", "sparsefx.linear(%l_x_, [", "mul(%8, %l_self_buffers_"[:24],
        "add(%9, %l_self_modules_"[:24],
    ]  # fmt: skip
    close(got, model(x), x, slack=4)


CACHE = "peft's ENABLE_DORA_CACHING makes constants of them"


def test_dora_of_peft_says_what_it_costs() -> None:
    model, x = adapted(One(), ["q"], "default", use_dora=True), torch.randn(3, K)
    got, seen = through(model, x)
    assert products(seen)["packed"] == 1
    assert seen.notes == [
        "q: DoRA's magnitudes are computed anew at every call (linalg_norm); " + CACHE
    ]
    close(got, model(x), x, slack=4)


# --- ways to write it -----------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda m, x: m.base(x) + m.b(m.a(x)),
    "term first": lambda m, x: 0.5 * m.b(m.a(x)) + m.base(x),
    "difference": lambda m, x: m.base(x) - m.b(m.a(x)) / 4,
    "alpha": lambda m, x: torch.add(m.base(x), m.b(m.a(x)), alpha=3),
    "in place": lambda m, x: m.base(x).add_(m.b(m.a(x)).mul_(2.0)),
    "scale inside": lambda m, x: m.base(x) + m.b(-2 * m.a(x)),
    "scalar tensor": lambda m, x: m.base(x) + m.strength * m.b(m.a(x)),
    "divided by a tensor": lambda m, x: m.base(x) + m.b(m.a(x)) / m.strength,
    "gates": lambda m, x: m.base(x) + m.b(m.a(x) * m.gate) * 2,
    "matrices": lambda m, x: m.base(x) + (x @ m.a.weight.T) @ m.b.weight.t(),
    "functional": lambda m, x: m.base(x) + F.linear(F.linear(x, m.a.weight), m.b.weight),
    "two branches": lambda m, x: m.base(x) + m.b(m.a(x)) + m.strength * m.b(m.a(x) * m.gate),
    "rows regrouped": lambda m, x: m.base(x.view(-1, K)).view(*x.shape[:-1], N) + m.b(m.a(x)) * 2.0,
    "dropout without p": lambda m, x: m.base(x) + m.b(m.a(F.dropout(x, 0.0, True))),
}


@pytest.mark.parametrize("spec", ["int8", "2:4+int4g16+r2"])
@pytest.mark.parametrize("way", list(WAYS))
def test_every_spelling_becomes_one_product(way: str, spec: str) -> None:
    model, x = Pair(WAYS[way], spec).eval().requires_grad_(False), torch.randn(2, 3, K)
    got, seen = through(model, x)
    assert products(seen) == {"packed": 1}, seen.after
    assert not seen.notes
    with torch.no_grad():
        # '+r2' is held in bfloat16 and multiplied in float32 on both sides; sums differ in order.
        close(got, model(x), x, slack=4)


def _changed_between(m: Any, x: Tensor) -> Tensor:
    x = x + 1
    y: Tensor = m.base(x)
    x.mul_(2)
    out: Tensor = y + m.b(m.a(x))
    return out


def _base_read_again(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.base(x)
    out: Tensor = (y + m.b(m.a(x))) * torch.sigmoid(y)
    return out


def _inner_read_again(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    y: Tensor = m.base(x) + m.b(h) + h.sum()
    return y


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "other input": (lambda m, x: m.base(x) + m.b(m.a(x.relu())), "read different inputs"),
    "product read": (_base_read_again, "the product is also read by sigmoid"),
    "inside read": (_inner_read_again, "linear of the branch is also read by sum"),
    "mutation": (_changed_between, "mul_ changes what is read in between"),
    "dropout": (lambda m, x: m.base(x) + m.b(m.a(F.dropout(x, 0.5, True))), "dropout in training"),
    "bias": (lambda m, x: m.base(x) + m.b(F.linear(x, m.a.weight, m.gate)), "A has a bias"),
    "vector": (lambda m, x: m.base(x) + m.magnitude * m.b(m.a(x)), "multiplied by a vector"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_with_a_reason(case: str) -> None:
    join, reason = REFUSED[case]
    model, x = Pair(join).eval(), torch.randn(3, K)
    torch.manual_seed(1)
    got, seen = through(model, x)
    assert products(seen) == {"packed": 1, "dense": 2}
    assert any(reason in note for note in seen.notes), seen.notes
    torch.manual_seed(1)
    with torch.no_grad():
        close(got, model(x.clone()), x, slack=8)


def test_no_low_rank_is_no_branch() -> None:
    model, x = Pair(WAYS["plain"]).eval(), torch.randn(3, K)
    model.a, model.b = nn.Linear(K, 16, bias=False), nn.Linear(16, N, bias=False)
    _, seen = through(model, x)
    assert "rank 16 is not low for a (16, 32) weight" in seen.notes[0]


# --- gates that are zero --------------------------------------------------------------------------


@pytest.mark.parametrize(("alive", "kept"), [([0, 2], [0, 2]), ([], []), ([0, 1, 2, 3], None)])
def test_dead_ranks_are_removed_exactly(alive: list[int], kept: list[int] | None) -> None:
    model, x = Pair(WAYS["gates"]).eval().requires_grad_(False), torch.randn(3, K)
    model.gate.zero_()
    model.gate[alive] = torch.randn(len(alive))
    results = []
    for order in ((fuse_branches,), (fuse_branches, dead_ranks, clean_up)):
        gm = torch.export.export(model, (x,), strict=False).run_decompositions({}).module()
        traced = Traced(gm.graph, placeholder_weights(gm, ()))
        run_passes(traced, order)
        gm.recompile()
        results.append(gm(x))
        (product,) = [n for n in gm.graph.nodes if n.target is LINEAR]
        if dead_ranks in order and kept is not None:
            shapes = [tuple(getattr(gm, str(n.target)).shape) for n in product.args[3]]
            assert shapes == ([(len(kept), K), (N, len(kept)), (len(kept),)] if kept else [])
            names = {str(node.target) for node in traced.frozen}
            assert names == {"gate", *(("a.weight", "b.weight") if kept else ())}
    # A dead rank adds zeros: nothing but the order of few additions may change.
    close(results[1], results[0], x)


def test_gates_that_may_change_stay_values() -> None:
    model, x = Pair(WAYS["gates"]).eval(), torch.randn(3, K)
    run = torch.compile(model, backend="sparsefx", options=AS_IT_IS)
    with torch.no_grad():
        for _ in range(3):
            model.gate.normal_()
            close(run(x), model(x), x, slack=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_gate_that_was_read_may_not_be_edited_unnoticed() -> None:
    model, x = Pair(WAYS["gates"]).eval().requires_grad_(False), torch.randn(3, K)
    run = torch.compile(model, backend="sparsefx", options=AS_IT_IS)
    close(run(x), model(x), x, slack=4)
    for name in ("gate", "a.weight", "b.weight"):
        edited = model.get_parameter(name)
        edited.mul_(1)
        with pytest.raises(StaleWeightError, match=f"{name} was edited"):
            run(x)
        model.gate[1] += 1
        torch._dynamo.reset()
        close(run(x), model(x), x, slack=4)


def test_a_gate_of_another_module_compiles_anew() -> None:
    """After a graph break one graph serves all modules of the same code, but not their gates."""
    layers: list[Any] = [Pair(_broken).eval().requires_grad_(False) for _ in range(2)]
    layers[1].base, layers[1].a, layers[1].b = layers[0].base, layers[0].a, layers[0].b
    layers[1].gate.copy_(torch.tensor([0.0, 2.0, 0.0, 1.0]))
    x = torch.randn(3, K)
    run = torch.compile(lambda x: [one(x) for one in layers], backend="sparsefx", options=AS_IT_IS)
    for got, one in zip(run(x), layers, strict=True):
        close(got, one(x), x, slack=4)


def _broken(m: Any, x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return WAYS["gates"](m, x)


@pytest.mark.parametrize("trained", ["a", "b"])
def test_dead_ranks_of_what_is_trained_stay(trained: str) -> None:
    model, x = Pair(WAYS["gates"]).eval().requires_grad_(False), torch.randn(3, K)
    getattr(model, trained).requires_grad_(True)
    run = torch.compile(model, backend="sparsefx", options=AS_IT_IS)
    with torch.no_grad():
        for _ in range(2):
            close(run(x), model(x), x, slack=4)
            model.gate.normal_()
            getattr(model, trained).weight.normal_()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_strength_of_zero_is_no_constant() -> None:
    model, x = Pair(WAYS["scalar tensor"]).eval().requires_grad_(False), torch.randn(3, K)
    run = torch.compile(model, backend="sparsefx", options=AS_IT_IS)
    for strength in (0.0, 0.5, 2.0):
        model.strength.fill_(strength)
        close(run(x), model(x), x, slack=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
