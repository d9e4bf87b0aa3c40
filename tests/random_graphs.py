"""How random graphs are put together; `random_graph_steps` says of what.

Values are float64, so that a reordered sum differs by 1e-12 and a wrong one by much more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import LINEAR
from sparsefx.ir.sites import ChosenFormat, Traced

WIDTHS = (16, 32)
FORMATS = ("int8", "int4g16", "2:4+int8", "bitmap@50%+int4g16", "fp32")
ROWS = 5


@dataclass
class Drawn:
    """A graph with lifted parameters: `gm(*tensors, *inputs(rows))`."""

    seed: int
    gm: fx.GraphModule
    tensors: list[Tensor]
    widths: list[int]
    weights: dict[fx.Node, Tensor]
    chosen: dict[fx.Node, ChosenFormat]
    casts: bool
    """Whether some of it computes in float32."""
    dynamic: bool

    def traced(self) -> Traced:
        """What the passes work on."""
        return Traced(self.gm.graph, dict(self.weights), dict(self.chosen))

    def inputs(self, rows: int) -> list[Tensor]:
        """New inputs with that many rows."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + rows)
        return [torch.randn(rows, w, generator=generator, dtype=torch.float64) for w in self.widths]


@cache
def packed_weight(text: str, n: int, k: int, number: int) -> Packed:
    """One of the packed (n, k) weights that all graphs draw from."""
    generator = torch.Generator().manual_seed(number)
    return Format.parse(text).pack(torch.randn(n, k, generator=generator) / k**0.5)


@dataclass
class Value:
    """A node that stands for (rows, width) float64."""

    node: fx.Node
    width: int


@dataclass
class Builder:
    """Draws one graph step by step."""

    seed: int
    graph: fx.Graph = field(default_factory=fx.Graph)
    tensors: list[Tensor] = field(default_factory=list)
    holders: list[fx.Node] = field(default_factory=list)
    weights: dict[fx.Node, Tensor] = field(default_factory=dict)
    chosen: dict[fx.Node, ChosenFormat] = field(default_factory=dict)
    packed: list[tuple[Packed, list[fx.Node]]] = field(default_factory=list)
    dense: list[tuple[fx.Node, int, int]] = field(default_factory=list)
    pool: list[Value] = field(default_factory=list)
    casts: bool = False

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    # --- inputs of the graph ---------------------------------------------------------------------

    def hold(self, tensor: Tensor, weight: bool = False) -> fx.Node:
        """A placeholder for a parameter or a buffer, in front of the graph."""
        tensor = nn.Parameter(tensor, requires_grad=False) if weight else tensor
        last = self.holders[-1] if self.holders else self.graph._root
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"p{len(self.tensors)}")
        self.tensors.append(tensor)
        self.holders.append(node)
        if weight:
            self.weights[node] = tensor
        return node

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Numbers that float32 holds exactly, as float64."""
        made = torch.randn(*shape, generator=self.generator) * scale
        return made.to(torch.float64)

    def matrix(self, n: int, k: int) -> fx.Node:
        """A dense (n, k) parameter, new or used before."""
        known = [node for node, a, b in self.dense if (a, b) == (n, k)]
        if known and self.rng.random() < 0.3:
            return self.rng.choice(known)
        node = self.hold(self.random(n, k, scale=k**-0.5), weight=True)
        self.dense.append((node, n, k))
        return node

    def buffers(self, n: int, k: int) -> tuple[Packed, list[fx.Node]]:
        """Buffers of a packed (n, k) weight, new or used before."""
        known = [entry for entry in self.packed if (entry[0].n, entry[0].k) == (n, k)]
        if known and self.rng.random() < 0.3:
            return self.rng.choice(known)
        packed = packed_weight(self.rng.choice(FORMATS), n, k, self.rng.randrange(2))
        entry = packed, [self.hold(b) for b in packed.buffers]
        self.packed.append(entry)
        return entry

    # --- steps -----------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A function call, or a method call where the target is a name."""
        if isinstance(target, str):
            return self.graph.call_method(target, args, kwargs)
        return self.graph.call_function(target, args, kwargs)

    def keep(self, node: fx.Node, width: int) -> fx.Node:
        """Let later steps read `node`."""
        self.pool.append(Value(node, width))
        return node

    def pick(self, width: int | None = None) -> Value:
        """A value, later ones more often."""
        known = [v for v in self.pool if width is None or v.width == width]
        if not known:
            return self.product(self.pick(), width)
        return known[max(self.rng.randrange(len(known)) for _ in range(2))]

    def product(self, x: Value, n: int | None = None) -> Value:
        """A packed product of x."""
        n = n or self.rng.choice(WIDTHS)
        return Value(self.keep(self.sparse(x.node, n, x.width), n), n)

    def sparse(self, x: Any, n: int, k: int, bias: Any = ...) -> fx.Node:
        packed, nodes = self.buffers(n, k)
        if bias is ...:
            bias = self.hold(self.random(n), weight=True) if self.rng.random() < 0.5 else None
        branch: list[fx.Node] = []
        if self.rng.random() < 0.2:
            branch = [self.hold(t) for t in (self.random(2, k), self.random(n, 2), self.random(2))]
        return self.call(LINEAR, x, nodes, bias, branch, str(packed.format), n)

    def build(self, count: int, steps: Sequence[Callable[[Builder], None]]) -> Drawn:
        widths = [self.rng.choice(WIDTHS) for _ in range(self.rng.randint(1, 2))]
        for i, width in enumerate(widths):
            self.keep(self.graph.placeholder(f"x{i}"), width)
        for _ in range(count):
            self.rng.choice(steps)(self)
        outputs = [self.pool[-1], *self.rng.sample(self.pool, min(2, len(self.pool)))]
        self.graph.output(tuple(v.node for v in outputs[: self.rng.randint(1, 3)]))
        gm = fx.GraphModule(nn.Module(), self.graph)
        drawn = Drawn(
            self.seed, gm, self.tensors, widths, {}, {}, self.casts, self.rng.random() < 0.05
        )
        same = dict(zip(self.graph.nodes, gm.graph.nodes, strict=True))
        drawn.weights = {same[n]: t for n, t in self.weights.items()}
        drawn.chosen = {same[n]: c for n, c in self.chosen.items()}
        _record(drawn)
        return drawn


class _Record(fx.Interpreter):
    """Writes down each node's value."""

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        n.meta["val"] = out
        return out


def _record(drawn: Drawn) -> None:
    """Values on every node, for shapes and shared memory; in some the rows are a symbol."""
    tensors = [*drawn.tensors, *drawn.inputs(ROWS)]
    with torch.no_grad():
        if not drawn.dynamic:
            _Record(drawn.gm).run(*[t.clone() for t in tensors])
            return
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        rows: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
        fakes = [mode.from_tensor(t, static_shapes=True) for t in drawn.tensors]
        fakes += [mode.from_tensor(x, symbolic_context=rows) for x in tensors[len(drawn.tensors) :]]
        FakeTensorProp(drawn.gm, mode).propagate_dont_convert_inputs(*fakes)
