"""Models with PEFT's adapters through torch.compile and sparsify: numbers, launches, recompiles."""

from __future__ import annotations

import copy
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
    Seen,
    adapted,
    close,
    fresh_graphs,
    peft,
    products,
    through,
)  # fmt: skip
from torch import Tensor, nn

from sparsefx.ir.capture import capture
from sparsefx.models.zoo_text import build
from sparsefx.passes.fuse_branches import low_rank_weights
from sparsefx.passes.plan import plan
from sparsefx.passes.spec import Spec


def llama(*adapters: str) -> nn.Module:
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
    }  # fmt: skip
    model = build("LlamaForCausalLM", "LlamaConfig", settings)
    return adapted(model, ["q_proj", "v_proj", "down_proj"], *adapters)


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.arange(rows * length).view(rows, length) % 64


def tolerance(model: nn.Module, *inputs: Tensor) -> float:
    """Twice what computing in float32 loses against float64: the rounding of all sums once more."""
    with torch.no_grad():
        want = copy.deepcopy(model).double()(*inputs, use_cache=False).logits
        lost = float((model(*inputs, use_cache=False).logits - want).abs().max())
    return 8 * lost + 1e-7


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("adapters", [("one",), ("one", "two")])
def test_llama_with_adapters(adapters: tuple[str, ...], inner: str) -> None:
    model, x = llama(*adapters), ids()
    run = torch.compile(model, backend="sparsefx", options={**AS_IT_IS, "inner": inner})
    with torch.no_grad():
        want = model(x, use_cache=False).logits
        got = run(x, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance(model, x))


def test_no_more_products_than_without_adapters() -> None:
    counts = []
    for adapters in (("one",), ("one", "two")):
        model = llama(*adapters)
        seen = Seen()
        with torch.no_grad():
            torch.compile(model, backend=seen)(ids(), use_cache=False)
            for module in model.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.enable_adapters(False)
            torch._dynamo.reset()
            plain = Seen()
            torch.compile(model, backend=plain)(ids(), use_cache=False)
        assert products(seen) == products(plain)
        assert products(seen)["packed"] == 6
        counts.append(products(seen))
    assert counts[0] == counts[1]


def test_dynamic_shapes_compile_once() -> None:
    model = adapted(One(), ["q"], "default", "b")
    run = torch.compile(model, backend="sparsefx", dynamic=True, options=AS_IT_IS)
    with torch.no_grad():
        for rows in (3, 8, 2):
            x = torch.randn(rows, K)
            close(run(x), model(x), x, slack=2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_scale_changes_without_a_recompile(inner: str) -> None:
    model, x = Pair(lambda m, x: m.base(x) + m.strength * m.b(m.a(x))).eval(), torch.randn(3, K)
    run = torch.compile(model, backend="sparsefx", options={**AS_IT_IS, "inner": inner})
    with torch.no_grad():
        outputs = []
        for strength in (0.5, -2.0, 0.0):
            model.strength.fill_(strength)
            outputs.append(run(x))
            close(outputs[-1], model(x), x, slack=4)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradients_reach_the_adapter() -> None:
    model, x = adapted(One(), ["q"], "default"), torch.randn(3, K)
    model.requires_grad_(True)
    parts = [p for n, p in model.named_parameters() if "lora_" in n]
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in parts if p.grad is not None]
    model.zero_grad()
    torch.compile(model, backend=Seen())(x).square().sum().backward()
    for part, old in zip(parts, want, strict=True):
        assert part.grad is not None
        torch.testing.assert_close(part.grad, old, rtol=1e-4, atol=1e-5)


def test_what_is_stored_in_sixteen_bits() -> None:
    """PEFT keeps adapters in float32 beside a bfloat16 base: the branch is computed in bfloat16."""
    model = adapted(One(), ["q"], "default")
    model.get_submodule("q.base_layer").to(torch.bfloat16)
    x = torch.randn(3, K).to(torch.bfloat16)
    got, seen = through(model, x)
    assert products(seen) == {"packed": 1}
    assert got.dtype == torch.bfloat16
    with torch.no_grad():
        want = model(x)
    # bfloat16 keeps 8 bits: A, B, s, A x, B(A x) and the sum are rounded once each.
    close(got, want, x, slack=6 / (K + RANK))


# --- sparsify -------------------------------------------------------------------------------------


def test_low_rank_weights_are_known_before_packing() -> None:
    model = One()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=RANK, target_modules=["q"], init_lora_weights=False), model
    )
    captured = capture(model.eval(), torch.randn(3, K), "export")
    (graph,) = captured.graphs
    found = {graph.weights[a].shape: graph.weights[b].shape for a, b in
             low_rank_weights(graph).items()}  # fmt: skip
    assert found == {(RANK, K): (N, K), (N, RANK): (N, K)}


@pytest.mark.parametrize(("spec", "packed"), [
    ({"format": "int8"}, set()),
    ({"format": "int8", "targets": ["Linear"]}, set()),
    ({"format": "int8", "overrides": {"re:.*lora_A.*": "int4g16"}}, {"A"}),
    ({"format": "int8", "targets": ["q.base_layer", "re:.*lora_B.*"]}, {"B"}),
])  # fmt: skip
def test_adapters_stay_dense_unless_named(spec: dict[str, Any], packed: set[str]) -> None:
    model, x = One(), torch.randn(3, K)
    config = peft.LoraConfig(r=RANK, target_modules=["q"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    captured = capture(model.eval(), x)
    choices = {
        c.site.name: c for c in plan(model, captured.sites, Spec.read(spec), captured.graphs)
    }
    assert not choices["q.base_layer.weight"].dense
    for part in "AB":
        choice = choices[f"q.lora_{part}.default.weight"]
        assert choice.dense == (part not in packed)
        if choice.dense and not packed:
            assert choice.reason.startswith("low-rank branch of q.base_layer.weight")
