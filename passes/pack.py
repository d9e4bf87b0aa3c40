"""Pack: products whose weight has a chosen Format become `sparsefx::linear` over packed buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Graph, Node

from sparsefx.ir.format import Packed
from sparsefx.ir.op import LINEAR
from sparsefx.ir.products import Use, argument, uses
from sparsefx.ir.sites import Traced
from sparsefx.passes.compress_site import Result, compress_site
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.normalise import operands, products_are_linear
from sparsefx.passes.outliers import NOT_PROBED
from sparsefx.passes.recipe import Recipe


def no_chosen_weight_is_dense(traced: Traced) -> str | None:
    """No product still reads a weight that was to be packed."""
    for use in uses(traced.graph, traced.weights):
        if use.weight in traced.chosen:
            return f"{use.node.name} still multiplies by the dense {use.weight.name}"
    return None


@graph_pass(requires=[products_are_linear], ensures=[no_chosen_weight_is_dense])
def pack(traced: Traced) -> bool:
    """Pack every chosen weight once and let all its products read the buffers."""
    for weight, choice in traced.chosen.items():
        matrix = choice.site.matrix(traced.weights[weight])
        note = NOT_PROBED if choice.format.a8 else ""
        result = compress_site(choice.site, matrix, choice.format, Recipe(), note=note)
        traced.results[weight] = result
        found = uses(traced.graph, {weight: traced.weights[weight]})
        if not found:  # nothing multiplies by it any more
            continue
        attributes = _attach(traced.graph, found[0].node, result)
        for use in found:
            _replace(traced.graph, use, result.packed, *attributes)
    return bool(traced.chosen)


def _attach(graph: Graph, first: Node, result: Result) -> tuple[list[Node], list[Node]]:
    """get_attr nodes, before `first`, of the buffers and the branch on the graph's module."""
    owner = graph.owning_module
    assert isinstance(owner, fx.GraphModule)
    stem = "packed_" + "".join(c if c.isalnum() else "_" for c in result.site.name)

    def node(part: str, tensor: Tensor) -> Node:
        key = f"{stem}_{part}"
        owner.register_buffer(key, tensor, persistent=False)
        return graph.get_attr(key)

    parts = ("down", "up", "scale")
    with graph.inserting_before(first):
        names = result.packed.format.buffers
        buffers = [node(k, b) for k, b in zip(names, result.packed.buffers, strict=True)]
        return buffers, [node(p, b) for p, b in zip(parts, result.branch, strict=False)]


def _replace(
    graph: Graph, use: Use, packed: Packed, buffers: list[Node], branch: list[Node]
) -> None:
    x, bias = operands(use)
    with graph.inserting_before(use.node):
        if use.kind == "conv1x1":
            x = _channels_last(graph, x, argument(use.node, 3, "stride"))
        new: Node = graph.call_function(
            LINEAR,
            (x, buffers, bias, branch, str(packed.format), packed.n),
        )
        if use.kind == "conv1x1":
            new = graph.call_function(torch.movedim, (new, -1, 1))
    new.meta = dict(use.node.meta)
    use.node.replace_all_uses_with(new)
    graph.erase_node(use.node)


def _channels_last(graph: Graph, x: Node, stride: Any) -> Node:
    """x with its channel axis last, every `stride`-th position kept."""
    steps = stride if isinstance(stride, (list, tuple)) else [stride or 1]
    for axis, step in enumerate(steps, start=2):
        if step != 1:
            x = graph.call_function(torch.ops.aten.slice.Tensor, (x, axis, 0, None, step))
    return graph.call_function(torch.movedim, (x, 1, -1))
