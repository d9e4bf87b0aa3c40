"""Attention reads keys and values that several heads share where they are, not repeated copies.

Models of grouped queries write k[:, :, None].expand(…, r, …).reshape(…), or `repeat_interleave`,
before attention: r copies of every key and value at every step. Torch's own attention takes
heads in groups (`enable_gqa`), bit for bit the same on CPUs; not all of its kernels for GPUs do.
Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints", arXiv 2305.13245.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from sparsefx.ir.products import argument, op_name, value
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.mutation import changed_between, written

ALL = slice(None, None, None)
BESIDE = [(ALL, ALL, None), (ALL, ALL, None, ALL), (ALL, ALL, None, ALL, ALL)]
"""Indices that put an axis behind the heads."""


@graph_pass(never_slower=True)
def group_heads(traced: Traced) -> bool:
    """Every attention on CPUs whose keys and values are both repeated for its query heads."""
    changed = False
    for node in [n for n in traced.graph.nodes if op_name(n) == "scaled_dot_product_attention"]:
        operands = [argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]
        if not _plain(node, operands[0]):
            continue
        sources = [_repeated(operand, value(operands[0])) for operand in operands[1:]]
        if None in sources or len({_heads(source) for source in sources}) > 1:
            continue
        found = [s for s in sources if s is not None]
        if changed_between([*found, *operands[1:]], min(found), node) is not None:
            continue
        node.args = (operands[0], *sources, *node.args[3:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("query", "key", "value")}
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        _erase(traced, operands[1:])
        changed = True
    return changed


def _plain(node: Node, query: Any) -> bool:
    """Attention over (batch, heads, tokens, width) on CPUs, not told to group heads yet."""
    q, out = value(query), value(node)
    if not isinstance(q, Tensor) or not isinstance(out, Tensor) or written(node):
        return False
    return q.dim() == 4 and out.device.type == "cpu" and not node.kwargs.get("enable_gqa")


def _heads(source: Node | None) -> Any:
    return value(source).shape[1]


def _repeated(node: Any, query: Tensor) -> Node | None:
    """What this node repeats so that it has the query's heads, each head's copies side by side."""
    source = _expanded(node) if op_name(node) == "reshape" else _interleaved(node)
    before, after = value(source), value(node)
    if source is None or not isinstance(before, Tensor) or before.dim() != 4:
        return None
    sides = (before.shape[1], after.shape[1], query.shape[1])
    if not all(isinstance(side, int) for side in sides) or after.shape[1] != query.shape[1]:
        return None
    rest = [[str(t.shape[i]) for i in (0, 2, 3)] for t in (before, after)]
    return source if after.dim() == 4 and sides[0] < sides[1] and rest[0] == rest[1] else None


def _expanded(node: Node) -> Node | None:
    """The k of k[:, :, None].expand(b, heads, r, n, d).reshape(b, heads * r, n, d)."""
    expand = node.args[0]
    if not isinstance(expand, Node) or op_name(expand) != "expand":
        return None
    beside = expand.args[0]
    if not isinstance(beside, Node):
        return None
    index = beside.args[1:]
    fits = op_name(beside) == "getitem" and index[0] in BESIDE
    source = beside.args[0] if fits or (op_name(beside), index) == ("unsqueeze", (2,)) else None
    wide, narrow = value(expand), value(source)
    if not isinstance(source, Node) or not isinstance(wide, Tensor) or wide.dim() != 5:
        return None
    kept = [str(wide.shape[i]) for i in (0, 1, 3, 4)]
    return source if kept == [str(side) for side in narrow.shape] else None


def _interleaved(node: Any) -> Node | None:
    """The k of k.repeat_interleave(r, dim=1)."""
    if not isinstance(node, Node) or op_name(node) != "repeat_interleave":
        return None
    source, dim = node.args[0], argument(node, 2, "dim")
    times = argument(node, 1, "repeats")
    fits = isinstance(source, Node) and isinstance(times, int) and dim in (1, -3)
    return source if fits and isinstance(source, Node) else None


def _erase(traced: Traced, nodes: list[Any]) -> None:
    for node in dict.fromkeys(nodes):
        while isinstance(node, Node) and not node.users and node.op.startswith("call_"):
            before = node.args[0]
            traced.graph.erase_node(node)
            node = before
