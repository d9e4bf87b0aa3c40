"""Normal form: every product with a whole weight becomes `aten.linear(x, W, bias)`, W as (N, K).

`F.linear`, `addmm`/`mm`/`matmul` with a (transposed) weight, `x @ W.T` and HF's Conv1D all end
here, whichever door they came through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from sparsefx.ir.products import Use, argument, op_name, uses, value
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass

LINEAR = torch.ops.aten.linear.default


def products_are_linear(traced: Traced) -> str | None:
    """Every product of kind "linear" is spelt `aten.linear`."""
    for use in uses(traced.graph, traced.weights):
        if use.kind == "linear" and use.node.target is not LINEAR:
            return f"{use.node.name} is still {use.node.target}"
    return None


@graph_pass(ensures=[products_are_linear])
def normalise(traced: Traced) -> bool:
    """Respell products of kind "linear"; bitwise the same result up to the order of a sum."""
    todo = [
        use
        for use in uses(traced.graph, traced.weights)
        if use.kind == "linear" and use.node.target is not LINEAR
    ]
    for use in todo:
        respell(traced.graph, use)
    return bool(todo)


def operands(use: Use) -> tuple[Any, Any]:
    """(x, bias) of a product node of kind "linear" or "conv1x1"; bias None when absent."""
    node, name = use.node, op_name(use.node)
    if name == "addmm":
        return argument(node, 1, "mat1"), argument(node, 0, "input")
    bias = argument(node, 2, "bias") if name == "linear" or name.startswith("conv") else None
    return argument(node, 0, "input"), bias


def respell(graph: Graph, use: Use) -> Node:
    """Replace a product node by `aten.linear` over the weight (transposed where stored (K, N))."""
    x, bias = operands(use)
    node = use.node
    with graph.inserting_before(node):
        weight = use.weight
        if use.transposed:
            weight = graph.call_function(torch.ops.aten.t.default, (weight,))
        one_dim_bias = bias is None or getattr(value(bias), "ndim", 1) == 1
        new = graph.call_function(LINEAR, (x, weight, bias) if one_dim_bias else (x, weight))
        result = new
        if not one_dim_bias:
            result = graph.call_function(torch.ops.aten.add.Tensor, (new, bias))
    for made in (new, result):
        made.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return new
