"""Ranks of a branch that a gate multiplies by zero are removed, and branches without ranks (SoRA).

A rank counts as dead where a gate, a parameter of one number per rank that is not trained, is
exactly zero there. Gate, A and B are then constants of the graph: `Traced.frozen` says so, and the
backend refuses to run once one was edited. Scalars (an adapter's strength, 0 to switch it off)
are never taken for constants. Inputs are taken to be finite; infinity times zero would be NaN.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx import Node

from sparsefx.ir.op import LINEAR
from sparsefx.ir.products import op_name
from sparsefx.ir.sites import Traced
from sparsefx.passes.fuse_branches import attach, constant, label, note
from sparsefx.passes.manager import graph_pass

STEPS = {"reshape", "mul", "div", "cat", "expand", "full", "t"}
"""What `fuse_branches` computes scales and matrices with."""


def no_known_dead_rank(traced: Traced) -> str | None:
    """No branch multiplies by a gate known to be zero."""
    for node in traced.graph.nodes:
        if node.target is LINEAR and (found := _dead(traced, node)) is not None:
            return f"{node.name} has dead ranks: {found[0].nonzero().flatten().tolist()}"
    return None


@graph_pass(ensures=[no_known_dead_rank])
def dead_ranks(traced: Traced) -> bool:
    """Cut dead ranks out of every branch: the same result but for the order of few additions."""
    changed = False
    for node in [n for n in traced.graph.nodes if n.target is LINEAR]:
        found = _dead(traced, node)
        if found is None:
            continue
        dead, read = found
        traced.frozen.update({weight: traced.weights[weight] for weight in read})
        node.update_arg(3, [] if bool(dead.all()) else _cut(traced, node, ~dead))
        changed = True
    return changed


def _dead(traced: Traced, node: Node) -> tuple[Tensor, set[Node]] | None:
    """Which ranks are dead, (r,) bool, and the weights to freeze so that they may go; None where
    no rank is dead or A or B may still change.
    """
    if not node.args[3]:
        return None
    down, up, scale = _parts(node)
    read: set[Node] = set()
    dead = _zeros(traced, scale, read)
    if dead is None or not bool(dead.any()):
        return None
    if not bool(dead.all()):
        for matrix in (down, up):
            if (leaves := _leaves(traced, matrix)) is None:
                note(traced, f"{label(node)}: its dead ranks stay: A or B may still be trained")
                return None
            read |= leaves
    return dead, read


def _parts(node: Node) -> tuple[Node, Node, Node]:
    """down, up and scale of a product's branch."""
    branch: Any = node.args[3]
    down, up, scale = branch
    return down, up, scale


def _zeros(traced: Traced, node: object, read: set[Node]) -> Tensor | None:
    """Where a scale is zero because a gate is, (r,) bool; `read` gains those gates."""
    if not isinstance(node, Node):
        return None
    name = op_name(node)
    if (tensor := constant(traced, node)) is not None:
        return (tensor.flatten() == 0).cpu()
    if (gate := _untrained(traced, node)) is not None and gate.numel() > 1:
        zeros = (gate.flatten() == 0).cpu()
        if bool(zeros.any()):
            read.add(node)
        return zeros
    if name in ("reshape", "div"):
        return _zeros(traced, node.args[0], read)
    if name == "mul":
        known = [z for arg in node.args if (z := _zeros(traced, arg, read)) is not None]
        return known[0] | known[-1] if known else None
    if name in ("expand", "full"):  # a scalar, which may change
        size: Any = node.args[1 if name == "expand" else 0]
        return torch.zeros(size[0], dtype=torch.bool)
    if name == "cat":
        joined: Any = node.args[0]
        parts = [_zeros(traced, part, read) for part in joined]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    return None


def _untrained(traced: Traced, node: Node) -> Tensor | None:
    weight = traced.weights.get(node)
    return None if weight is None or weight.requires_grad else weight.detach()


def _leaves(traced: Traced, node: Node) -> set[Node] | None:
    """The weights that `node` is computed from, None where it is no constant or may be trained."""
    if constant(traced, node) is not None:
        return set()
    if node in traced.weights:
        return None if traced.weights[node].requires_grad else {node}
    if node.op != "call_function" or op_name(node) not in STEPS:
        return None
    below = [_leaves(traced, n) for n in node.all_input_nodes]
    return None if any(b is None for b in below) else {n for b in below for n in b or ()}


def _value(traced: Traced, node: Node) -> Tensor:
    """What `node` computes, of constants and frozen weights."""
    if (found := constant(traced, node)) is not None:
        return found
    if node in traced.weights:
        return traced.weights[node].detach()
    args, compute = fx.node.map_arg(node.args, lambda n: _value(traced, n)), cast(Any, node.target)
    made: Tensor = compute(*args, **node.kwargs)
    return made


def _cut(traced: Traced, node: Node, alive: Tensor) -> list[Node]:
    """The branch of what is alive: constants, and where a scalar may change a selection."""
    down, up, scale = _parts(node)
    graph, index = traced.graph, alive.nonzero().flatten()
    leaves = _leaves(traced, scale)
    fixed = leaves is not None and leaves <= set(traced.frozen)
    with graph.inserting_before(node), torch.no_grad():
        kept = [
            attach(graph, _selected(_value(traced, part), axis, index))
            for part, axis in ((down, 0), (up, 1))
        ]
        if fixed:
            return [*kept, attach(graph, _selected(_value(traced, scale), 0, index))]
        select = torch.ops.aten.index_select.default
        places = attach(graph, index.to(constant(traced, kept[0]).device))  # type: ignore[union-attr]
        return [*kept, graph.call_function(select, (scale, 0, places))]


def _selected(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    return tensor.index_select(axis, index.to(tensor.device)).contiguous()
