"""Attention reads shared keys and values once: golden text, bit for bit, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_merge_siblings import traced
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.text import text
from sparsefx.ir.verify import verify
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.group_heads import group_heads
from sparsefx.passes.manager import run_passes

torch.set_num_threads(1)
Attend = Callable[[Tensor, Tensor, Tensor], Any]


class Net(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.attend(q, k, v)


def grouped(attend: Attend) -> str:
    """The text after the pass; results are bitwise what they were."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    module = Net(attend)
    want = module(q.clone(), k.clone(), v.clone())
    gm, work = traced(module, q.clone(), k.clone(), v.clone())
    run_passes(work, [group_heads, clean_up])
    assert verify(work.graph) is None
    gm.recompile()
    assert torch.equal(gm(q.clone(), k.clone(), v.clone()), want)
    assert not group_heads.run(work), "a second run changes nothing"
    return text(work.graph)


def repeat(k: Tensor) -> Tensor:
    """As transformers' repeat_kv."""
    return k[:, :, None, :, :].expand(2, 3, 2, 5, 8).reshape(2, 6, 5, 8)


def transformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True, scale=0.3)


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, key=k.repeat_interleave(2, dim=1), value=v.repeat_interleave(2, -3)
    )


def unsqueezed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    key = k.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(2, 6, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, key, repeat(v), mask)


def test_golden() -> None:
    _, work = traced(
        Net(transformers), torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    )
    assert text(work.graph) == BEFORE
    assert grouped(transformers) == AFTER


INDEX = ", ".join(["slice(None, None, None)"] * 2 + ["None"] + ["slice(None, None, None)"] * 2)
BEFORE = f"""\
%q : f32[2, 6, 5, 8] = placeholder
%k : f32[2, 3, 5, 8] = placeholder
%v : f32[2, 3, 5, 8] = placeholder
%3 : f32[2, 3, 1, 5, 8] = getitem(%k, [{INDEX}])
%4 : f32[2, 3, 2, 5, 8] = expand(%3, 2, 3, 2, 5, 8)
%5 : f32[2, 6, 5, 8] = reshape(%4, 2, 6, 5, 8)
%6 : f32[2, 3, 1, 5, 8] = getitem(%v, [{INDEX}])
%7 : f32[2, 3, 2, 5, 8] = expand(%6, 2, 3, 2, 5, 8)
%8 : f32[2, 6, 5, 8] = reshape(%7, 2, 6, 5, 8)
%9 : f32[2, 6, 5, 8] = scaled_dot_product_attention(%q, %5, %8, is_causal=True, scale=0.3)
return %9"""
AFTER = """\
%q : f32[2, 6, 5, 8] = placeholder
%k : f32[2, 3, 5, 8] = placeholder
%v : f32[2, 3, 5, 8] = placeholder
%3 : f32[2, 6, 5, 8] = scaled_dot_product_attention(%q, %k, %v, is_causal=True, scale=0.3, \
enable_gqa=True)
return %3"""


@pytest.mark.parametrize("attend", [transformers, interleaved, unsqueezed])
def test_spellings(attend: Attend) -> None:
    found = grouped(attend)
    assert "enable_gqa=True" in found
    assert "expand(" not in found
    assert "repeat_interleave(" not in found


def only_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat(k), torch.cat([v, v], 1))


def other_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head 0 of the queries reads head 0, head 1 reads head 1: not side by side."""
    key = k[:, None].expand(2, 2, 3, 5, 8).reshape(2, 6, 5, 8)
    return F.scaled_dot_product_attention(q, key, repeat(v))


def other_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    key = k.reshape(2, 6, 5, 4).repeat_interleave(2, dim=3)
    return F.scaled_dot_product_attention(q, key, repeat(v))


def key_is_edited(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    key = repeat(k)
    k.mul_(2)
    return F.scaled_dot_product_attention(q, key, repeat(v))


def copy_is_edited(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    key = repeat(k)
    key.mul_(2)
    return F.scaled_dot_product_attention(q, key, repeat(v))


def each_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :3], k, v)


@pytest.mark.parametrize(
    "attend", [only_keys, other_order, other_axis, key_is_edited, copy_is_edited, each_its_own]
)
def test_what_stays(attend: Attend) -> None:
    assert "enable_gqa" not in grouped(attend)


def test_gradients_are_the_same() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (6, 3, 3)]
    gm, work = traced(Net(transformers), *(t.detach() for t in inputs))
    run_passes(work, [group_heads])
    gm.recompile()
    found = [torch.autograd.grad(run(*inputs).square().sum(), inputs) for run in (gm, transformers)]
    # Gradients of shared heads are sums over 2 of them and 5 tokens, in any order.
    torch.testing.assert_close(*found, rtol=2**-20, atol=2**-18)
