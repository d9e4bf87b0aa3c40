"""What follows a product goes into it: golden text, every step, every refusal; and clean-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_merge_siblings import layer, traced
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparsefx.ir.op import LINEAR, UNPACK
from sparsefx.ir.sites import Traced
from sparsefx.ir.text import text
from sparsefx.ir.verify import verify
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.fuse_epilogues import fuse_epilogues
from sparsefx.passes.manager import run_passes
from sparsefx.passes.merge_siblings import merge_siblings

torch.set_num_threads(1)
Tail = Callable[["Net", Tensor, Tensor], Any]


class Net(nn.Module):
    """Two products of x, a third of another size, and what `tail` makes of them."""

    def __init__(self, tail: Tail, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b, self.c = layer(16, 32), layer(16, 32, bias=True), layer(32, 16)
        self.tail, self.bias = tail, nn.Parameter(torch.randn(16), requires_grad=False)
        self.to(dtype)

    def forward(self, x: Tensor, r: Tensor) -> Any:
        return self.tail(self, x, r)


def fused(tail: Tail, dtype: torch.dtype = torch.float32) -> str:
    """The text after the passes; results agree to what the order of roundings can change."""
    module, x, r = Net(tail, dtype), torch.randn(3, 32).to(dtype), torch.randn(3, 16).to(dtype)
    want = module(x.clone(), r.clone())
    gm, work = traced(module, x.clone(), r.clone())
    run_passes(work, [merge_siblings, fuse_epilogues, clean_up])
    gm.recompile()
    got = gm(x.clone(), r.clone())
    # At most five roundings of values below 2⁸ (sums of 32 products) in the type itself.
    unit = 5 * (2.0**-8 if dtype is torch.bfloat16 else 2.0**-24)
    torch.testing.assert_close(got, want, rtol=4 * unit, atol=2**5 * unit)
    assert not fuse_epilogues.run(work), "a second run changes nothing"
    assert len(work.notes) == len({*work.notes})
    return text(work.graph)


def swiglu(net: Net, x: Tensor, r: Tensor) -> Tensor:
    y: Tensor = net.c(F.silu(net.a(x)) * net.b(x))
    return x + y


def test_golden() -> None:
    _, work = traced(Net(swiglu), torch.randn(3, 32), torch.randn(3, 16))
    assert text(work.graph) == BEFORE
    assert fused(swiglu) == AFTER


BEFORE = """\
%x : f32[3, 32] = placeholder
%r : f32[3, 16] = placeholder
%a_values : uint8[256] = get_attr a.values
%a_scales : f16[16, 2] = get_attr a.scales
%4 : f32[3, 16] = sparsefx.linear(%x, [%a_values, %a_scales], None, [], 'int4g16', 16)
%5 : f32[3, 16] = silu(%4, inplace=False)
%b_bias : f32[16] = get_attr b.bias
%b_values : uint8[256] = get_attr b.values
%b_scales : f16[16, 2] = get_attr b.scales
%9 : f32[3, 16] = sparsefx.linear(%x, [%b_values, %b_scales], %b_bias, [], 'int4g16', 16)
%10 : f32[3, 16] = mul(%5, %9)
%c_values : uint8[256] = get_attr c.values
%c_scales : f16[32, 1] = get_attr c.scales
%13 : f32[3, 32] = sparsefx.linear(%10, [%c_values, %c_scales], None, [], 'int4g16', 32)
%14 : f32[3, 32] = add(%x, %13)
return %14"""
AFTER = """\
%x : f32[3, 32] = placeholder
%r : f32[3, 16] = placeholder
%a_values : uint8[256] = get_attr a.values
%a_scales : f16[16, 2] = get_attr a.scales
%b_values : uint8[256] = get_attr b.values
%b_scales : f16[16, 2] = get_attr b.scales
%b_bias : f32[16] = get_attr b.bias
%7 : f32[3, 16] = sparsefx.fused(%x, [%a_values, %a_scales, %b_values, %b_scales], \
[None, %b_bias], [], 'int4g16|int4g16', [16, 16], 'silu', None, None)
%c_values : uint8[256] = get_attr c.values
%c_scales : f16[32, 1] = get_attr c.scales
%10 : f32[3, 32] = sparsefx.linear(%7, [%c_values, %c_scales], None, [], 'int4g16', 32)
%11 : f32[3, 32] = add(%x, %10)
return %11"""

ONE = {
    "activation": lambda n, x, r: F.silu(n.b(x)),
    "method": lambda n, x, r: n.b(x).relu(),
    "gelu": lambda n, x, r: F.gelu(n.b(x)),
    "tanh": lambda n, x, r: F.gelu(n.a(x), approximate="tanh"),
    "aten": lambda n, x, r: torch.ops.aten.silu.default(n.a(x)),
    "bias": lambda n, x, r: F.relu(n.a(x) + n.bias),
    "residual": lambda n, x, r: r + F.relu(n.b(x)),
    "torch.add": lambda n, x, r: torch.add(n.b(x).relu(), r),
    "all": lambda n, x, r: torch.mul(F.gelu(n.a(x) + n.bias), r.sin()) + r,
    "casts": lambda n, x, r: F.silu(n.b(x).float()).to(x.dtype) * r,
    "gate": lambda n, x, r: F.silu(n.a(x)) * n.b(x),
    "gate, the other order": lambda n, x, r: n.b(x) * F.gelu(n.a(x)) + r,
}


@pytest.mark.parametrize("tail", ONE.values(), ids=ONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_op_is_left(tail: Tail, dtype: torch.dtype) -> None:
    lines = [line for line in fused(tail, dtype).splitlines() if "get_attr" not in line]
    kept = [line for line in lines if "placeholder" not in line and "sin(" not in line]
    assert len(kept) == 2, kept
    assert "sparsefx.fused(" in kept[0]


def edited(n: Net, x: Tensor, r: Tensor) -> Tensor:
    y: Tensor = n.a(x)
    x.mul_(2)
    return y + r


def squared(n: Net, x: Tensor, r: Tensor) -> Tensor:
    y: Tensor = n.a(x)
    return y * y


def read_twice(n: Net, x: Tensor, r: Tensor) -> Tensor:
    y: Tensor = n.a(x)
    return F.silu(y) + y


LEFT = {
    "broadcast": lambda n, x, r: n.a(x) + r[:1],
    "scalar": lambda n, x, r: n.a(x) * 2,
    "alpha": lambda n, x, r: torch.add(n.a(x), r, alpha=2),
    "square": squared,
    "another type": lambda n, x, r: n.a(x) + r.double(),
    "in place": lambda n, x, r: F.relu(n.a(x), inplace=True),
    "another activation": lambda n, x, r: torch.tanh(n.a(x)),
    "x is edited": edited,
    "two readers": read_twice,
    "an addition alone": lambda n, x, r: r + n.b(x),
    "a longer bias": lambda n, x, r: n.a(x) + r[0, :1],
}


@pytest.mark.parametrize("tail", LEFT.values(), ids=LEFT)
def test_what_cannot_be_fused_is_left(tail: Tail) -> None:
    assert "sparsefx.fused(" not in fused(tail)


def test_steps_stop_where_their_order_does() -> None:
    """Residual, then activation: the op adds last, so the activation stays."""
    shown = fused(lambda n, x, r: F.silu(F.relu(n.a(x)) + r))
    assert shown.count("sparsefx.fused(") == shown.count("silu(") == 1


def test_a_gate_leaves_other_products_of_x_merged() -> None:
    def tail(n: Net, x: Tensor, r: Tensor) -> Any:
        gate = F.silu(n.a(x)) * n.b(x)
        return LINEAR(x, n.a.buffer_list, None, [], n.a.format, 16), gate, n.b(x)

    shown = fused(tail)
    assert [shown.count(f"sparsefx.{op}(") for op in ("linears", "fused", "linear")] == [1, 1, 0]


def test_epilogues_that_cannot_be_are_no_legal_graph() -> None:
    gm, work = traced(Net(swiglu), torch.randn(3, 32), torch.randn(3, 16))
    run_passes(work, [merge_siblings, fuse_epilogues])
    (node,) = [
        n for n in gm.graph.nodes if n.kwargs == {} and len(n.args) == 9 and n.args[6] == "silu"
    ]
    for place, value, says in ((6, "tanhh", "no activation 'tanhh'"), (5, [16, 8], "two of one n"),
                               (2, [None, None, None], "2 formats need")):  # fmt: skip
        before = node.args
        node.args = (*before[:place], value, *before[place + 1 :])
        assert says in str(verify(gm.graph))
        node.args = before


class Wide(nn.Module):
    """A gate of few columns, of an x of many that another product reads as well."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.a, self.b, self.c = layer(16, k), layer(16, k), layer(16, k)

    def forward(self, x: Tensor) -> Any:
        return F.silu(self.a(x)) * self.b(x), self.c(x)


@pytest.mark.parametrize("k", [64, 512])
def test_a_gate_whose_x_would_be_read_again_is_left(k: int) -> None:
    """4096 rows: reading x costs more than a call; the manager checks `never_slower`."""
    gm, work = traced(Wide(k), torch.randn(4096, k))
    run_passes(work, [merge_siblings, fuse_epilogues, clean_up])
    shown = text(gm.graph)
    assert (shown.count("sparsefx.fused("), shown.count("silu(")) == ((1, 0) if k == 64 else (0, 1))


# --- clean-up ------------------------------------------------------------------------------------


class Run(nn.Module):
    """`run(x)`, or `run(layer, x)` where there is a layer."""

    def __init__(self, run: Callable[..., Any], own: nn.Module | None) -> None:
        super().__init__()
        self.run, self.own = run, own

    def forward(self, x: Tensor) -> Any:
        return self.run(x) if self.own is None else self.run(self.own, x)


def cleaned(run: Callable[..., Any], x: Tensor, own: nn.Module | None = None) -> list[str]:
    """Calls left of `run` by `clean_up`; results, x, and what shares memory are as before."""
    module, first, second = Run(run, own), x.clone(), x.clone()
    want = module(first)
    gm, work = traced(module, x.clone())
    run_passes(work, [clean_up])
    gm.recompile()
    got = gm(second)
    for a, b in zip((*got, second), (*want, first), strict=True):
        assert torch.equal(a, b)
    spaces = [len({t.untyped_storage()._cdata for t in ts}) for ts in (got, want)]
    assert spaces[0] == spaces[1]
    return [n.name for n in gm.graph.nodes if n.op in ("call_function", "call_method")]


def test_equal_expressions_are_computed_once() -> None:
    assert len(cleaned(lambda x: [x.sin() + 1, (x.sin() + 1) * 2], torch.randn(4))) == 4
    assert cleaned(lambda x: [x.sin() * x.sin()], torch.randn(4)) == ["sin", "mul"]
    assert cleaned(lambda x: [x[1:].exp() * x[1:].exp()], torch.randn(4)).count("exp") == 1


def test_what_is_random_edited_or_handed_out_keeps_its_own() -> None:
    assert len(cleaned(lambda x: [x.sin(), x.sin()], torch.randn(4))) == 2

    def edits(x: Tensor) -> Any:
        a = x.sin()
        x.add_(1)
        return [a * x.sin()]

    assert cleaned(edits, torch.randn(4)).count("sin_1") == 1

    def edited(x: Tensor) -> Any:
        a, b = x.sin(), x.sin()
        a.add_(1)
        return [a * b]

    assert len(cleaned(edited, torch.randn(4))) == 4
    torch.manual_seed(0)
    _, work = traced(Dropped(), torch.randn(4))
    clean_up.run(work)
    assert text(work.graph).count("rand_like") == 2


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x) - torch.rand_like(x)


def test_a_method_that_edits_and_whose_result_no_one_reads_stays() -> None:
    def edits(x: Tensor) -> Any:
        y = x.sin()
        y.mul_(2)
        return [y * 1]

    assert cleaned(edits, torch.randn(4)) == ["sin", "mul_", "mul"]


def test_identities_go() -> None:
    assert cleaned(lambda x: [x.sin().to(torch.float32).cos() + 1], torch.randn(4)) == [
        "sin", "cos", "add",
    ]  # fmt: skip
    assert cleaned(
        lambda x: [F.dropout(x.sin(), 0.5, False).cos() + 1], torch.randn(4)
    ) == ["sin", "cos", "add"]  # fmt: skip
    half = torch.randn(4).bfloat16()
    assert "to" not in cleaned(lambda x: [x.sin().float().to(torch.bfloat16).cos() + 1], half)
    narrowing = cleaned(lambda x: [x.sin().bfloat16().to(torch.float32).cos() + 1], torch.randn(4))
    assert "to" in narrowing
    assert "contiguous" in cleaned(lambda x: [x.sin().T.contiguous().cos() + 1], torch.randn(4, 3))


def test_duplicate_unpacking_and_branches_of_zeros_go() -> None:
    own, graph = layer(16, 32, "int4g16+r8"), fx.Graph()
    x = graph.placeholder("x")
    buffers = [graph.get_attr(key) for key in own.keys]
    tail = (own.format, 16, 32, torch.float32)
    first, second = (graph.call_function(UNPACK, (buffers, *tail)) for _ in range(2))
    dense = graph.call_function(torch.sub, (first, second))
    zeros = graph.call_function(torch.zeros, (8,))
    branch = [graph.get_attr("down"), graph.get_attr("up"), zeros]
    y = graph.call_function(LINEAR, (x, buffers, None, branch, own.format, 16))
    graph.output((y, dense))
    gm, given = fx.GraphModule(own, graph), torch.randn(3, 32)
    want = gm(given)
    run_passes(Traced(gm.graph, {}), [clean_up])
    gm.recompile()
    assert all(torch.equal(a, b) for a, b in zip(gm(given), want, strict=True))
    shown = text(gm.graph)
    assert (shown.count("unpack("), shown.count("zeros("), shown.count("get_attr up")) == (1, 0, 0)
