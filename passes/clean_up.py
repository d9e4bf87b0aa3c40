"""Remove what no output depends on."""

from __future__ import annotations

from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass


@graph_pass()
def clean_up(traced: Traced) -> bool:
    """Dead code elimination; placeholders and impure nodes stay."""
    return bool(traced.graph.eliminate_dead_code())
