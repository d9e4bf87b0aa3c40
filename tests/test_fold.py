"""Folding by text: what goes in, what comes out, that it is exact, and what is left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_transformers import moved, output, then, tiny
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparsefx.ir.capture import placeholder_weights
from sparsefx.ir.format import Format
from sparsefx.ir.products import uses
from sparsefx.ir.sites import ChosenFormat, Site, Traced
from sparsefx.ir.text import text
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.fold import fold
from sparsefx.passes.manager import run_passes
from sparsefx.passes.normalise import normalise
from sparsefx.passes.pack import pack
from sparsefx.passes.release import release
from sparsefx.passes.spec import Spec
from sparsefx.runtime.backend import _choose


def traced(module: nn.Module, example: Tensor, chosen: str = "") -> tuple[fx.GraphModule, Traced]:
    """The exported graph over the module's own parameters; linear products are to be stored as
    `chosen` if given.
    """
    gm = torch.export.export(module, (example,)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    names = dict(gm.named_parameters(remove_duplicate=False))
    weights = {n: names[str(n.target)] for n in gm.graph.nodes if str(n.target) in names}
    work = Traced(gm.graph, dict(weights))
    for use in uses(gm.graph, weights) if chosen else ():
        if use.kind in ("linear", "conv1x1"):
            shape = tuple(weights[use.weight].shape)
            site = Site((str(use.weight.target),), shape, use.kind, use.transposed)
            work.chosen[use.weight] = ChosenFormat(site, Format.parse(chosen))
    return gm, work


class Model(nn.Module):
    """Parts that `run` puts together, float64 with random vectors."""

    def __init__(self, run: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 5, bias=False)
        self.conv, self.point = nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(6, 8, 1, bias=False)
        self.bn, self.bn1, self.ln = nn.BatchNorm2d(8), nn.BatchNorm1d(8), nn.LayerNorm(6)
        self.gain = nn.Parameter(torch.rand(6) + 0.5)
        self.shift = nn.Buffer(torch.randn(6))
        self.image = nn.Buffer(torch.randn(6, 1, 1))
        self.full = nn.Buffer(torch.randn(3, 6))
        self.run = run
        self.double().eval().requires_grad_(False)
        for tensor in (*self.ln.parameters(), *self.bn.parameters(), *self.bn1.parameters()):
            tensor.uniform_(0.5, 2)
        for norm in (self.bn, self.bn1):
            norm.get_buffer("running_mean").uniform_(-1, 1)
            norm.get_buffer("running_var").uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


ROWS = torch.randn(3, 6, dtype=torch.float64)
IMAGE = torch.randn(2, 6, 4, 4, dtype=torch.float64)
Case = tuple[Callable[[Model, Tensor], Tensor], Tensor]
FOLDED: dict[str, Case] = {
    "gain": (lambda m, x: m.a(m.gain * torch.sin(x)) + m.b(x).sum(), ROWS),
    "gain of two": (lambda m, x: then(x.sin() * m.gain, lambda y: m.a(y).sum() + m.b(y)), ROWS),
    "number": (lambda m, x: m.a(x * 3.0) * 0.5, ROWS),
    "quotient": (lambda m, x: m.a(torch.sin(x) / 4) / m.bn1.running_var, ROWS),
    "sums": (lambda m, x: m.a(torch.sin(x) + m.shift) - m.bn.running_mean, ROWS),
    "sum without bias": (lambda m, x: m.b(torch.sin(x) - m.shift), ROWS),
    "layer norm": (lambda m, x: m.a(m.ln(x)) + m.b(x).sum(), ROWS),
    "rms norm": (lambda m, x: m.b(F.rms_norm(x, (6,), m.gain)), ROWS),
    "batch norm": (lambda m, x: m.bn(m.conv(x)), IMAGE),
    "batch norm, point": (lambda m, x: m.bn(m.point(x)), IMAGE),
    "batch norm, linear": (lambda m, x: m.bn1(m.a(x)), ROWS),
    "image": (lambda m, x: m.point(torch.sin(x) * m.image + 1.5), IMAGE),
    "chain": (lambda m, x: m.bn1(2.0 * m.a((x * m.gain + m.shift) / 3)) + m.bn.bias, ROWS),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_folds_are_exact(case: str) -> None:
    run, x = FOLDED[case]
    model = Model(run)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    want = model(x)
    gm, work = traced(model, x)
    size = len(gm.graph.nodes)
    run_passes(work, [normalise, fold, clean_up])
    gm.recompile()
    assert "folded_" in text(work.graph)
    assert len(gm.graph.nodes) <= size
    assert not any(name in text(work.graph) for name in (" mul(", "div(", "batch_norm(", "gain"))
    assert moved(gm(x), want) < 1e-12
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not fold.run(work), "a second run changes nothing"


LEFT: dict[str, tuple[Callable[[Model, Tensor], Tensor], Tensor, str]] = {
    "conv twice": (lambda m, x: m.bn(m.conv(x)) + m.conv(x), IMAGE, "used by another op"),
    "weight read": (lambda m, x: m.a(x * m.gain) + m.a.weight.sum(), ROWS, "used by another op"),
    "other reader": (lambda m, x: then(x.sin() * m.gain, lambda y: m.a(y).sum() + y), ROWS,
                     "read by more than plain products"),
    "per element": (lambda m, x: m.a(x * m.full), ROWS, "not one value per channel"),
    "groups": (lambda m, x: then(x * m.image, lambda y: m.conv(y).sum() + m.point(y)), IMAGE,
               "read by more than plain products"),
    "running": (lambda m, x: F.batch_norm(m.a(x), m.bn1.running_mean, m.bn1.running_var,
                                          training=True), ROWS, "training mode"),
    "written": (lambda m, x: then(x.sin(), lambda y: m.b(then(y * 2, lambda z: (y.add_(1), z)[1]))),
                ROWS, "writes to what it reads"),
    "constant written": (lambda m, x: m.b(x.sin() * m.shift) + m.shift.add_(1).sum(), ROWS,
                         "may be written to"),
    "wrong axis": (lambda m, x: m.bn1(m.a(x[:1].expand(2, 8, 6))), ROWS, "not over"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_says_why(case: str) -> None:
    run, x, reason = LEFT[case]
    model = Model(run)
    _, work = traced(model, x)
    before = text(work.graph)
    fold.run(work)
    assert text(work.graph) == before
    assert any(reason in note for note in work.notes)


NORMS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "layer norm": lambda m, x: F.layer_norm(m.a(x), (8,), m.bn1.weight, m.bn1.bias),
    "rms norm": lambda m, x: F.rms_norm(m.a(x), (8,), m.bn1.weight),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_behind_a_product_stays(norm: str) -> None:
    model = Model(NORMS[norm])
    gm, work = traced(model, ROWS)
    assert not fold.run(work)
    gm.recompile()
    assert torch.equal(gm(ROWS), model(ROWS))


def test_shared_weights_are_left() -> None:
    """pytorch/ao#2795: two modules hold one parameter; each fold would meet the other's."""
    other = nn.Conv2d(6, 8, 1, bias=False)
    model = Model(lambda m, x: m.bn(m.point(x)) + m.bn(other(x)))
    other.weight = model.point.weight
    model.add_module("other", other)
    _, work = traced(model, IMAGE)
    assert not fold.run(work)
    assert len(work.notes) == 2
    assert all("another" in note for note in work.notes)
    other.weight = nn.Parameter(model.point.weight.data[:], requires_grad=False)
    _, work = traced(model, IMAGE)
    assert not fold.run(work)
    assert all("shares its memory" in note for note in work.notes)


def test_a_reused_convolution_keeps_its_values() -> None:
    """pytorch#197539: one convolution before two batch norms."""
    model = Model(lambda m, x: m.bn(m.point(x)) - m.bn1(m.point(x).flatten(2)[:, :, 0]).sum())
    want = model(IMAGE)
    gm, work = traced(model, IMAGE)
    run_passes(work, [normalise, fold, clean_up])
    gm.recompile()
    assert torch.equal(gm(IMAGE), want)


def test_what_may_be_trained_stays() -> None:
    model = Model(FOLDED["gain"][0])
    model.gain.requires_grad_(True)
    _, work = traced(model, ROWS)
    assert not fold.run(work)
    assert work.notes == ["mul %mul stays: gain may still be trained"]
    model.a.weight.requires_grad_(True)
    model.gain.requires_grad_(False)
    _, work = traced(model, ROWS)
    assert not fold.run(work)
    assert "not to be packed" in work.notes[0]
    _, work = traced(model, ROWS, chosen="int8")
    assert fold.run(work), "a weight that is packed is not trained"


class Golden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, 2.0, 3.0, -1.0]))
        self.product = nn.Linear(4, 8, bias=False)
        self.mean, self.var = nn.Buffer(torch.randn(8)), nn.Buffer(torch.rand(8) + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(self.gain * torch.sin(x))
        return F.batch_norm(y, self.mean, self.var) / 2


def test_golden_and_packed() -> None:
    torch.manual_seed(0)
    model = Golden().eval().requires_grad_(False)
    x = torch.randn(3, 4)
    want = model(x)
    gm, work = traced(model, x, chosen="fp32")
    assert text(work.graph) == BEFORE
    run_passes(work, [normalise, fold, clean_up])
    assert text(work.graph) == AFTER
    run_passes(work, [pack, clean_up, release])
    assert not [n for n, t in gm.named_buffers() if n.startswith("folded_") and t.dim() > 1]
    gm.recompile()
    # The weight is rounded once more, and 4 products are summed in another order.
    torch.testing.assert_close(gm(x), want, rtol=6 * 2**-23, atol=1e-6)


def test_norms_of_a_compiled_llama_fold_into_packed_weights() -> None:
    """Dynamo's graph, where parameters are inputs: q, k, v, gate and up take their norms' factors;
    the head reads a slice of its norm's output, which stays.
    """
    model = tiny("gqa", torch.float32)
    want = output(model)
    seen: list[tuple[str, list[str]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        work = Traced(gm.graph, placeholder_weights(gm, inputs))
        _choose(work, Spec.read("fp32"))
        gains = {n for n, t in work.weights.items() if t.dim() == 1}
        run_passes(work, [normalise, fold, pack, clean_up, release])
        gm.recompile()
        seen.append((text(gm.graph), [n.name for n in gains if n.users]))
        assert not [n for n, t in gm.named_buffers() if n.startswith("folded_") and t.dim() > 1]
        return gm.forward

    torch._dynamo.reset()
    model.compile(backend=backend)
    got = output(model)
    assert [gains for _, gains in seen] == [
        ["l_self_modules_model_modules_norm_parameters_weight_"]
    ]
    assert seen[0][0].count("sparsefx.linear(") == 15
    # Two layers; the fold rounds each weight once more, sums are made in other orders.
    assert moved(got, want) < 100 * 2**-24


def test_many_products_take_time_in_proportion() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(500)]).requires_grad_(False)
    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            weights[graph.get_attr(name)] = parameter
    for weight in weights:
        x = graph.call_function(torch.ops.aten.linear.default, (x, weight, None))
        x = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
    graph.output(x)
    work = Traced(fx.GraphModule(model, graph).graph, {})
    attributes = [n for n in work.graph.nodes if n.op == "get_attr"]
    work.weights = dict(zip(attributes, weights.values(), strict=True))
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    sys.setprofile(count)
    try:
        fold.run(work)
    finally:
        sys.setprofile(None)
    assert "mul" not in text(work.graph)
    assert steps < 500 * 2000, f"{steps / 500:.0f} calls per product"


BEFORE = """\
%gain : f32[4] = get_attr gain
%product_weight : f32[8, 4] = get_attr product.weight
%mean : f32[8] = get_attr mean
%var : f32[8] = get_attr var
%x : f32[3, 4] = placeholder
%5 : f32[3, 4] = sin(%x)
%6 : f32[3, 4] = mul(%gain, %5)
%7 : f32[3, 8] = linear(%6, %product_weight)
%8 : f32[3, 8] = batch_norm(%7, None, None, %mean, %var, False, 0.1, 1e-05, False)
%9 : f32[3, 8] = div(%8, 2)
return [%9]"""

AFTER = """\
%folded_product_weight_bias = get_attr folded_product_weight_bias
%folded_product_weight : f32[8, 4] = get_attr folded_product_weight
%x : f32[3, 4] = placeholder
%3 : f32[3, 4] = sin(%x)
%4 : f32[3, 8] = linear(%3, %folded_product_weight, %folded_product_weight_bias)
return [%4]"""
