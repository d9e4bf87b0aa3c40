"""Remove what changes nothing, what is computed twice, and what no output depends on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from sparsefx.ir.op import LINEAR
from sparsefx.ir.products import TRANSPOSES, VIEWS, argument, op_name, value
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.mutation import changed_between, written

PURE = VIEWS | TRANSPOSES | {
    "abs", "add", "addmm", "arange", "cat", "clamp", "cos", "div", "embedding", "eq", "exp", "full",
    "ge", "gelu", "gt", "layer_norm", "le", "linear", "lt", "matmul", "mean", "mm", "movedim",
    "mul", "ne", "neg", "ones", "pow", "relu", "repeat_interleave", "rms_norm", "rsqrt", "sigmoid",
    "silu", "sin", "softmax", "sqrt", "sub", "sum", "tanh", "tril", "triu", "truediv", "unpack",
    "where", "zeros",
}  # fmt: skip
"""Of equal arguments these give equal results, every time."""
CASTS = {"to", "float", "half", "bfloat16", "_to_copy"}
ZEROS = {"zeros", "zeros_like", "new_zeros"}


@graph_pass(never_slower=True)
def clean_up(traced: Traced) -> bool:
    """Identities, common sub-expressions, branches times zero, then dead code.

    Placeholders and impure nodes stay. What is written to, or handed out, keeps its own memory.
    """
    graph = traced.graph
    own = _owned(graph)
    changed = _drop_zero_branches(graph)
    changed |= _drop_identities(graph, own)
    changed |= _share(graph, own)
    return bool(graph.eliminate_dead_code(_acts)) or changed


def _acts(node: Node) -> bool:
    """Whether it does more than give a result. fx itself takes for dead a method that edits its
    tensor, and the marks between which dynamo writes out what `vmap` does to a function.
    """
    functorch = getattr(node.target, "__module__", None) or ""
    return node.is_impure() or bool(written(node)) or functorch.startswith("torch._functorch")


def _owned(graph: Graph) -> set[Node]:
    """Nodes whose memory is written to or handed out, and all that they may be views of."""
    pending = [n for node in graph.nodes for n in written(node)]
    pending += [n for node in graph.nodes if node.op == "output" for n in node.all_input_nodes]
    own = set(pending)
    for node in pending:
        name = op_name(node)
        if name in VIEWS or name in TRANSPOSES or name == "dropout":
            fresh = [n for n in node.all_input_nodes if n not in own]
            own.update(fresh)
            pending += fresh
    return own


def _drop_identities(graph: Graph, own: set[Node]) -> bool:
    changed = False
    for node in list(graph.nodes):
        source = _same_as(node)
        if source is not None and node not in own and source not in own:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            changed = True
    return changed


def _same_as(node: Node) -> Node | None:
    """The node whose values this one has, in the same type."""
    name = op_name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if name == "dropout" and argument(node, 2, "training") is False:
        return source
    if name == "contiguous" and len(node.args) == 1 and not node.kwargs:
        return source if _alike(source, node) else None
    if name not in CASTS or node.kwargs.get("copy") or node.kwargs.get("memory_format"):
        return None
    if _alike(source, node):
        return source
    if op_name(source) in CASTS and isinstance(source.args[0], Node):
        first, wide = source.args[0], value(source)
        exact = isinstance(wide, Tensor) and wide.dtype is torch.float32
        if exact and _alike(first, node) and value(first).dtype.itemsize == 2:
            return first
    return None


def _alike(a: Node, b: Node) -> bool:
    """Recorded values of one type, device and order in memory."""
    x, y = value(a), value(b)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    return _layout(x) == _layout(y)


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.device, [*map(str, t.shape)], [*map(str, t.stride())]


def _share(graph: Graph, own: set[Node]) -> bool:
    """Compute equal expressions once."""
    first: dict[Any, Node] = {}
    changed = False
    for node in list(graph.nodes):
        if op_name(node) not in PURE or node in own or written(node):
            continue
        key = _key(node)
        known = first.setdefault(key, node) if key is not None else node
        if known is node:
            continue
        if changed_between(node.all_input_nodes, known, node) is not None:
            first[key] = node
            continue
        node.replace_all_uses_with(known)
        graph.erase_node(node)
        changed = True
    return changed


def _key(node: Node) -> Any:
    """Target and arguments as something to look up, None where they are not plain values."""

    def plain(arg: Any) -> Any:
        if isinstance(arg, slice):
            return ("slice", plain(arg.start), plain(arg.stop), plain(arg.step))
        if isinstance(arg, (list, tuple)):
            return (type(arg) is list, *map(plain, arg))
        if isinstance(arg, dict):
            return tuple((k, plain(v)) for k, v in sorted(arg.items()))
        return (type(arg), arg)

    key = (node.op, node.target, plain(node.args), plain(node.kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _drop_zero_branches(graph: Graph) -> bool:
    """Branches whose scale or up the graph itself makes of zeros."""
    changed = False
    for node in graph.nodes:
        if node.target is LINEAR and any(_is_zero(n) for n in node.args[3][1:]):
            node.args = (*node.args[:3], [], *node.args[4:])
            changed = True
    return changed


def _is_zero(node: Node) -> bool:
    name = op_name(node)
    if name in ZEROS:
        return True
    return name == "full" and argument(node, 1, "fill_value") == 0
