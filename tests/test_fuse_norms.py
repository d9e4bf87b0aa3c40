"""Norms that are written out become one node: golden text, bit for bit, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_merge_siblings import traced
from torch import Tensor, nn

import sparsefx
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
    """How many norms became one node, and the text; results are bitwise what they were."""
    module, x = Net(norm, dtype), (3 * torch.randn(2, 5, 24)).to(dtype)
    want = module(x.clone())
    gm, work = traced(module, x.clone())
    run_passes(work, [fuse_norms, clean_up])
    assert verify(work.graph) is None
    gm.recompile()
    assert torch.equal(gm(x.clone()), want)
    assert not fuse_norms.run(work), "a second run changes nothing"
    return sum(n.target is RMS_NORM for n in work.graph.nodes), text(work.graph)


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
%2 : f32[2, 5, 24] = rms_norm(%x, [24], %weight, 1e-05)
return %2"""
AFTER_BF16 = """\
%x : bf16[2, 5, 24] = placeholder
%weight : bf16[24] = get_attr weight
%2 : bf16[2, 5, 24] = rms_norm(%x, [24], None, 1e-05)
%3 : bf16[2, 5, 24] = mul(%weight, %2)
return %3"""


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
