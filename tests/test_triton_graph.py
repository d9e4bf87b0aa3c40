"""Products as Triton launches inside compiled graphs: numbers in Triton's interpreter, and runs on
a GPU (`make test-gpu`). What Inductor makes of them without one is in `test_triton_lowering`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_triton_fused import N, made, within
from torch import Tensor, nn
from triton_cases import (
    BF16,
    FP16,
    ROW,
    STEEP,
    TINY,
    UNIT,
    Case,
    Extras,
    expected,
    random_branch,
    reals,
    seeded,
)
from triton_interpreter import interpreted

import sparsefx
from sparsefx.codegen import triton, triton_fused
from sparsefx.ir.capture import placeholder_weights
from sparsefx.ir.errors import StaleWeightError
from sparsefx.ir.fused import FUSED, LINEARS, Part, arguments
from sparsefx.ir.op import LINEAR
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import Pass
from sparsefx.runtime import backend, triton_graph

torch.set_num_threads(1)
GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
on_gpu = pytest.mark.skipif(not GPU, reason="torch finds no GPU here")
TEXTS = [("int4g32+r3", "columns", FP16), ("2:4+int8+a8", "masked", BF16)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def interpreting() -> None:
    interpreted()


def here(traced: Traced) -> bool:
    """`triton_ops`, of weights on this machine."""
    return triton_graph.show(traced, "cpu")


class Rewritten:
    """A backend that rewrites and runs as it is, and keeps what it was given."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.seen: list[Traced] = []
        self.changed: list[bool] = []

    def __call__(self, gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        traced = Traced(gm.graph, placeholder_weights(gm, inputs))
        self.changed.append(triton_graph.show(traced, self.device))
        self.seen.append(traced)
        gm.graph.lint()
        gm.recompile()
        run: Callable[..., Any] = gm.forward
        return run

    def count(self, name: str) -> int:
        """Calls of a `sparsefx` op in the only graph."""
        (traced,) = self.seen
        return sum(str(n.target) == f"sparsefx.{name}.default" for n in traced.graph.nodes)


Outputs = tuple[list[Tensor], Tensor, Tensor]


def operands(x: Tensor) -> dict[str, Tensor]:
    """Of the results' shape; neither lies in memory as kernels read it."""
    return {"multiply": x[:, :N], "residual": x[:, N : 2 * N]}


def products(parts: Sequence[Part]) -> Callable[[Tensor], Outputs]:
    """q, k and v as one op, a gated pair, and one product with every epilogue."""
    q, pair, one = arguments(parts[:3]), arguments(parts[3:5]), arguments(parts[5:])

    def run(x: Tensor) -> Outputs:
        multiply, residual = operands(x).values()
        gated = FUSED(x, *pair, "silu", multiply, residual)
        return LINEARS(x, *q), gated, FUSED(x, *one, "gelu", multiply, residual)

    return run


def check_products(got: Outputs, cases: Sequence[Case], extras: Sequence[Extras]) -> None:
    """Within the bounds of `test_triton_fused`."""
    ends = operands(cases[0].x)
    for y, case, more in zip(got[0], cases, extras, strict=False):
        within(y, *expected(case, ROW, more))
    asked = replace(extras[5], activation="gelu", **ends)  # type: ignore[arg-type]
    within(got[2], *expected(cases[5], ROW, asked))
    asked = replace(extras[3], activation="silu", multiply=ends["multiply"])
    dtype, residual = cases[0].x.dtype, ends["residual"].double()
    (gate, off), (other, wide) = expected(cases[3], ROW, asked), expected(cases[4], ROW, extras[4])
    want = gate * other + residual
    bound = wide * (gate.abs() + off) + other.abs() * off
    bound = bound + 2 * UNIT[torch.float32] * ((gate * other).abs() + want.abs())
    within(got[1], want, bound * (1 + UNIT[dtype]) + UNIT[dtype] * want.abs() + TINY[dtype])


@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize("case", TEXTS, ids=str)
def test_one_graph_serves_any_number_of_rows(case: tuple[str, str, torch.dtype]) -> None:
    """Compiled once, for 5 rows; every epilogue and merged products, within the derived bounds."""
    cases, extras, parts = made(*case, 33, 6)
    rewritten = Rewritten()
    run = torch.compile(products(parts), backend=rewritten)
    for m in (5, 3, 33):
        some = [replace(one, x=cases[0].x[:m].clone()) for one in cases]
        torch._dynamo.mark_dynamic(some[0].x, 0)
        with torch.no_grad():
            check_products(run(some[0].x), some, extras)
    assert (len(rewritten.seen), rewritten.changed) == (1, [True])
    assert rewritten.seen[0].notes == []
    assert [rewritten.count(op) for op in ("triton_linear", "linears", "fused")] == [6, 0, 0]


@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize(
    ("text", "m", "k"),
    [("int4g32+r3", 20, 512), ("2:4+int8+a8", 1, 1024),
     ("tile1x16@50%+uint3g32", 1, 512)],
)  # fmt: skip
def test_known_rows_give_the_opaque_ops_bits(text: str, m: int, k: int) -> None:
    """The same kernels with the same configurations, each product split over tasks."""
    cases = [reals(text, "", m, N, k, seed=seed) for seed in range(6)]
    branch = [random_branch(N, k, 3)] if "+r3" in text else [()]
    bias = torch.randn(N, generator=seeded(9))
    parts = [Part([*c.packed.buffers], bias, [*branch[0]], text, N) for c in cases]
    x, rewritten = cases[0].x, Rewritten()
    with torch.no_grad():
        got = torch.compile(products(parts), backend=rewritten, dynamic=False)(x)
    last = operands(x).values()
    want = (
        triton_fused.linears(x, *arguments(parts[:3])),
        triton_fused.fused(x, *arguments(parts[3:5]), "silu", *last),
        triton_fused.fused(x, *arguments(parts[5:]), "gelu", *last),
    )
    nodes = [n for n in rewritten.seen[0].graph.nodes if "triton_linear" in str(n.target)]
    assert [n.args[1][-1] is not None for n in nodes] == [True] * 6
    for y, other in zip((*got[0], *got[1:]), (*want[0], *want[1:]), strict=True):
        assert torch.equal(y, other)


# --- what stays opaque ---------------------------------------------------------------------------


def one_product(text: str = "int4g32", dtype: torch.dtype = FP16) -> tuple[Part, Tensor]:
    cases, _, parts = made(text, "", dtype, 3, 1)
    return parts[0], cases[0].x


def left(run: Callable[..., Any], *args: Any, device: str = "cpu", grad: bool = False) -> str:
    """The one note on `run`, of which nothing was rewritten."""
    rewritten = Rewritten(device)
    with torch.enable_grad() if grad else torch.no_grad():
        torch.compile(run, backend=rewritten, dynamic=False)(*args)
    assert rewritten.changed == [False]
    (note,) = rewritten.seen[0].notes
    return str(note)


def linear(part: Part) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        y: Tensor = LINEAR(x, part.weight, part.bias, part.branch, part.format, part.n)
        return y

    return run


@pytest.mark.usefixtures("interpreting")
def test_what_stays_opaque_is_told() -> None:
    part, x = one_product()
    run = linear(part)
    assert "gradients are asked for" in left(run, x.clone().requires_grad_(), grad=True)
    assert "weights are on cpu, not cuda" in left(run, x, device="cuda")
    assert "x has no rows" in left(run, x[:0])
    assert "not torch.float32" in left(run, x.float())
    assert "operand" in left(
        lambda x, y: FUSED(x, *arguments([part]), "none", None, y), x, x[:1, :1]
    )
    other, x = one_product("int4g24")
    assert "scale groups of 24" in left(linear(other), x)
    with torch.autocast("cpu", BF16):
        assert "autocast makes torch.bfloat16 of torch.float16" in left(run, x)


@pytest.mark.usefixtures("interpreting")
def test_weights_that_torch_does_not_watch_stay_opaque() -> None:
    with torch.inference_mode():
        part, x = one_product()
    assert "inference tensors" in left(linear(part), x)


@pytest.mark.usefixtures("interpreting")
def test_what_was_measured_slower_stays_opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "configuration", lambda *_: None)
    part, x = one_product()
    assert "measured faster for 3 rows" in left(linear(part), x)


# --- in the backend ------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(64, 32), nn.Linear(64, 32)
        self.down = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(nn.functional.silu(self.q(x)) * self.k(x))
        return h + x


def check_small(got: Tensor, model: Any, x: Tensor) -> None:
    """`got` against a sparsified `Small` run as it is.

    Each rounds results of q, k, silu, their product and both sums once or not at all (u), and with
    int8 activations h once more, by half a step. Sums in float32 are exact beside that.
    """
    u, (q, k) = UNIT[FP16], (m(x).double() for m in (model.q, model.k))
    silu = nn.functional.silu(q)
    h = silu * k
    off = u * (k.abs() * (STEEP * q.abs() + silu.abs()) + 2 * h.abs())
    if "a8" in model.down.format:
        off = off + h.abs().amax(-1, keepdim=True) / 254
    want = model(x).double()
    bound = off @ model.down.dense().double().abs().T + u * ((want - x).abs() + want.abs())
    within(got, want, 2.01 * bound)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sparsefx", options=options)


@pytest.fixture
def rewriting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The backend as on a GPU, but that Inductor's place is taken by what runs the graph."""
    interpreted()
    modules: list[Any] = []

    def run(gm: Any, _: Sequence[Any]) -> Any:
        modules.append(gm)
        return gm.forward

    monkeypatch.setattr(backend, "triton_ops", Pass(here))
    monkeypatch.setitem(backend.INNER, "inductor", run)
    return modules


def test_edited_buffers_are_noticed(rewriting: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparsified model: graphs compared before and after, and weights that belong to them."""
    monkeypatch.setenv("SPARSEFX_CHECK", "1")
    x = torch.randn(5, 64).half()
    model: Any = sparsefx.sparsify(Small().eval().half(), "int4g32", example_inputs=(x,))
    run = compiled(model)
    with torch.no_grad():
        check_small(run(x), model, x)
        assert "triton_linear" in rewriting[0].code
        line = next(p for p in sparsefx.explain(run, passes=True).passes if p.name == "here")
        assert line.changed
        assert not any("compared nothing" in note for note in line.notes)
        model.down.buffer_list[0].add_(1)
        with pytest.raises(StaleWeightError, match=r"down\.\w+ was edited"):
            run(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_packed_at_compile_time_are_kept_once(rewriting: list[Any], mode: Any) -> None:
    """In the kernels' order: the packed buffers go with the pass."""
    model, x = Small().eval().half(), torch.randn(5, 64).half()
    run = compiled(model, spec="int4g32")
    with mode():
        y = run(x)
    names = [name for name, _ in rewriting[0].named_buffers()]
    assert names
    assert not [name for name in names if not name.startswith("triton_")]
    assert y.shape == x.shape


def test_layers_do_not_share_a_graph(rewriting: list[Any]) -> None:
    """After a graph break one piece of code serves many layers, each with weights of its own."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            torch._dynamo.graph_break()
            return x.relu()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(), Layer()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x), self.second(x)

    x = torch.randn(5, 64).half()
    torch.manual_seed(0)
    model = sparsefx.sparsify(Two().eval().half(), "int8", example_inputs=(x,))
    with torch.no_grad():
        first, second = compiled(model)(x)
    assert len(rewriting) == 3  # the products and the one relu behind them
    assert not torch.equal(first, second)


# --- on a GPU ------------------------------------------------------------------------------------


def on_card(text: str = "int4g32") -> tuple[Any, Any]:
    """A small sparsified model on the card, and the same compiled."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1 would not compile the kernels; run `make test-gpu`")
    x = torch.randn(2, 64).half()
    model = sparsefx.sparsify(Small().eval().half(), text, example_inputs=(x,)).cuda()
    return model, torch.compile(model, backend="sparsefx", fullgraph=True)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("text", ["int4g32", "2:4+int8+a8", "tile16x1@50%+fp8g32"])
def test_open_rows_on_a_gpu(text: str) -> None:
    """Compiled for 5 rows and once more for any number."""
    model, run = on_card(text)
    with torch.no_grad():
        for m in (5, 7, 33, 64, 300, 3000):
            x = torch.randn(m, 64, device="cuda").half()
            check_small(run(x), model, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    passes = [p for p in sparsefx.explain(run, passes=True).passes if p.name == "triton_ops"]
    assert passes
    assert all(p.changed and not p.notes for p in passes)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("cudagraphs", [False, True])
@pytest.mark.parametrize("m", [1, 5])
def test_cuda_graphs_on_a_gpu(m: int, cudagraphs: bool) -> None:
    """Recorded by hand around the compiled model, or by Inductor inside it."""
    model, run = on_card()
    patch = torch._inductor.config.patch("triton.cudagraphs", True) if cudagraphs else nullcontext()
    x = torch.randn(m, 64, device="cuda").half()
    with torch.no_grad(), patch:
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            y = run(x)
        if not cudagraphs:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = run(x)
        for _ in range(2):
            x.copy_(torch.randn(m, 64))
            if cudagraphs:
                y = run(x)
            else:
                graph.replay()
            check_small(y, model, x)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
