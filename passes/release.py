"""Release: folded dense weights go once what was packed of them is all that is read."""

from __future__ import annotations

from sparsefx.ir.sites import Traced
from sparsefx.passes.fold import PREFIX
from sparsefx.passes.manager import graph_pass


@graph_pass()
def release(traced: Traced) -> bool:
    """Let go of folded weights that have been packed since: after `pack` and `clean_up`."""
    owner = traced.graph.owning_module
    read = {str(n.target) for n in traced.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in owner.named_buffers(recurse=False)] if owner is not None else []:
        if name.startswith(PREFIX) and name not in read:
            delattr(owner, name)
    return False
