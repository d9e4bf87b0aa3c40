"""The cost model: bytes and multiply-adds counted by hand, symbols, thresholds, fits, pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from benchmarks.cost import evaluate, used
from torch import Tensor, fx, nn
from torch.nn import functional as F

import sparsefx
from sparsefx.codegen.crossover import LEAST, MOST, NEVER, crossing
from sparsefx.ir.format import Format
from sparsefx.ir.fused import FUSED, LINEARS, Part, arguments
from sparsefx.ir.op import LINEAR
from sparsefx.passes.cost import Cost, cost, density, node_costs, stored_bytes
from sparsefx.passes.predict import (
    DEFAULT,
    Machine,
    Sample,
    fit,
    product_seconds,
    sample_seconds,
    slower,
    terms,
    thresholds,
)

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def exported(module: nn.Module, *args: Tensor, dynamic: Any = None) -> fx.Graph:
    graph: fx.Graph = torch.export.export(module.eval(), args, dynamic_shapes=dynamic).graph
    return graph


class Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


CASES: dict[str, tuple[Any, Sequence[tuple[int, ...]], tuple[int, int, int]]] = {
    # function, shapes; bytes (floats of 4), multiply-adds, launches
    "linear": (F.linear, [(3, 5), (7, 5), (7,)], (4 * (15 + 35 + 7 + 21), 3 * 5 * 7, 1)),
    "matmul": (torch.matmul, [(2, 3, 5), (2, 5, 7)], (4 * (30 + 70 + 42), 2 * 3 * 5 * 7, 1)),
    "addmm": (torch.addmm, [(7,), (3, 5), (5, 7)], (4 * (7 + 15 + 35 + 21), 105, 1)),
    "convolution": (
        lambda x, w: F.conv2d(x, w, padding=1, groups=2),
        [(1, 4, 6, 6), (8, 2, 3, 3)],
        (4 * (144 + 144 + 288), 288 * 2 * 9, 1),
    ),
    "attention": (
        F.scaled_dot_product_attention,
        [(2, 4, 6, 8), (2, 4, 10, 8), (2, 4, 10, 8)],
        (4 * (384 + 640 + 640 + 384), 2 * 4 * 6 * 10 * 16, 1),
    ),
    "einsum": (
        lambda x, y: torch.einsum("bij,bjk->bik", x, y),
        [(2, 3, 5), (2, 5, 7)],
        (4 * (30 + 70 + 42), 210, 1),
    ),
    "elementwise": (lambda x: x.relu() + 1, [(3, 5)], (2 * 4 * 30, 0, 2)),
    "views": (lambda x: x.view(5, 3).t()[1:].unsqueeze(0), [(3, 5)], (0, 0, 0)),
    "a copy": (lambda x: x.t().contiguous(), [(3, 5)], (4 * 30, 0, 1)),
    "no copy": (lambda x: x.view(5, 3), [(3, 5)], (0, 0, 0)),
    "a cast": (lambda x: x.half(), [(3, 5)], (15 * 6, 0, 1)),
    "read twice": (lambda x: x * x, [(3, 5)], (4 * 30, 0, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_counted_by_hand(case: str) -> None:
    function, shapes, (size, operations, launches) = CASES[case]
    graph = exported(Call(function), *(torch.randn(shape) for shape in shapes))
    assert cost(graph) == Cost(size, operations, launches)


def test_a_table_is_not_read_whole() -> None:
    graph = exported(Call(F.embedding), torch.tensor([1, 2, 1]), torch.randn(1000, 4))
    assert cost(graph) == Cost(2 * 3 * 16 + 24, 0, 1)


@pytest.mark.parametrize(
    ("text", "share"), [("int8", 1), ("2:4+int4g16", 0.5), ("tile16x1@75%+int4g16", 0.25)]
)
def test_stored_products_count_what_is_stored(text: str, share: float) -> None:
    fmt, n, k, m = Format.parse(text), 64, 128, 3
    packed = fmt.pack(torch.randn(n, k))
    model = nn.Module()
    graph = fx.Graph(model)  # type: ignore[arg-type]
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(m, k)
    for i, buffer in enumerate(packed.buffers):
        model.register_buffer(f"b{i}", buffer)
    buffers = [graph.get_attr(f"b{i}") for i in range(len(packed.buffers))]
    y = graph.call_function(LINEAR, (x, buffers, None, [], text, n))
    y.meta["val"] = torch.empty(m, n)
    graph.output(y)
    assert density(fmt) == share
    assert stored_bytes(fmt, n, k) == packed.stored_bytes
    want = Cost(4 * m * (n + k) + packed.stored_bytes, round(m * n * k * share), 1)
    assert cost(graph) == want
    for i in range(len(buffers)):
        delattr(model, f"b{i}")
    assert cost(graph) == want, "the same from the format alone"


def test_merged_and_fused_products_read_x_once() -> None:
    m, k = 3, 64
    formats = [(Format.parse("int4g16"), 32), (Format.parse("2:4+int8"), 32)]
    graph = fx.Graph()

    def placeholder(name: str, tensor: Tensor) -> fx.Node:
        node = graph.placeholder(name)
        node.meta["val"] = tensor
        return node

    x = placeholder("x", torch.empty(m, k))
    packed = [fmt.pack(torch.randn(n, k)) for fmt, n in formats]
    parts = [
        Part([placeholder(f"w{i}_{j}", b) for j, b in enumerate(p.buffers)], None, [],
             str(p.format), p.n) for i, p in enumerate(packed)
    ]  # fmt: skip
    both = graph.call_function(LINEARS, (x, *arguments(parts)))
    both.meta["val"] = [torch.empty(m, n) for _, n in formats]
    gated = graph.call_function(FUSED, (x, *arguments(parts), "silu", None, x))
    gated.meta["val"] = torch.empty(m, 32)
    graph.output((both, gated))
    size, operations = sum(p.stored_bytes for p in packed), m * 32 * (k + k // 2)
    costs = node_costs(graph)
    assert costs[both] == Cost(4 * m * (k + 64) + size, operations, 1)
    assert costs[gated] == Cost(4 * m * (k + 32 + k) + size, operations, 1), "and the residual"


def test_open_sizes_stay_symbols() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return F.scaled_dot_product_attention(y, y, y)

    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    x = torch.randn(3, 7, 8)
    graph = exported(Net(), x, dynamic=({0: batch, 1: sequence},))
    found = cost(graph)
    seen = next(n for n in graph.nodes if n.name == "x").meta["val"]
    b, s = (side.node.expr for side in seen.shape[:2])
    assert set(found.symbols) == {b, s}
    for sizes in ((3, 7), (5, 2)):
        fixed = cost(exported(Net(), torch.randn(*sizes, 8)))
        assert found.at(**{str(b): sizes[0], str(s): sizes[1]}) == fixed
    assert sympy.degree(found.operations, s) == 2, "attention is quadratic in the sequence"
    assert sympy.degree(found.operations, b) == 1


def test_shapes_that_nobody_recorded_are_counted_as_unknown() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Tanh())).graph
    assert cost(graph).unknown == 2
    assert slower(cost(graph), Cost(launches=99, unknown=1)) is None


def test_the_cost_of_a_graph_is_that_of_its_nodes() -> None:
    graph = exported(Call(F.linear), torch.randn(3, 5), torch.randn(7, 5))
    assert sum(c.bytes for c in node_costs(graph).values()) == cost(graph).bytes


def test_slower_names_the_size() -> None:
    m = sympy.Symbol("m", positive=True)
    small, large = Cost(10**9 * m, 0, 1), Cost(10**6 * m**2, 0, 1)
    why = slower(small, large)
    assert "m = 4096" in str(why), "cheaper for few rows only"
    assert slower(small, small) is None
    assert "slower" in str(slower(Cost(launches=1), Cost(launches=2)))


def line(least: float, most: float, m: sympy.Symbol) -> sympy.Expr:
    slope = (most - least) / (MOST - LEAST)
    return least + slope * (m - LEAST)


def test_thresholds_agree_with_the_measured_crossing() -> None:
    """`codegen.crossover` solves two lines in closed form; this is the general case."""
    m, rng = sympy.Symbol("m"), random.Random(0)
    met = 0
    for _ in range(40):
        engine, rival = ((rng.uniform(1, 2), rng.uniform(3, 8)) for _ in range(2))
        rows = crossing(engine, rival)
        found = thresholds({"engine": line(*engine, m), "rival": line(*rival, m)}, m)
        later = [start for start, name in found if name == "rival" and start > LEAST]
        if LEAST < rows < NEVER:
            met += 1
            assert later, "the rival takes over"
            assert abs(later[0] - rows) <= 1, "rounded there, the first whole row here"
    assert met > 5


def test_thresholds_of_three_kernels() -> None:
    m = sympy.Symbol("m")
    lines = {"few": m, "some": 5 + m / 2, "many": sympy.Integer(20), "never": 30 + m}
    assert thresholds(lines, m) == [(1, "few"), (11, "some"), (31, "many")]


@pytest.mark.parametrize("seed", range(5))
def test_a_fit_finds_the_constants_it_was_made_of(seed: int) -> None:
    rng = random.Random(seed)
    true = Machine({"a": tuple(rng.uniform(1, 9) * 10.0**-e for e in (5, 10, 11, 12, 9))})
    shapes = [(m, n, k) for m in (1, 16, 256) for n in (64, 2048) for k in (512, 4096)]
    samples = [
        Sample("a", m, n, k, size, 0.0) for m, n, k in shapes for size in (n * k, n * k // 2)
    ]
    measured = [Sample(s.family, s.m, s.n, s.k, s.bytes, sample_seconds(true, s)) for s in samples]
    assert fit(measured).families["a"] == pytest.approx(true.families["a"], rel=1e-6)


def test_a_fit_has_no_negative_constants() -> None:
    samples = [Sample("a", 1, 8, 8, size, 10.0 - size / 100) for size in (1, 50, 100, 200, 400)]
    assert min(fit(samples).families["a"]) >= 0


def test_predictions_are_symbolic_in_m() -> None:
    m = sympy.Symbol("m")
    fmt = Format.parse("int4g128+a8")
    seconds = product_seconds(DEFAULT, fmt, m, 4096, 4096)
    assert sympy.degree(seconds, m) == 1
    assert float(seconds.subs(m, 9)) == pytest.approx(product_seconds(DEFAULT, fmt, 9, 4096, 4096))
    assert len(terms(1, 2, 3, 4)) == len(DEFAULT.families["int8 activations"])


@pytest.mark.parametrize("path", sorted(RESULTS.glob("cpu-*.json")), ids=lambda p: p.stem)
def test_the_model_holds_on_every_recorded_machine(path: Path) -> None:
    """Rows that were not fitted; the recorded picture says the same."""
    found = evaluate(used(json.loads(path.read_text())["rows"]))
    assert found["errors"]["held out"]["median"] < 0.2
    tested = [r for r in found["rows"] if r["ours"]]
    assert len(tested) == sum(r["ours"] for r in json.loads(path.read_text())["rows"])


def test_explain_shows_what_passes_saved() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    compiled = torch.compile(
        model, backend="sparsefx", dynamic=True, options={"spec": "int4g32", "inner": "eager"}
    )
    assert not sparsefx.explain(compiled, passes=True).passes, "nothing has run"
    with torch.no_grad():
        compiled(torch.randn(5, 64))
    found = sparsefx.explain(compiled, passes=True)
    pack = next(line for line in found.passes if line.name == "pack")
    assert pack.changed
    assert "→" in pack.bytes
    assert "·s" in pack.operations, "in the open number of rows"
    assert "what each pass did" in str(found)
    assert json.loads(found.to_json())["passes"][0]["name"] == found.passes[0].name
    assert not sparsefx.explain(compiled).passes
