"""Rotary position embeddings that are written out become `sparsefx::rotary`, queries with keys.

x ⊙ cos + cat(-x[…, d/2:], x[…, :d/2]) ⊙ sin is how most language models' code spells them: six
launches for queries and six for keys of every layer, on CPUs and in float32 bit for bit the same.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv
2104.09864.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from sparsefx.ir.products import argument, op_name, value
from sparsefx.ir.rotary import ROTARY
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.mutation import changed_between, written


@dataclass(frozen=True)
class Rotation:
    """x turned by the angles of cos and sin; `last` is the addition with the result."""

    x: Node
    cos: Node
    sin: Node
    last: Node
    inner: tuple[Node, ...]


@graph_pass(never_slower=True)
def fuse_rotary(traced: Traced) -> bool:
    """One node for rotations by the same angles, where the last of them is."""
    groups: dict[tuple[Node, Node], list[Rotation]] = {}
    changed = False
    for node in [n for n in traced.graph.nodes if op_name(n) == "add"]:
        found = _rotation(node)
        if found is None:
            continue
        group = groups.setdefault((found.cos, found.sin), [])
        if group and not _together([*group, found]):
            _replace(traced.graph, group)
            group.clear()
        group.append(found)
        changed = True
    for group in groups.values():
        _replace(traced.graph, group)
    return changed


def _rotation(add: Node) -> Rotation | None:
    """The rotation that ends in this addition, if nothing else reads what is between."""
    terms = [_only(term, "mul") for term in add.args]
    if len(terms) != 2 or add.kwargs or written(add):
        return None
    for plain, turned in (terms, terms[::-1]):
        if plain is None or turned is None or plain.kwargs or turned.kwargs:
            return None
        for x, cos in (plain.args, plain.args[::-1]):
            for cat, sin in (turned.args, turned.args[::-1]):
                parts = _turned(cat, x)
                if parts is not None and isinstance(sin, Node) and _fits(add, x, cos, sin):
                    inner = (plain, turned, *parts)
                    found = Rotation(x, cos, sin, add, inner)  # type: ignore[arg-type]
                    return found if _unchanged(found) else None
    return None


def _only(node: Any, name: str) -> Node | None:
    """`node` if it is this operation with a single reader."""
    fits = isinstance(node, Node) and op_name(node) == name and len(node.users) == 1
    return node if fits and not written(node) else None


def _turned(node: Any, x: Any) -> tuple[Node, ...] | None:
    """The nodes of cat((-x[…, d/2:], x[…, :d/2]), -1)."""
    cat, shape = _only(node, "cat"), getattr(value(x), "shape", ())
    if cat is None or not shape or not isinstance(shape[-1], int):
        return None
    parts, axis, half = cat.args[0], argument(cat, 1, "dim"), shape[-1] // 2
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or axis not in (-1, len(shape) - 1):
        return None
    neg, upper = _only(parts[0], "neg"), _only(parts[1], "getitem")
    lower = _only(neg.args[0], "getitem") if neg is not None else None
    if neg is None or lower is None or upper is None or shape[-1] % 2:
        return None
    wanted = (x, (..., slice(half, None, None))), (x, (..., slice(None, half, None)))
    return (cat, neg, lower, upper) if (lower.args, upper.args) == wanted else None


def _fits(add: Node, x: Any, cos: Any, sin: Any) -> bool:
    """Float32 on CPUs, four axes each, the angles of one shape and broadcast to that of x; the
    result lies in memory as one like x does, for those who view it.
    """
    tensors = [value(n) for n in (add, x, cos, sin)]
    if not all(isinstance(t, Tensor) and t.dim() == 4 for t in tensors):
        return False
    alike = all(t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors)
    out, own, *angles = ([*map(str, t.shape)] for t in tensors)
    lies, would = ([*map(str, t.stride())] for t in (tensors[0], torch.empty_like(tensors[1])))
    return alike and out == own and angles[0] == angles[1] and lies == would


def _unchanged(r: Rotation) -> bool:
    reads = [r.x, r.cos, r.sin]
    return changed_between(reads, min(r.inner), r.last) is None


def _together(group: list[Rotation]) -> bool:
    """Whether all may be computed where the last is: read later, with results read after it."""
    last = group[-1]
    return all(
        changed_between([r.x, r.cos, r.sin], r.last, last.last) is None
        and all(user > last.last for user in r.last.users)
        for r in group[:-1]
    )


def _replace(graph: Graph, found: list[Rotation]) -> None:
    # Looked up again: what one reads may be another's result, which has been replaced.
    group = [r for r in (_rotation(r.last) for r in found) if r is not None]
    last, first = group[-1].last, group[0]
    with graph.inserting_before(last):
        new = graph.call_function(ROTARY, ([r.x for r in group], first.cos, first.sin))
        for i, r in enumerate(group):
            item = graph.call_function(operator.getitem, (new, i))
            item.meta = dict(r.last.meta)
            r.last.replace_all_uses_with(item)
    for key in ("val", "example_value"):
        if all(key in r.last.meta for r in group):
            new.meta[key] = [r.last.meta[key] for r in group]
    for r in group:
        for node in (r.last, *r.inner):
            graph.erase_node(node)
