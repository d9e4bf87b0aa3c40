"""Attention of an ONNX graph becomes one MultiHeadAttention of ONNX Runtime.

Twelve operators a layer or more, most of which only move numbers, for MiniLM half of the nodes.
Where a mask might be infinite they stay: rows that are masked altogether are 0 in torch, and not
a number in ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from sparsefx.codegen.onnx import DOMAIN
from sparsefx.codegen.onnx_lower import ORT_DOMAIN
from sparsefx.codegen.onnx_match import KEPT, is_float, is_seen, number, order, own_source, source

if TYPE_CHECKING:
    import onnx_ir as ir

HEADS, KEYS = [0, 2, 1, 3], [0, 2, 3, 1]
"""Orders of the axes of (batch, rows, heads, size): heads before rows, and keys turned."""


@dataclass(frozen=True)
class _Heads:
    """(batch, rows, heads · size) whose numbers are `heads` times `size`."""

    rows: ir.Value
    count: int


def fuse_attention(model: ir.Model) -> None:
    """Replace every float32 attention of the main graph, if it has other nodes of the engine."""
    if DOMAIN not in model.graph.opset_imports:
        return
    for node in list(model.graph):
        if (node.domain, node.op_type) == ("", "Softmax"):
            _fuse(model.graph, node)


def _fuse(graph: ir.Graph, softmax: ir.Node) -> None:
    """softmax(q · kᵀ · scale + mask) · v of several heads, side by side again behind it."""
    import onnx_ir

    found = _behind(softmax)
    scores, mask = _scores(softmax)
    if found is None or scores is None:
        return
    values, last = found
    factors, turned = zip(*(_unscaled(v) for v in scores.inputs), strict=True)
    q, k, v = (_heads(x, o) for x, o in zip((*turned, values), (HEADS, KEYS, HEADS), strict=True))
    if q is None or k is None or v is None or len({q.count, k.count, v.count}) > 1:
        return
    if mask is not None and not _fits(mask, q, k):
        return
    node = onnx_ir.node(
        "MultiHeadAttention", [q.rows, k.rows, v.rows, None, None, mask],
        {"num_heads": q.count, "scale": factors[0] * factors[1]}, domain=ORT_DOMAIN,
    )  # fmt: skip
    old, new = last.outputs[0], node.outputs[0]
    new.shape, new.type = old.shape, old.type
    new.meta[KEPT] = old.meta.get(KEPT)
    graph.insert_before(last, node)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None
    graph.opset_imports[ORT_DOMAIN] = 1
    _remove(graph, last)


def _behind(softmax: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """The values that the shares are multiplied by, and the node that puts heads side by side."""
    axis, shares = softmax.attributes.get("axis"), softmax.outputs[0]
    where = _reader(shares, "Where")
    if where is not None and not _is_zero_for_nan(where, shares):
        return None
    product = _reader(shares if where is None else where.outputs[0], "MatMul")
    turned = _reader(product.outputs[0], "Transpose") if product is not None else None
    joined = _reader(turned.outputs[0], "Reshape") if turned is not None else None
    if product is None or turned is None or joined is None or axis is None or axis.as_int() != -1:
        return None
    inner, outer = turned.outputs[0].shape, joined.outputs[0].shape
    side_by_side = inner is not None and outer is not None and _joins(outer, inner)
    v = product.inputs[1]
    return (v, joined) if order(turned) == HEADS and side_by_side and v is not None else None


def _is_zero_for_nan(where: ir.Node, shares: ir.Value) -> bool:
    test, zero, rest = where.inputs
    node = None if test is None else test.producer()
    return (
        node is not None and node.op_type == "IsNaN" and node.inputs[0] is shares
        and rest is shares and number(zero) == 0
    )  # fmt: skip


def _scores(softmax: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    """The product of queries and keys, and the mask that is added to it."""
    value = softmax.inputs[0]
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Add":
        return own_source(value, "MatMul"), None
    for i, part in enumerate(node.inputs):
        if (product := own_source(part, "MatMul")) is not None:
            return product, node.inputs[1 - i]
    return None, None


def _fits(mask: ir.Value, q: _Heads, k: _Heads) -> bool:
    """Whether a mask is (batch or 1, heads or 1, rows, keys) and finite."""
    where = source(mask, "Where")
    levels = [number(v) for v in where.inputs[1:]] if where is not None else [None]
    if any(level is None or not isfinite(level) for level in levels):
        return False
    given, queries, keys = mask.shape, q.rows.shape, k.rows.shape
    if given is None or queries is None or keys is None or given.rank() != 4:
        return False
    wide = given[0] in (1, queries[0]) and given[1] in (1, q.count)
    return wide and given[2] == queries[1] and given[3] == keys[1] and is_float(mask)


def _unscaled(value: ir.Value | None) -> tuple[float, ir.Value | None]:
    """A number and what it multiplies."""
    node = own_source(value, "Mul")
    for i, factor in enumerate(node.inputs if node is not None else ()):
        if node is not None and (known := number(factor)) is not None:
            return known, node.inputs[1 - i]
    return 1.0, value


def _heads(value: ir.Value | None, turns: list[int]) -> _Heads | None:
    """What (batch, rows, heads, size) was before it was cut into heads and turned by `turns`."""
    turned = own_source(value, "Transpose")
    cut = own_source(turned.inputs[0], "Reshape") if turned is not None else None
    if turned is None or cut is None or order(turned) != turns:
        return None
    rows, apart = cut.inputs[0], cut.outputs[0].shape
    if rows is None or rows.shape is None or apart is None or not _joins(rows.shape, apart):
        return None
    heads = apart[2]
    return _Heads(rows, heads) if isinstance(heads, int) and is_float(rows) else None


def _joins(joined: ir.Shape, apart: ir.Shape) -> bool:
    """(batch, rows, heads · size) and (batch, rows, heads, size)."""
    if joined.rank() != 3 or apart.rank() != 4:
        return False
    heads, size, width = apart[2], apart[3], joined[2]
    known = isinstance(heads, int) and isinstance(size, int) and isinstance(width, int)
    lead = [joined[0] == apart[0], joined[1] == apart[1]]
    return known and heads * size == width and all(lead)


def _reader(value: ir.Value, op: str) -> ir.Node | None:
    """The only `op` that reads a value; a test for NaN may read it too."""
    if is_seen(value):
        return None
    nodes = {node for node, _ in value.uses() if node.op_type != "IsNaN"}
    node = next(iter(nodes)) if len(nodes) == 1 else None
    return node if node is not None and (node.domain, node.op_type) == ("", op) else None


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """A node that nothing uses, and those before it that nothing uses then."""
    before = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for earlier in dict.fromkeys(before):
        if earlier is not None and earlier.graph is graph and not _is_used(earlier):
            _remove(graph, earlier)


def _is_used(node: ir.Node) -> bool:
    return any(v.uses() or is_seen(v) for v in node.outputs)
