"""What a graph costs: bytes moved, multiply-adds and kernel launches, symbolic in its sizes.

Sizes that dynamo or export left open (batch, sequence) stay symbols of the graph's own shape
environment, so one Cost answers for every size: `cost(graph).at(s0=8, s1=512)`. Nothing here asks a
SymInt for its value, which would specialise the compiled code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from sparsefx.ir.format import Format
from sparsefx.ir.fused import FUSED, LINEARS, Part, parts_of
from sparsefx.ir.op import LINEAR as SPARSE_LINEAR
from sparsefx.ir.products import READS_SHAPE, TRANSPOSES, VIEWS, argument, op_name, value

Size: TypeAlias = "int | sympy.Expr"
"""A number of things: an int where all sizes are known, else an expression in the open ones."""

COPIES = {"clone", "contiguous", "to", "_to_copy", "type", "float", "half", "bfloat16", "type_as",
          "lift_fresh_copy", "index_select", "cpu", "cuda"}  # fmt: skip
"""Of `VIEWS`, those that may write a new tensor."""
FREE = {"movedim", "swapdims", "_reshape_alias", "unsafe_chunk", "t_", "_unsafe_view", "squeeze_",
        "unsqueeze_"} | READS_SHAPE | TRANSPOSES | (VIEWS - COPIES)  # fmt: skip
LOOK_UPS = {"embedding", "index", "index_select", "gather", "take", "take_along_dim"}
"""Read as much as they write, not the whole table."""


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, multiply-adds, and kernel launches; 1 launch per op that computes."""

    bytes: Size = 0
    operations: Size = 0
    launches: int = 0
    unknown: int = 0
    """Launches of which bytes and operations are not counted: their shapes were not recorded."""

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The open sizes, by name."""
        free = sympy.sympify(self.bytes).free_symbols | sympy.sympify(self.operations).free_symbols
        return tuple(sorted(free, key=str))

    def at(self, **sizes: int) -> Cost:
        """This Cost with open sizes filled in by name."""
        known = {s: sizes[str(s)] for s in self.symbols if str(s) in sizes}
        size, count = (_plain(sympy.sympify(x).subs(known)) for x in (self.bytes, self.operations))
        return Cost(size, count, self.launches, self.unknown)


def cost(graph: Graph) -> Cost:
    """The sum over all nodes."""
    return total(node_costs(graph).values())


def node_costs(graph: Graph) -> dict[Node, Cost]:
    """The Cost of every node; views, inputs and arithmetic on sizes cost nothing."""
    return {node: node_cost(node) for node in graph.nodes}


def total(costs: Iterable[Cost]) -> Cost:
    """The sum, gathering equal expressions first: sympy adds each kind once."""
    sums: tuple[Counter[Any], Counter[Any]] = (Counter(), Counter())
    launches = unknown = 0
    for one in costs:
        launches, unknown = launches + one.launches, unknown + one.unknown
        sums[0][one.bytes] += 1
        sums[1][one.operations] += 1
    size, operations = (_plain(sympy.Add(*(n * kind for kind, n in s.items()))) for s in sums)
    return Cost(size, operations, launches, unknown)


def node_cost(node: Node) -> Cost:
    """The Cost of one node."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Cost()
    name = op_name(node)
    outputs = _tensors(value(node))
    if name in FREE or (name in COPIES and not _copies(name, node, outputs)):
        return Cost()
    if not outputs:
        return Cost(launches=1, unknown=1) if value(node) is None else Cost()
    written = sum_of(map(size_bytes, outputs))
    if (ours := _parts(node)) is not None:
        return _sparse(node, *ours, outputs)
    if name in LOOK_UPS:
        indices = [size_bytes(t) for i in node.all_input_nodes[1:] for t in _tensors(known(i))]
        return Cost(2 * written + sum_of(indices), 0, 1)
    read = sum_of(size_bytes(t) for i in node.all_input_nodes for t in _tensors(known(i)))
    if any(known(i) is None for i in node.all_input_nodes):
        return Cost(launches=1, unknown=1)
    rule = OPERATIONS.get(name)
    return Cost(read + written, 0 if rule is None else rule(node, outputs[0]), 1)


def known(node: Any) -> Any:
    """What a node stands for: as recorded, or the attribute that it names."""
    found = value(node)
    if found is None and isinstance(node, Node) and node.op == "get_attr":
        owner: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            owner = getattr(owner, part, None)
        return owner
    return found


def size_of(side: int | torch.SymInt) -> Size:
    """A side of a shape; a SymInt's expression."""
    return side if isinstance(side, int) else _plain(side.node.expr)


def numel(t: Tensor) -> Size:
    """Elements of `t`."""
    return _sides(t.shape)


def size_bytes(t: Tensor) -> Size:
    """Bytes of the elements of `t`."""
    return numel(t) * t.dtype.itemsize


def sum_of(sizes: Iterable[Size]) -> Size:
    return sum(sizes, start=0)


def _sides(shape: Iterable[int | torch.SymInt]) -> Size:
    return _product(tuple(size_of(side) for side in shape))


@lru_cache(maxsize=1 << 14)
def _product(sides: tuple[Size, ...]) -> Size:
    return prod(sides) if all(isinstance(s, int) for s in sides) else sympy.Mul(*sides)


def _plain(expr: Any) -> Size:
    return int(expr) if sympy.sympify(expr).is_Integer else expr


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, (list, tuple)):
        return [t for t in found if isinstance(t, Tensor)]
    return [found] if isinstance(found, Tensor) else []


def _copies(name: str, node: Node, outputs: list[Tensor]) -> bool:
    source = _tensors(known(node.all_input_nodes[0])) if node.all_input_nodes else []
    same = bool(source and outputs) and source[0].dtype == outputs[0].dtype
    if name == "contiguous" and same:
        return [*map(size_of, source[0].stride())] != [*map(size_of, outputs[0].stride())]
    return name in ("clone", "lift_fresh_copy", "index_select") or not same


@lru_cache(maxsize=256)
def density(fmt: Format) -> float:
    """The share of positions that are stored, as the layout itself selects from noise."""
    layout = fmt.layout
    if (share := getattr(layout, "share", None)) is not None:
        return 1.0 - float(share)
    if not layout.buffers:
        return 1.0
    columns = layout.step * max(1, 256 // layout.step)
    noise = torch.rand(64, columns, generator=torch.Generator().manual_seed(0))
    return float(layout.select(noise).float().mean())


def kept(fmt: Format, n: int, k: int) -> int:
    """Values stored of an (n, k) weight."""
    return round(n * k * density(fmt))


def stored_bytes(fmt: Format, n: int, k: int) -> int:
    """Bytes of an (n, k) weight stored so, without a branch."""
    return -(-fmt.needed_bits(n, k, kept(fmt, n, k), 4) // 8)


def _sparse(node: Node, parts: list[Part], epilogue: list[Node], outputs: list[Tensor]) -> Cost:
    """Stored bytes, x and results once; multiply-adds of stored values and branches."""
    x, out = node.args[0], outputs[0]
    k = _columns(x)
    if k is None or not all(isinstance(part.n, int) for part in parts):
        return Cost(launches=1, unknown=1)
    rows = _plain(sympy.sympify(numel(out)) / max(parts[0].n, 1))
    moved = rows * k * out.dtype.itemsize + sum_of(map(size_bytes, outputs))
    operations: Size = 0
    for part in parts:
        fmt, stored = Format.parse(part.format), [known(b) for b in part.weight]
        whole = all(isinstance(b, Tensor) for b in stored)
        moved += sum_of(map(size_bytes, stored)) if whole else stored_bytes(fmt, part.n, k)
        extra = [t for b in _nodes([part.bias, part.branch]) for t in _tensors(known(b))]
        moved += sum_of(map(size_bytes, extra))
        rank = fmt.rank or (_rank(part.branch) if part.branch else 0)
        operations += rows * (kept(fmt, part.n, k) + rank * (part.n + k))
    moved += sum_of(size_bytes(t) for b in epilogue for t in _tensors(known(b)))
    return Cost(moved, operations, 1)


def _parts(node: Node) -> tuple[list[Part], list[Node]] | None:
    """The weights of one of our products, and what its epilogue reads."""
    args: tuple[Any, ...] = node.args
    if node.target is SPARSE_LINEAR:
        _, weight, bias, branch, text, n = args
        return [Part(list(weight), bias, list(branch), str(text), n)], []
    if node.target in (LINEARS, FUSED):
        return parts_of(*args[1:6]), _nodes(list(args[6:]))
    return None


def _nodes(found: Any) -> list[Node]:
    if isinstance(found, (list, tuple)):
        return [node for part in found for node in _nodes(part)]
    return [found] if isinstance(found, Node) else []


def _columns(x: Any) -> int | None:
    """K of what a sparse product reads; `pack` moves the channels of an image to the end."""
    seen = known(x)
    if isinstance(seen, Tensor):
        return int(seen.shape[-1])
    if isinstance(x, Node) and x.args:
        source = known(x.args[0])
        if x.target is torch.movedim and isinstance(source, Tensor):
            return int(source.shape[1])
        if x.target is torch.movedim and isinstance(x.args[0], Node):
            return _channels(x.args[0])
    return None


def _channels(x: Node) -> int | None:
    source = known(x)
    while source is None and x.args and isinstance(x.args[0], Node):
        x = x.args[0]
        source = known(x)
    return int(source.shape[1]) if isinstance(source, Tensor) else None


def _rank(branch: Any) -> int:
    down = known(_nodes(branch)[0])
    return int(down.shape[0]) if isinstance(down, Tensor) else 0


def _inner(position: int, name: str) -> Callable[[Node, Tensor], Size]:
    """Multiply-adds of a product whose left side is this argument."""

    def rule(node: Node, out: Tensor) -> Size:
        left = known(argument(node, position, name))
        return numel(out) * size_of(left.shape[-1]) if isinstance(left, Tensor) else 0

    return rule


def _convolution(node: Node, out: Tensor) -> Size:
    weight = known(argument(node, 1, "weight"))
    return numel(out) * _sides(weight.shape[1:]) if isinstance(weight, Tensor) else 0


def _transposed(node: Node, out: Tensor) -> Size:
    x, weight = (known(argument(node, i, name)) for i, name in ((0, "input"), (1, "weight")))
    return numel(x) * _sides(weight.shape[1:]) if isinstance(weight, Tensor) else 0


def _attention(node: Node, out: Tensor) -> Size:
    """q · kᵀ and its product with v: (…, L, E), (…, S, E), (…, S, Ev)."""
    q, k, v = (known(argument(node, i, name)) for i, name in enumerate(("query", "key", "value")))
    if not all(isinstance(t, Tensor) for t in (q, k, v)):
        return 0
    return _sides((*q.shape[:-1], k.shape[-2])) * (size_of(k.shape[-1]) + size_of(v.shape[-1]))


def _einsum(node: Node, out: Tensor) -> Size:
    """Every index once; ellipses count as the result's size over what is named."""
    letters: dict[str, Size] = {}
    if not isinstance(node.args[0], str) or "." in node.args[0]:
        return numel(out)
    terms = node.args[0].replace(" ", "").partition("->")[0].split(",")
    flat = [t for arg in node.args[1:] for n in _nodes(arg) for t in _tensors(known(n))]
    for term, tensor in zip(terms, flat, strict=False):
        letters |= {c: size_of(side) for c, side in zip(term, tensor.shape, strict=False)}
    return _product(tuple(letters.values()))


_FIRST, _SECOND = _inner(0, "input"), _inner(1, "mat1")
OPERATIONS: Mapping[str, Callable[[Node, Tensor], Size]] = {
    **dict.fromkeys(("linear", "mm", "matmul", "mv", "bmm", "dot", "triton_linear"), _FIRST),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm"), _SECOND),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}
"""Multiply-adds by op; what is not listed moves bytes only."""
