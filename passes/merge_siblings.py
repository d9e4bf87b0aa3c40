"""Merge siblings: products of one x become one `sparsefx::linears`, one call of the engine.

q, k and v; gate and up; the downs of several adapters. Results stay tensors of their own and are
bit for bit those of single products: x is prepared once, and each weight is read by its own kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from sparsefx.ir.format import Format
from sparsefx.ir.fused import LINEARS, Part, arguments
from sparsefx.ir.op import LINEAR
from sparsefx.ir.products import op_name, value
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.mutation import changed_between

MOST = 16
"""Products of one call; more would wait for each other and keep more memory alive."""


@graph_pass(never_slower=True)
def merge_siblings(traced: Traced) -> bool:
    """Merge what can be; `traced.notes` says why other products of one x stay apart."""
    changed = False
    for products in _siblings(traced.graph):
        x = products[0].args[0]  # merging what x comes from has put another node in its place
        assert isinstance(x, Node)
        for group in _groups(traced, x, products) if len(products) > 1 else ():
            while len(group) > 1:
                count = len(group)
                group = _merge(traced, x, group[:MOST]) + group[MOST:]
                changed |= len(group) < count - 1
    return changed


def part(node: Node) -> Part:
    """What a `sparsefx::linear` node multiplies by."""
    _, weight, bias, branch, text, n = node.args
    return Part(list(weight), bias, list(branch), text, n)  # type: ignore[arg-type]


def kind(text: str) -> Format:
    """A format without how much is kept: what products in one call have in common."""
    fmt = Format.parse(text)
    layout = fmt.layout
    if "share" in {f.name for f in fields(layout)}:  # type: ignore[arg-type]
        layout = replace(layout, share=0.5)  # type: ignore[type-var]
    return replace(fmt, layout=layout, rank=0)


def _siblings(graph: Graph) -> list[list[Node]]:
    """Products that multiply the same node, in order."""
    out: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        dense = op_name(node) == "linear" and isinstance(node.args[0], Node)
        if node.op == "call_function" and (node.target is LINEAR or dense):
            out.setdefault(node.args[0], []).append(node)
    return list(out.values())


def _groups(traced: Traced, x: Node, products: list[Node]) -> Iterable[list[Node]]:
    """Products that agree in all but kept counts; the rest is noted."""
    groups: dict[Any, list[Node]] = {}
    for node in products:
        if node.target is not LINEAR:
            traced.notes.append(_note(x, [node], "its weight is dense"))
            continue
        own = part(node)
        result, first = value(node), value(own.weight[0])
        dtype = str(result.dtype) if isinstance(result, Tensor) else ""
        device = str(first.device) if isinstance(first, Tensor) else ""
        groups.setdefault((kind(own.format), dtype, device), []).append(node)
    if len(groups) > 1:
        _explain(traced, x, groups)
    return groups.values()


def _explain(traced: Traced, x: Node, groups: dict[Any, list[Node]]) -> None:
    nodes = [group[0] for group in groups.values()]
    for i, what in enumerate(("formats", "data types", "devices")):
        found = list(dict.fromkeys(str(key[i]) for key in groups))
        if len(found) > 1:
            traced.notes.append(_note(x, nodes, f"{what} differ: {' and '.join(found)}"))
            return


def _note(x: Node, nodes: list[Node], why: str) -> str:
    names = ", ".join(node.name for node in nodes)
    return f"merge_siblings: {names} of {x.name} not merged: {why}"


def _merge(traced: Traced, x: Node, group: list[Node]) -> list[Node]:
    """Put one op where the first product is; those that cannot be computed there are returned."""
    graph, first, late = traced.graph, group[0], []
    for node in group[1:]:
        needed = [n for n in node.all_input_nodes if n > first]
        changed = changed_between(node.all_input_nodes, first, node)
        if computed := [n for n in needed if n.op != "get_attr"]:
            why = f"{computed[0].name}, which it needs, is computed after {first.name}"
        elif changed is not None:
            why = f"{changed.name}, after {first.name}, changes what it reads"
        else:
            for n in needed:
                first.prepend(n)
            continue
        traced.notes.append(_note(x, [node], why))
        late.append(node)
    group = [node for node in group if node not in late]
    if len(group) > 1:
        _replace(graph, x, group)
    return late


def _replace(graph: Graph, x: Node, group: list[Node]) -> None:
    with graph.inserting_before(group[0]):
        new = graph.call_function(LINEARS, (x, *arguments([part(node) for node in group])))
        for i, node in enumerate(group):
            item = graph.call_function(operator.getitem, (new, i))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
    for key in ("val", "example_value"):
        if all(key in node.meta for node in group):
            new.meta[key] = [node.meta[key] for node in group]
    for node in group:
        graph.erase_node(node)
