"""Rotary embeddings become one node: golden text, bit for bit, every refusal, whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_merge_siblings import traced
from torch import Tensor, nn

import sparsefx
from sparsefx.codegen import fused as _engine  # noqa: F401  (registers the kernels)
from sparsefx.ir.rotary import ROTARY
from sparsefx.ir.text import text
from sparsefx.ir.verify import verify
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.fuse_rotary import fuse_rotary
from sparsefx.passes.manager import records_of, run_passes

torch.set_num_threads(1)
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


class Net(nn.Module):
    """`turn` of queries and keys as a layer has them: heads before tokens, seen from behind."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.turn = turn

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return self.turn(q.transpose(1, 2), k.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 5, 4, 6), (2, 5, 2, 6), (1, 5, 6), (1, 5, 6))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def turned(turn: Turn, dtype: torch.dtype = torch.float32) -> tuple[int, str]:
    """How many nodes turn, and the text; results are bitwise what they were, strides too."""
    module = Net(turn)
    want = module(*inputs(dtype))
    gm, work = traced(module, *inputs(dtype))
    run_passes(work, [fuse_rotary, clean_up])
    assert verify(work.graph) is None
    gm.recompile()
    for got, exact in zip(gm(*inputs(dtype)), want, strict=True):
        assert torch.equal(got, exact)
        assert got.stride() == exact.stride()
    assert not fuse_rotary.run(work), "a second run changes nothing"
    return sum(n.target is ROTARY for n in work.graph.nodes), text(work.graph)


def rotate_half(x: Tensor, half: int = 3) -> Tensor:
    """As transformers' in the graphs of dynamo, where sizes are numbers."""
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def embed(x: Tensor, cos: Tensor, sin: Tensor, half: int = 3) -> Tensor:
    return (x * cos) + (rotate_half(x, half) * sin)


def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return embed(q, cos, sin), embed(k, cos, sin)


def test_golden() -> None:
    assert turned(both) == (1, AFTER)


AFTER = """\
%q : f32[2, 5, 4, 6] = placeholder
%k : f32[2, 5, 2, 6] = placeholder
%cos : f32[1, 5, 6] = placeholder
%sin : f32[1, 5, 6] = placeholder
%4 : f32[2, 4, 5, 6] = transpose(%q, 1, 2)
%5 : f32[2, 2, 5, 6] = transpose(%k, 1, 2)
%6 : f32[1, 1, 5, 6] = unsqueeze(%cos, 1)
%7 : f32[1, 1, 5, 6] = unsqueeze(%sin, 1)
%8 = sparsefx.rotary([%4, %5], %6, %7)
%9 : f32[2, 4, 5, 6] = getitem(%8, 0)
%10 : f32[2, 2, 5, 6] = getitem(%8, 1)
return [%9, %10]"""


def other_order(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    q = q.contiguous()
    return sin * rotate_half(q) + cos * q, embed(k, cos, sin)


def part_of_the_width(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return embed(q[..., :4], cos[..., :4], sin[..., 2:], 2), embed(k, cos, sin)


def after_each_other(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """A result that is read before the next is computed."""
    first = embed(q, cos, sin)
    return embed(first, cos, sin), embed(k, cos, sin)


def crossed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """One rotation's result is turned by other angles, while the first angles' group is open."""
    first = embed(q, cos, sin)
    return embed(first, sin, cos), embed(k, cos, sin)


def edited_between(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    first = embed(q, cos, sin)
    cos.mul_(2)
    return first, embed(k, cos, sin)


TURNS = {other_order: 1, part_of_the_width: 2, after_each_other: 2, crossed: 3, edited_between: 2}


@pytest.mark.parametrize(("turn", "nodes"), TURNS.items())
def test_spellings(turn: Turn, nodes: int) -> None:
    found, after = turned(turn)
    assert found == nodes
    assert "cat(" not in after


def not_negated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    turn = torch.cat((q[..., 3:], q[..., :3]), dim=-1)
    return (q * cos + turn * sin,)


def other_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    turn = torch.cat((-q[..., 2:], q[..., :2]), dim=-1)
    return (q * cos + turn * sin,)


def swapped(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    turn = torch.cat((-q[..., :3], q[..., 3:]), dim=-1)
    return (q * cos + turn * sin,)


def other_tensor(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return (q.sin() * cos + rotate_half(q) * sin,)


def other_axis(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    turn = torch.cat((-q[..., 3:], q[..., :3]), dim=0)
    return (torch.cat((q, q))[..., :3] * cos[..., :3] + turn * sin[..., :3],)


def product_is_read(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    plain = q * cos
    return plain + rotate_half(q) * sin, plain


def edited(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    turn = rotate_half(q)
    q.mul_(2)
    return (q * cos + turn * sin,)


def other_strides(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """In memory the result has heads before tokens, as the angles do, and may be viewed so."""
    return (sin * rotate_half(q) + cos * q,)


def one_angle(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return (q * cos[..., :1] + rotate_half(q) * sin,)


@pytest.mark.parametrize(
    "turn",
    [not_negated, other_half, swapped, other_tensor, other_axis, product_is_read, edited,
     other_strides, one_angle],
)  # fmt: skip
def test_what_is_no_rotation_stays(turn: Turn) -> None:
    assert turned(turn)[0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types_stay(dtype: torch.dtype) -> None:
    """Half types round after every step."""
    assert turned(both, dtype)[0] == 0


CONFIGS: list[tuple[str, int, dict[str, Any]]] = [
    ("LlamaConfig", 3, {}), ("Qwen3Config", 0, {"head_dim": 8}),
    ("GPTNeoXConfig", 0, {"rotary_pct": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "past", "more"), CONFIGS)
def test_models(name: str, past: int, more: dict[str, Any]) -> None:
    """Norms, rotary embeddings and attention of whole models, without and with a cache."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, name)(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **more,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(0, 64, (2, 5))
    model = sparsefx.sparsify(model, "int4g32", example_inputs={"input_ids": ids}, progress=False)

    def cache() -> Any:
        return model(input_ids=ids[:, :past], use_cache=True).past_key_values if past else None

    fast: Any = torch.compile(model, backend="sparsefx", options={"inner": "eager"})
    rest, kept = ids[:, past:], {"use_cache": True} if past else {"use_cache": False}
    with torch.no_grad():
        want = model(input_ids=rest, past_key_values=cache(), **kept).logits
        got = fast(input_ids=rest, past_key_values=cache(), **kept).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    records = [record for run in records_of(model.buffers()) for record in run]
    assert any(record.name == "fuse_rotary" and record.changed for record in records)
    torch._dynamo.reset()
