"""Graph passes by their text: what goes in, what comes out; contracts; the pass manager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from sparsefx.ir.capture import _symbolic
from sparsefx.ir.errors import PassError
from sparsefx.ir.format import Format
from sparsefx.ir.sites import ChosenFormat, Site, Traced
from sparsefx.ir.text import text
from sparsefx.ir.verify import verify
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.fuse_unpack import fuse_unpack
from sparsefx.passes.manager import graph_pass, run_passes
from sparsefx.passes.normalise import normalise
from sparsefx.passes.pack import pack


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(8, 4))
        self.b = nn.Parameter(torch.randn(6, 8))
        self.c = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.c, x @ self.a.T, self.b.t()) + torch.sin(x).sum()


def traced(module: nn.Module) -> tuple[fx.GraphModule, Traced]:
    (found,) = _symbolic(module, (), {})
    gm = fx.GraphModule(module, found.graph)
    pairs = zip(gm.graph.nodes, found.graph.nodes, strict=True)
    return gm, Traced(gm.graph, {n: found.weights[m] for n, m in pairs if m in found.weights})


def test_normalise_golden() -> None:
    gm, work = traced(Products())
    x = torch.randn(3, 4)
    before = gm(x)
    assert text(work.graph) == GOLDEN_BEFORE
    run_passes(work, [normalise, clean_up])
    assert text(work.graph) == GOLDEN_AFTER
    gm.recompile()
    torch.testing.assert_close(gm(x), before, rtol=1e-6, atol=1e-6)
    assert not normalise.run(work), "a second run changes nothing"


GOLDEN_BEFORE = """\
%x = placeholder
%c = get_attr c
%a = get_attr a
%3 = T(%a, 'T')
%4 = matmul(%x, %3)
%b = get_attr b
%6 = t(%b)
%7 = addmm(%c, %4, %6)
%8 = sin(%x)
%9 = sum(%8)
%10 = add(%7, %9)
return %10"""

GOLDEN_AFTER = """\
%x = placeholder
%c = get_attr c
%a = get_attr a
%3 = linear(%x, %a, None)
%b = get_attr b
%5 = linear(%3, %b, %c)
%6 = sin(%x)
%7 = sum(%6)
%8 = add(%5, %7)
return %8"""


def test_pack_golden_and_exact() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    gm, work = traced(model)
    weight = next(n for n, t in work.weights.items() if t.dim() == 2)
    site = Site(("0.weight",), (8, 16), "linear")
    work.chosen[weight] = ChosenFormat(site, Format.parse("2:4+int8+r2"))
    run_passes(work, [normalise, pack, clean_up])
    assert (
        text(work.graph)
        .splitlines()[-2]
        .endswith(
            "sparsefx.linear(%input_1, [%packed_0_weight_index, %packed_0_weight_values, "
            "%packed_0_weight_scales], %_0_bias, [%packed_0_weight_down, %packed_0_weight_up, "
            "%packed_0_weight_scale], '2:4+int8+r2', 8)"
        )
    )
    gm.recompile()
    x = torch.randn(3, 16)
    result = work.results[weight]
    down, up, _ = result.branch
    want = x @ (result.packed.unpack() + up.float() @ down.float()).T + model[0].bias
    torch.testing.assert_close(gm(x), want, rtol=1e-5, atol=1e-5)


def test_fuse_unpack_never_makes_the_dense_weight() -> None:
    packed = Format.parse("bitmap@50%+int4g16").pack(torch.randn(8, 16))
    graph = fx.Graph()
    x = graph.placeholder("x")
    buffers = [graph.placeholder(name) for name in packed.format.buffers]
    dense = graph.call_function(
        torch.ops.sparsefx.unpack.default, (buffers, str(packed.format), 8, 16, torch.float32)
    )
    graph.output(graph.call_function(torch.matmul, (x, graph.call_method("t", (dense,)))))
    gm = fx.GraphModule(nn.Module(), graph)
    inputs = (torch.randn(3, 16), *packed.buffers)
    before = gm(*inputs)
    run_passes(Traced(gm.graph, {}), [fuse_unpack, clean_up])
    assert "unpack" not in text(gm.graph)
    gm.recompile()
    # The same sums of 16 products, rounded in another order.
    torch.testing.assert_close(gm(*inputs), before, rtol=16 * 2**-24, atol=1e-5)


def test_a_pass_that_lies_is_named() -> None:
    @graph_pass(ensures=[lambda work: "it promised more"])
    def liar(work: Traced) -> bool:
        return False

    _, work = traced(Products())
    with pytest.raises(PassError, match=r"after liar: it promised more\n%x = placeholder"):
        run_passes(work, [liar])


def test_the_verifier_knows_a_wrong_node() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(
        graph.call_function(torch.ops.sparsefx.linear.default, (x, [x], None, [], "2:4+int8", 8))
    )
    assert "has the buffers ('index', 'values', 'scales')" in str(verify(graph))


def test_print_shows_the_changed_graph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSEFX_PRINT", "changed")
    _, work = traced(Products())
    run_passes(work, [normalise, clean_up])
    shown = capsys.readouterr().err
    assert "# after normalise, changed=True" in shown
