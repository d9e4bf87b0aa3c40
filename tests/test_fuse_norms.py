"""Norms that are written out, and additions before norms: golden text, results, every refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_merge_siblings import traced
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from sparsefx.codegen import norm as _engine  # noqa: F401  (registers the kernel)
from sparsefx.ir.norm import NORM
from sparsefx.ir.text import text
from sparsefx.ir.verify import verify
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.fuse_norms import RMS_NORM, fuse_norms
from sparsefx.passes.manager import records_of, run_passes

torch.set_num_threads(1)
Norm = Callable[[Tensor, Tensor], Any]


class Net(nn.Module):
    def __init__(self, norm: Norm, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24).to(dtype), requires_grad=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Any:
        return self.norm(x, self.weight)


def fused(norm: Norm, dtype: torch.dtype = torch.float32) -> tuple[int, str]:
    """How many norms became one node, and the text; results agree."""
    module, x = Net(norm, dtype), (3 * torch.randn(2, 5, 24)).to(dtype)
    want = module(x.clone())
    gm, work = traced(module, x.clone())
    run_passes(work, [fuse_norms, clean_up])
    assert verify(work.graph) is None
    gm.recompile()
    near(gm(x.clone()), want, 24)
    assert not fuse_norms.run(work), "a second run changes nothing"
    return sum(n.target in (RMS_NORM, NORM) for n in work.graph.nodes), text(work.graph)


def near(got: Tensor, want: Tensor, k: int) -> None:
    """As sums over k numbers in two orders, a root and two factors may; then they are rounded."""
    dtype = want.dtype
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    rtol = 2 * unit + 2 * (k + 8) * 2.0**-24
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().max()))


def llama(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm."""
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * hidden.to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * (1.0 + weight.float())).type_as(x)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return torch.rsqrt((x * x).mean([2], True) + 1e-5) * x


def other_order(x: Tensor, weight: Tensor) -> Tensor:
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 0.5) * x * weight


@pytest.mark.parametrize("norm", [llama, gemma, plain, other_order])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spellings(norm: Norm, dtype: torch.dtype) -> None:
    assert fused(norm, dtype)[0] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_where_they_did(dtype: torch.dtype) -> None:
    assert fused(llama, dtype)[0] == 1


def test_golden() -> None:
    assert fused(llama)[1] == AFTER
    assert fused(llama, torch.bfloat16)[1] == AFTER_BF16


AFTER = """\
%x : f32[2, 5, 24] = placeholder
%weight : f32[24] = get_attr weight
%2 = sparsefx.norm(%x, None, %weight, None, 1e-05, False, False)
%3 : f32[2, 5, 24] = getitem(%2, 0)
return %3"""
AFTER_BF16 = """\
%x : bf16[2, 5, 24] = placeholder
%weight : bf16[24] = get_attr weight
%2 = sparsefx.norm(%x, None, None, None, 1e-05, False, False)
%3 : bf16[2, 5, 24] = getitem(%2, 0)
%4 : bf16[2, 5, 24] = mul(%weight, %3)
return %4"""


class Sum(nn.Module):
    """`tail` of x and another tensor like it, weight and bias; numbers enough for LayerNorm."""

    def __init__(self, tail: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tail = tail
        self.weight, self.bias = (
            nn.Parameter(torch.randn(64), requires_grad=False) for _ in range(2)
        )

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.tail(x, y, self.weight, self.bias)


def summed(tail: Callable[..., Any], rows: int = 520) -> str:
    """The text after the pass; results agree."""
    module, x, y = Sum(tail), torch.randn(rows, 64), torch.randn(rows, 64)
    want = module(x.clone(), y.clone())
    gm, work = traced(module, x.clone(), y.clone())
    run_passes(work, [fuse_norms, clean_up])
    gm.recompile()
    for a, b in zip(gm(x.clone(), y.clone()), want, strict=True):
        near(a, b, 64)
    assert not fuse_norms.run(work), "a second run changes nothing"
    return text(work.graph)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def before_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """As a layer of a language model begins: the sum is read again."""
    s = x + y
    return rms(s, weight), s * 2


def after_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """As a layer of BERT ends."""
    return (F.layer_norm(x + y, (64,), weight, bias, 1e-12),)


def test_golden_sums() -> None:
    assert summed(before_norm) == BEFORE_NORM
    assert summed(after_norm) == AFTER_NORM


BEFORE_NORM = """\
%x : f32[520, 64] = placeholder
%y : f32[520, 64] = placeholder
%weight : f32[64] = get_attr weight
%3 = sparsefx.norm(%x, %y, %weight, None, 1e-05, False, True)
%4 : f32[520, 64] = getitem(%3, 0)
%5 : f32[520, 64] = getitem(%3, 1)
%6 : f32[520, 64] = mul(%5, 2)
return [%4, %6]"""
AFTER_NORM = """\
%x : f32[520, 64] = placeholder
%y : f32[520, 64] = placeholder
%weight : f32[64] = get_attr weight
%bias : f32[64] = get_attr bias
%4 = sparsefx.norm(%x, %y, %weight, %bias, 1e-12, True, False)
%5 : f32[520, 64] = getitem(%4, 0)
return [%5]"""


def scaled(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return (rms(torch.add(x, y, alpha=2), weight),)


def broadcast(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return (rms(x + y[:1], weight),)


def sum_is_edited(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Any:
    s = x + y
    s.mul_(2)
    return (rms(s, weight),)


def addend_is_edited(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Any:
    s = x + y
    y.mul_(2)
    return rms(s, weight), y


def read_before(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Any:
    s = x + y
    return s.sin(), rms(s, weight)


def number(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return (rms(x + 1.0, weight),)


@pytest.mark.parametrize(
    "tail", [scaled, broadcast, sum_is_edited, addend_is_edited, read_before, number]
)
def test_sums_that_stay(tail: Callable[..., Any]) -> None:
    found = summed(tail)
    assert "add(" in found
    assert "sparsefx.norm(" in found, "the norm alone is one node"


def test_layer_norms_that_stay() -> None:
    assert "layer_norm(" in summed(after_norm, rows=512), "too few to gain"
    alone = summed(lambda x, y, weight, bias: (F.layer_norm(x, (64,), weight, bias),))
    assert "layer_norm(" in alone
    both = summed(lambda x, y, weight, bias: (F.layer_norm(x + y, (520, 64)),))
    assert "layer_norm(" in both
    doubled = summed(lambda x, y, w, b: (F.layer_norm(x.double() + y.double(), (64,)),))
    assert "layer_norm(" in doubled


def test_half_types_with_a_weight_stay() -> None:
    """Torch rounds before it multiplies by the weight."""
    module = Sum(lambda x, y, weight, bias: (F.rms_norm(x, (64,), weight, 1e-5),)).bfloat16()
    x = torch.randn(3, 64).bfloat16()
    _, work = traced(module, x, x)
    assert not fuse_norms.run(work)


def mean_is_read(x: Tensor, weight: Tensor) -> Tensor:
    mean = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + 1e-5) + mean


def other_axis(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)


def cubes(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-5)


def other_factor(x: Tensor, weight: Tensor) -> Tensor:
    return weight * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def edited(x: Tensor, weight: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    x.add_(1.0)
    return x * scale


def edited_after(x: Tensor, weight: Tensor) -> Tensor:
    out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    x.add_(1.0)
    return out * weight + x


def no_eps(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


def all_axes(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean() + 1e-5)


@pytest.mark.parametrize(
    "norm", [mean_is_read, other_axis, cubes, other_factor, edited, edited_after, no_eps, all_axes]
)
def test_what_is_no_norm_stays(norm: Norm) -> None:
    assert fused(norm)[0] == 0


def test_half_types_without_casts_stay() -> None:
    assert fused(plain, torch.bfloat16)[0] == 0


def test_launches_of_a_language_model() -> None:
    """The passes together leave at most 0.65 of a decoder layer's launches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )).eval().requires_grad_(False)  # fmt: skip
    ids = torch.randint(0, 64, (1, 7))
    model = sparsefx.sparsify(model, "int4g32", example_inputs={"input_ids": ids}, progress=False)
    want = model(input_ids=ids).logits
    fast: Any = torch.compile(model, backend="sparsefx", options={"inner": "eager"})
    with torch.no_grad():
        got = fast(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    records = next(iter(records_of(model.buffers())))
    assert records[-1].after.launches <= 0.65 * records[0].before.launches
