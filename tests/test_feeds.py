"""Feeds: who makes a tensor that Sites read, and every reason why it may not be scaled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_transformers import IDS, then, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.capture import capture
from sparsefx.passes.feeds import Feed, find_feeds

DOORS = ("export", "dynamo")


def feeds(model: nn.Module, inputs: object, door: str = "export") -> dict[str, Feed]:
    torch._dynamo.reset()
    found = find_feeds(model, capture(model.eval(), inputs, door))
    names = [name for feed in found for name in feed.names]
    assert len(names) == len(set(names)), "a Site is in one Feed"
    return {feed.names[0]: feed for feed in found}


@pytest.mark.parametrize("door", DOORS)
def test_llama_with_shared_key_value_heads(door: str) -> None:
    found = feeds(tiny("gqa", torch.float32), IDS, door)
    layer = "model.layers.0."
    qkv = found[layer + "self_attn.q_proj.weight"]
    assert [n.split(".")[4] for n in qkv.names] == ["q_proj", "k_proj", "v_proj"]
    assert (qkv.source, qkv.parameters) == ("norm", (layer + "input_layernorm.weight",))
    out = found[layer + "self_attn.o_proj.weight"]
    assert (out.source, out.parameters) == ("linear", (layer + "self_attn.v_proj.weight",))
    assert out.rows == (0, 1, 2, 3) * 2 + (4, 5, 6, 7) * 2
    assert out.head == 4
    down = found[layer + "mlp.down_proj.weight"]
    assert (down.parameters, down.rows) == ((layer + "mlp.up_proj.weight",), tuple(range(24)))
    assert down.head == 0, "the gate mixes per channel"
    assert found["lm_head.weight"].parameters == ("model.norm.weight",)
    assert not any(feed.reason for feed in found.values())


@pytest.mark.parametrize("door", DOORS)
def test_gemma_has_one_plus_weight(door: str) -> None:
    found = feeds(tiny("gemma", torch.float32), IDS, door)
    assert found["model.layers.1.self_attn.q_proj.weight"].offset == 1.0
    assert found["model.layers.1.self_attn.o_proj.weight"].rows == (0, 1, 2, 3) * 4


@pytest.mark.parametrize("door", DOORS)
def test_bert_reads_its_norms_twice(door: str) -> None:
    found = feeds(tiny("bert", torch.float32), IDS, door)
    layer = "encoder.layer.0."
    assert found[layer + "attention.self.query.weight"].reason == "also read by add"
    assert found[layer + "intermediate.dense.weight"].reason == "also read by add"
    assert "gelu" in found[layer + "output.dense.weight"].reason
    value = found[layer + "attention.output.dense.weight"].parameters
    assert value == (layer + "attention.self.value.weight", layer + "attention.self.value.bias")


@pytest.mark.parametrize("door", DOORS)
def test_gpt2_splits_one_product(door: str) -> None:
    found = feeds(tiny("gpt2", torch.float32), IDS, door)
    layer = "transformer.h.0."
    assert found[layer + "attn.c_proj.weight"].rows == tuple(range(32, 48))
    assert found[layer + "attn.c_proj.weight"].producer is not None
    norm = found[layer + "mlp.c_fc.weight"]
    assert norm.parameters == (layer + "ln_2.weight", layer + "ln_2.bias")


class Small(nn.Module):
    """Two products, what is between them given by `between`."""

    def __init__(self, between: Callable[[Small, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.other = nn.RMSNorm(8), nn.LayerNorm(8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


X = torch.randn(3, 8)
FOLDABLE: dict[str, tuple[Callable[[Small, Tensor], Tensor], str]] = {
    "nothing": (lambda m, x: m.b(m.a(x)), "a.weight"),
    "relu": (lambda m, x: m.b(F.relu(m.a(x))), "a.weight"),
    "dropout": (lambda m, x: m.b(F.dropout(m.a(x), 0.5, m.training)), "a.weight"),
    "divided": (lambda m, x: m.b(m.a(x) / x.abs().sum(-1, keepdim=True)), "a.weight"),
    "rms_norm": (lambda m, x: m.b(m.norm(x)), "norm.weight"),
    "layer_norm": (lambda m, x: m.b(m.other(x)), "other.weight"),
    "gated norm": (lambda m, x: m.b(m.norm(x) * torch.sigmoid(x)), "norm.weight"),
    "flipped": (lambda m, x: m.b(m.a(x).view(3, 2, 4).transpose(1, 2).reshape(3, 8)), "a.weight"),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[Small, Tensor], Tensor], str]] = {
    "gelu": (lambda m, x: m.b(F.gelu(m.a(x))), "gelu"),
    "square": (lambda m, x: m.b(m.a(x).square()), "square"),
    "by itself": (lambda m, x: then(m.a(x), lambda y: m.b(y * y)), "mul"),
    "by its view": (lambda m, x: then(m.a(x), lambda y: m.b(y * y.view(3, 8))), "itself"),
    "by its relu": (lambda m, x: then(m.a(x), lambda y: m.b(y * y.relu())), "itself"),
    "divides": (lambda m, x: m.b(x / (9 + m.a(x))), "div"),
    "residual": (lambda m, x: m.b(m.norm(x)) + m.norm.weight * x, "norm.weight is read 2 times"),
    "residual stream": (lambda m, x: then(m.norm(x), lambda y: m.b(y) + y), "add"),
    "output": (lambda m, x: then(m.a(x), lambda y: m.b(y) + 0 * x + y), "add"),
    "called twice": (lambda m, x: m.b(m.a(x)) + m.a(x + 1), "a.weight is read 2 times"),
    "norm twice": (lambda m, x: m.b(m.norm(x)) + m.norm(x + 1), "norm.weight is read 2 times"),
    "reader twice": (lambda m, x: m.b(m.norm(x)) + m.b(x), "b.weight is read 2 times"),
    "in place": (lambda m, x: m.b(m.a(x).relu_()), "relu_"),
    "in place later": (lambda m, x: then(m.a(x), lambda y: (y.add_(1), m.b(y))[1]), "add"),
    "along rows": (lambda m, x: m.b(m.a(x.repeat(3, 1)[:8]).T), "made by linear"),
    "decay": (lambda m, x: m.b(m.norm(x)) + m.norm.weight.square().sum(),
              "norm.weight is read 2 times"),
    "two offsets": (lambda m, x: m.b(x * (1 + m.norm.weight)) + m.a(x * (2 + m.norm.weight)),
                    "norm.weight is read 2 times"),
    "scaled offset": (lambda m, x: m.b(x * (1 + 2 * m.norm.weight)), "made by mul"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDABLE)
def test_what_lets_factors_through(case: str) -> None:
    between, source = FOLDABLE[case]
    feed = feeds(Small(between), X)["b.weight"]
    assert feed.reason == ""
    assert feed.parameters[0] == source


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not(case: str) -> None:
    between, reason = REFUSED[case]
    feed = next(f for f in feeds(Small(between), X).values() if "b.weight" in f.names)
    assert feed.source == "none"
    assert reason in feed.reason


def test_the_flipped_channels_are_known() -> None:
    feed = feeds(Small(FOLDABLE["flipped"][0]), X)["b.weight"]
    assert feed.rows == (0, 4, 1, 5, 2, 6, 3, 7)


def test_tied_and_overlapping_parameters_are_refused() -> None:
    tied = Small(FOLDABLE["nothing"][0])
    tied.b.weight = tied.a.weight
    assert "is tied to" in feeds(tied, X)["a.weight"].reason
    named = Small(FOLDABLE["rms_norm"][0])
    named.other.weight = named.norm.weight  # another name, no other reader in the graph
    assert "is tied to" in feeds(named, X)["b.weight"].reason
    overlapping = Small(FOLDABLE["rms_norm"][0])
    overlapping.other.weight = nn.Parameter(overlapping.norm.weight.data[:])
    assert "shares memory" in feeds(overlapping, X)["b.weight"].reason


def test_a_convolution_feeds_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1))
    found = feeds(model, torch.randn(2, 4, 3, 3))
    assert found["2.weight"].parameters == ("0.weight", "0.bias")
    assert found["2.weight"].rows == tuple(range(6))
