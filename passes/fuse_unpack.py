"""`aten.linear(x, unpack(…))` becomes `sparsefx::linear(x, …)`: the dense weight is never made."""

from __future__ import annotations

import torch

from sparsefx.ir.op import LINEAR as SPARSE_LINEAR
from sparsefx.ir.op import UNPACK
from sparsefx.ir.products import uses
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.normalise import LINEAR, respell


@graph_pass()
def fuse_unpack(traced: Traced) -> bool:
    """Multiply by the packed form wherever an unpacked weight is only multiplied by."""
    graph, changed = traced.graph, False
    unpacked = [n for n in graph.nodes if n.target is UNPACK]
    for node in unpacked:
        buffers, text, n, k, dtype = node.args
        shape = torch.empty(n, k, dtype=dtype, device="meta")
        for use in uses(graph, {node: shape}):
            if use.kind != "linear" or use.transposed:
                continue
            linear = use.node if use.node.target is LINEAR else respell(graph, use)
            x, _, bias = (*linear.args, None)[:3]
            with graph.inserting_before(linear):
                new = graph.call_function(SPARSE_LINEAR, (x, buffers, bias, [], text, n))
            new.meta = dict(linear.meta)
            linear.replace_all_uses_with(new)
            graph.erase_node(linear)
            changed = True
    return changed
