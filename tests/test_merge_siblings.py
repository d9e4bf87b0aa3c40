"""Products of one x become one call: golden text, equality bit for bit, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_backend import _fresh  # noqa: F401
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import sparsefx
from sparsefx.ir.format import Format
from sparsefx.ir.op import LINEAR
from sparsefx.ir.sites import Traced
from sparsefx.ir.text import text
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.fuse_epilogues import fuse_epilogues
from sparsefx.passes.manager import run_passes
from sparsefx.passes.merge_siblings import merge_siblings
from sparsefx.runtime.export import optimised
from sparsefx.runtime.modules import SparseLinear

torch.set_num_threads(1)


def layer(n: int, k: int, text: str = "int4g16", bias: bool = False) -> SparseLinear:
    """A packed layer with seeded values."""
    torch.manual_seed(n)
    fmt = Format.parse(text)
    branch = [torch.randn(fmt.rank, k), torch.randn(n, fmt.rank), torch.rand(fmt.rank)]
    own = nn.Parameter(torch.randn(n), requires_grad=False) if bias else None
    return SparseLinear(fmt.pack(torch.randn(n, k)), own, branch if fmt.rank else ())


def traced(module: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, Traced]:
    """The graph of a module that holds packed layers, with the values of all its nodes."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, nn.ReLU)

    graph = Tracer().trace(module)
    gm = fx.GraphModule(module, graph)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(gm, mode).propagate(*inputs)
    return gm, Traced(gm.graph, {})


class Attention(nn.Module):
    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            layer(n, 32, own) for n, own in zip((32, 16, 16), texts, strict=True)
        )

    def forward(self, x: Tensor) -> Any:
        return self.q(x), self.k(x).view(-1), self.v(x).sin()


def merged(module: nn.Module, x: Tensor) -> tuple[str, list[str]]:
    """Text after merging, and notes; results are checked bit for bit."""
    want = module(x)
    gm, work = traced(module, x)
    run_passes(work, [merge_siblings, clean_up])
    gm.recompile()
    got = gm(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not merge_siblings.run(work), "a second run changes nothing"
    return text(work.graph), list(dict.fromkeys(work.notes))


def test_golden() -> None:
    module, x = Attention("int4g16", "int4g16", "int4g16"), torch.randn(3, 32)
    _, work = traced(module, x)
    assert text(work.graph) == BEFORE
    assert merged(module, x) == (AFTER, [])


BEFORE = """\
%x : f32[3, 32] = placeholder
%q_values : uint8[512] = get_attr q.values
%q_scales : f16[32, 2] = get_attr q.scales
%3 : f32[3, 32] = sparsefx.linear(%x, [%q_values, %q_scales], None, [], 'int4g16', 32)
%k_values : uint8[256] = get_attr k.values
%k_scales : f16[16, 2] = get_attr k.scales
%6 : f32[3, 16] = sparsefx.linear(%x, [%k_values, %k_scales], None, [], 'int4g16', 16)
%7 : f32[48] = view(%6, -1)
%v_values : uint8[256] = get_attr v.values
%v_scales : f16[16, 2] = get_attr v.scales
%10 : f32[3, 16] = sparsefx.linear(%x, [%v_values, %v_scales], None, [], 'int4g16', 16)
%11 : f32[3, 16] = sin(%10)
return [%3, %7, %11]"""
AFTER = """\
%x : f32[3, 32] = placeholder
%q_values : uint8[512] = get_attr q.values
%q_scales : f16[32, 2] = get_attr q.scales
%k_values : uint8[256] = get_attr k.values
%k_scales : f16[16, 2] = get_attr k.scales
%v_values : uint8[256] = get_attr v.values
%v_scales : f16[16, 2] = get_attr v.scales
%7 = sparsefx.linears(%x, [%q_values, %q_scales, %k_values, %k_scales, %v_values, %v_scales], \
[], [], 'int4g16|int4g16|int4g16', [32, 16, 16])
%8 : f32[3, 32] = getitem(%7, 0)
%9 : f32[3, 16] = getitem(%7, 1)
%10 : f32[3, 16] = getitem(%7, 2)
%11 : f32[48] = view(%9, -1)
%12 : f32[3, 16] = sin(%10)
return [%8, %11, %12]"""


@pytest.mark.parametrize(
    "texts",
    [
        ("tile4x1@50%+int4g16", "tile4x1@25%+int4g16", "tile4x1@75%+int4g16"),
        ("bitmap@50%+int4g16+r8", "bitmap@30%+int4g16", "bitmap@50%+int4g16+r2"),
        ("tile16x1@50%+int4g16+a8", "tile16x1@50%+int4g16+a8", "tile16x1@50%+int4g16+a8"),
        ("2:4+int8", "2:4+int8", "2:4+int8"),
    ],
)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_kept_counts_and_branches_may_differ(texts: tuple[str, ...], rows: int) -> None:
    after, notes = merged(Attention(*texts), torch.randn(rows, 32))
    assert (after.count("sparsefx.linears("), after.count("sparsefx.linear("), notes) == (1, 0, [])


def test_other_formats_are_refused_with_a_reason() -> None:
    after, notes = merged(Attention("int4g16", "int8", "int4g16"), torch.randn(3, 32))
    assert (after.count("sparsefx.linears("), after.count("sparsefx.linear(")) == (1, 1)
    names, _, why = notes[0].partition(" of x not merged: ")
    assert (names, len(notes)) == ("merge_siblings: linear_default, linear_default_1", 1)
    assert why == "formats differ: int4g16 and int8"
    for other in ("int4g32", "uint4g16", "int4g16+a8", "2:4+int4g16"):
        _, notes = merged(Attention("int4g16", other, other), torch.randn(3, 32))
        assert f"formats differ: int4g16 and {other}" in notes[0]


class Mixed(nn.Module):
    """One product of x is dense, one needs another's result, one reads x after it was edited."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (layer(8, 32) for _ in range(4))
        self.w = nn.Parameter(torch.randn(8, 32))

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        dense = torch.nn.functional.linear(x, self.w)
        out = LINEAR(x, self.b.buffer_list, y.sum(0), [], self.b.format, 8)
        z = self.c(x)
        x.mul_(2)
        return y, dense, out, z, self.d(x)


def test_order_and_edits_are_refused_with_a_reason() -> None:
    module, x = Mixed(), torch.randn(3, 32)
    want = module(x.clone())
    gm, work = traced(module, x.clone())
    run_passes(work, [merge_siblings, clean_up])
    gm.recompile()
    assert all(torch.equal(a, b) for a, b in zip(gm(x.clone()), want, strict=True))
    assert text(work.graph).count("sparsefx.linears(") == 1
    assert [note.partition("not merged: ")[2] for note in work.notes[:3]] == [
        "its weight is dense",
        "sum_1, which it needs, is computed after linear_default",
        "mul_, after linear_default, changes what it reads",
    ]


def test_one_product_stays_as_it_is() -> None:
    gm, work = traced(nn.Sequential(layer(8, 32), layer(8, 8)), torch.randn(2, 32))
    before = text(gm.graph)
    assert not merge_siblings.run(work)
    assert (text(gm.graph), work.notes) == (before, [])


# --- a language model ----------------------------------------------------------------------------


def llama() -> tuple[nn.Module, Tensor]:
    """Two random blocks of Llama."""
    from sparsefx.models.torchvision import usable_torchvision

    usable_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False), torch.arange(8)[None]


def calls(run: Any, ids: Tensor) -> int:
    """How many products of ours one call runs."""
    with torch.no_grad():
        run(input_ids=ids)
        with torch.profiler.profile() as seen:
            run(input_ids=ids)
    names = ("sparsefx::linear", "sparsefx::fused")  # and linears
    return sum(event.name.startswith(names) for event in seen.events())


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("spec", ["int4g32", "tile16x1@50%+int4g32+r4+a8"])
def test_llama_from_seven_products_a_block_to_four(inner: str, spec: str) -> None:
    model, ids = llama()
    model = sparsefx.sparsify(model, spec, example_inputs={"input_ids": ids}, progress=False)
    run = torch.compile(model, backend="sparsefx", options={"inner": inner})
    with torch.no_grad():
        for length in (8, 5):
            some = torch.arange(length)[None]
            want = model(input_ids=some).logits
            # 2 blocks of sums of at most 128 products; int8 codes of x may round the other way.
            limit = (2.0**-6 if "a8" in spec else 2.0**-16) * float(want.abs().max())
            assert float((run(input_ids=some).logits - want).abs().max()) <= limit
    assert calls(model, ids) == 2 * 7 + 1
    assert calls(run, ids) == 2 * 4 + 1


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_llama_packed_at_compile_time(inner: str) -> None:
    model, ids = llama()
    run = torch.compile(model, backend="sparsefx", options={"spec": "int8", "inner": inner})
    with torch.no_grad():
        got = run(input_ids=ids).logits
        packed = sparsefx.sparsify(model, "int8", example_inputs={"input_ids": ids}, progress=False)
        torch.testing.assert_close(got, packed(input_ids=ids).logits, rtol=2**-14, atol=2**-14)
    assert calls(run, ids) == 2 * 4 + 1


def test_an_exported_program_is_optimised() -> None:
    model, ids = llama()
    model = sparsefx.sparsify(model, "int4g32", example_inputs={"input_ids": ids}, progress=False)
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids}, strict=False)
        run = optimised(program)
        got, want = run(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=2**-14, atol=2**-14)
    assert calls(run, ids) == 2 * 4 + 1


def test_downs_of_several_branches_share_x() -> None:
    """Golden only in number: products that a gate takes leave the others merged."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.gate, self.up, self.k = (layer(16, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Any:
            gate = torch.nn.functional.silu(self.gate(x)) * self.up(x)
            return self.q(x), gate, self.k(x)

    module, x = Block(), torch.randn(3, 32)
    want = module(x)
    gm, work = traced(module, x)
    run_passes(work, [merge_siblings, fuse_epilogues, clean_up])
    gm.recompile()
    shown = text(work.graph)
    assert (shown.count("sparsefx.linears("), shown.count("sparsefx.fused(")) == (1, 1)
    for a, b in zip(gm(x), want, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-20, atol=2**-20)
