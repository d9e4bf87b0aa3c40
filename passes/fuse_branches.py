"""`W x + s · B(A x)` around a packed W becomes one `sparsefx::linear` with a branch.

LoRA and its kin (rsLoRA, SoRA's gates, DoRA, SVDQuant) differ only in what scales the branch:
gates and scalars go into its scale vector, which stays a value of the graph, so that changing it
compiles nothing anew. DoRA's magnitudes multiply the whole product after it. The branch is computed
in the type of x, as `sparsefx::linear` defines it.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Graph, Node

from sparsefx.ir.op import LINEAR
from sparsefx.ir.products import op_name, value
from sparsefx.ir.sites import Traced
from sparsefx.passes.branch_match import Branch, Matrix, Refusal, find, product
from sparsefx.passes.manager import graph_pass

CONSTANT = "sparsefx_constant_"
"""Attributes of the graph that passes made: no caller can change them."""


@graph_pass()
def fuse_branches(traced: Traced) -> bool:
    """Let every packed product compute the low-rank branches added to it.

    Several adapters of one product are put side by side along the rank. A sum that looks like a
    branch and stays is noted with the reason.
    """
    changed = False
    for node in list(traced.graph.nodes):
        try:
            found = find(node, lambda n: n.target is LINEAR)
        except Refusal as why:
            note(traced, f"{label(node)}: its low-rank branch is computed apart: {why}")
            continue
        if found is not None:
            _fuse(traced, found)
            changed = True
    return changed


def low_rank_weights(traced: Traced) -> dict[Node, Node]:
    """A and B of every branch of a graph that is not packed yet → the weight they are added to."""
    out: dict[Node, Node] = {}

    def is_base(node: Node) -> bool:
        found = product(node)
        return found is not None and found.matrix.node in traced.weights

    for node in traced.graph.nodes:
        try:
            found = find(node, is_base)
        except Refusal:
            continue
        if found is not None and (base := product(found.base)) is not None:
            pair = (found.down.node, found.up.node)
            out.update({part: base.matrix.node for part in pair if part in traced.weights})
    return out


def note(traced: Traced, text: str) -> None:
    """Remember `text` for `explain`."""
    if text not in traced.notes:
        traced.notes.append(text)


def label(node: Node) -> str:
    """The module a node was traced from, its own name where none is recorded."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"^L\['\w+'\]\.", "", str(stack[-1][0])) if stack else node.name


def constant(traced: Traced, node: Node) -> Tensor | None:
    """The value of `node` where no caller can change it, None elsewhere."""
    owner = traced.graph.owning_module
    if node.op != "get_attr" or not str(node.target).startswith(CONSTANT):
        return None
    found = getattr(owner, str(node.target))
    return found if isinstance(found, Tensor) else None


def attach(graph: Graph, tensor: Tensor) -> Node:
    """A node, where nodes are being inserted, for a tensor that the graph's module holds now."""
    owner = graph.owning_module
    assert isinstance(owner, nn.Module)
    for key, old in owner.named_buffers(recurse=False):
        same = key.startswith(CONSTANT) and old.dtype == tensor.dtype and old.shape == tensor.shape
        if same and old.device == tensor.device and torch.equal(old, tensor):
            return graph.get_attr(key)
    count = sum(key.startswith(CONSTANT) for key, _ in owner.named_buffers(recurse=False))
    owner.register_buffer(f"{CONSTANT}{count}", tensor, persistent=False)
    return graph.get_attr(f"{CONSTANT}{count}")


def call(traced: Traced, target: Any, *args: Any) -> Node:
    """`target(*args)`: computed now where all tensors in `args` are constants."""
    graph, leaves = traced.graph, fx.node.map_arg
    nodes: list[Node] = []
    leaves(args, nodes.append)
    known = {node: constant(traced, node) for node in nodes} if nodes else {}
    if known and all(tensor is not None for tensor in known.values()):
        with torch.no_grad():
            made: Tensor = target(*leaves(args, lambda n: known[n]))
        return attach(graph, made.contiguous())
    return graph.call_function(target, args)


def _fuse(traced: Traced, found: Branch) -> None:
    graph, base, total = traced.graph, found.base, found.total
    _, buffers, bias, old, text, n = base.args
    with graph.inserting_before(total):
        parts = [_matrix(traced, found.down), _matrix(traced, found.up), _scale(traced, found)]
        if old:
            parts = _joined(traced, old, parts)
        inside = None if found.magnitude is not None else bias
        new = graph.call_function(LINEAR, (found.x, buffers, inside, parts, text, n))
        new.meta = dict(total.meta)
        result = _with_magnitude(traced, found, new, bias)
        result = _recorded_type(graph, found, new, result)
    result.meta = dict(total.meta)
    total.replace_all_uses_with(result)
    _erase(graph, [total, *found.outer.nodes, *found.inner.nodes, base, *found.between])


def _matrix(traced: Traced, matrix: Matrix) -> Node:
    flip = torch.ops.aten.t.default
    return call(traced, flip, matrix.node) if matrix.flipped else matrix.node


def _scale(traced: Traced, found: Branch) -> Node:
    """The (r,) vector of everything that multiplies the branch."""
    aten, graph, rank = torch.ops.aten, traced.graph, found.rank
    number = found.outer.number * found.inner.number
    down = value(found.down.node)
    options = {"dtype": down.dtype, "device": down.device}
    scale: Node | None = None
    for vector in found.inner.vectors:
        flat = call(traced, aten.reshape.default, vector, [rank])
        scale = flat if scale is None else call(traced, aten.mul.Tensor, scale, flat)
    for scalar, divides in (*found.outer.scalars, *found.inner.scalars):
        if isinstance(value(scalar), Tensor):
            wide = call(traced, aten.expand.default,
                        call(traced, aten.reshape.default, scalar, [1]), [rank])  # fmt: skip
        else:
            wide = graph.call_function(aten.full.default, ([rank], scalar), dict(options))
        if scale is None and not divides:
            scale = wide
            continue
        start = scale or attach(graph, torch.ones(rank, **options))
        scale = call(traced, (aten.div if divides else aten.mul).Tensor, start, wide)
    if scale is None:
        return attach(graph, torch.full((rank,), number, **options))
    return scale if number == 1 else call(traced, aten.mul.Tensor, scale, number)


def _joined(traced: Traced, old: Any, new: list[Node]) -> list[Node]:
    """Two branches as one: side by side along the rank."""
    cat, axes = torch.ops.aten.cat.default, (0, 1, 0)
    return [call(traced, cat, [a, b], d) for a, b, d in zip(old, new, axes, strict=True)]


def _with_magnitude(traced: Traced, found: Branch, new: Node, bias: Any) -> Node:
    """magnitude · new + bias for DoRA; `new` elsewhere."""
    if found.magnitude is None:
        return new
    graph, aten = traced.graph, torch.ops.aten
    if (culprit := _computed_from(found.magnitude)) is not None:
        said = f"DoRA's magnitudes are computed anew at every call ({op_name(culprit)})"
        way_out = "peft's ENABLE_DORA_CACHING makes constants of them"
        note(traced, f"{label(found.total)}: {said}; {way_out}")
    scaled = graph.call_function(aten.mul.Tensor, (new, found.magnitude))
    scaled.meta = dict(found.total.meta)
    return scaled if bias is None else graph.call_function(aten.add.Tensor, (scaled, bias))


def _computed_from(magnitude: Node) -> Node | None:
    """The norm that DoRA's magnitudes are divided by, where the graph computes it."""
    seen, pending = {magnitude}, [magnitude]
    while pending:
        node = pending.pop()
        if "norm" in op_name(node):
            return node
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending += fresh
    return None


def _recorded_type(graph: Graph, found: Branch, new: Node, result: Node) -> Node:
    """`result` in the sum's type: `sparsefx::linear` returns that of its input."""
    x, total = value(found.x), value(found.total)
    if not isinstance(x, Tensor) or not isinstance(total, Tensor) or x.dtype == total.dtype:
        return result
    like = value(found.base)
    if isinstance(like, Tensor) and like.shape == total.shape:
        new.meta = dict(found.base.meta)
    if found.magnitude is not None:
        return result  # the magnitudes' type decides, as it did in the sum
    return graph.call_function(torch.ops.aten.to.dtype, (result, total.dtype))


def _erase(graph: Graph, nodes: list[Node]) -> None:
    """Remove what nothing reads any more, readers first."""
    for node in sorted(set(nodes), reverse=True):
        if not node.users:
            graph.erase_node(node)
