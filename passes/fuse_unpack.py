"""`aten.linear(x, unpack(…))` becomes `sparsefx::linear(x, …)`: the dense weight is never made."""

from __future__ import annotations

import torch

from sparsefx.ir.products import uses
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.normalise import operands, respell


@graph_pass()
def fuse_unpack(traced: Traced) -> bool:
    """Multiply by the packed form wherever an unpacked weight is only multiplied by."""
    graph, changed = traced.graph, False
    unpacked = [n for n in graph.nodes if n.target is torch.ops.sparsefx.unpack.default]
    for node in unpacked:
        buffers, text, n, k, dtype = node.args
        shape = torch.empty(n, k, dtype=dtype, device="meta")
        for use in uses(graph, {node: shape}):
            if use.kind != "linear" or use.transposed:
                continue
            if use.node.target is not torch.ops.aten.linear.default:
                use = next(u for u in uses(graph, {node: shape}) if u.node is respell(graph, use))
            x, bias = operands(use)
            with graph.inserting_before(use.node):
                new = graph.call_function(
                    torch.ops.sparsefx.linear.default, (x, buffers, bias, [], text, n)
                )
            new.meta = dict(use.node.meta)
            use.node.replace_all_uses_with(new)
            graph.erase_node(use.node)
            changed = True
    return changed
