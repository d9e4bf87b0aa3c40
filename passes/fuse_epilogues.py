"""Fuse epilogues: what follows a product is computed while its results are in registers.

A bias, an activation, a multiplication (two products of one x: a gate, as in SwiGLU) and an
addition, in this order, become part of `sparsefx::fused`. Between them results are float32, where
the graph rounded to its own type each time. On CPUs an addition alone stays: torch's own takes
2 µs less for one row, and less for many (N = K = 576, int4g128+a8, 1 to 256 rows).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from sparsefx.ir.fused import FUSED, LINEARS, Part, arguments, parts_of
from sparsefx.ir.op import LINEAR
from sparsefx.ir.products import op_name, value
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.merge_siblings import part
from sparsefx.passes.mutation import changed_between

BIAS, ACTIVATION, MULTIPLY, RESIDUAL = range(1, 5)
"""Steps in the order in which the op takes them."""
CASTS = {"to", "float", "half", "bfloat16", "_to_copy"}


@dataclass(frozen=True)
class Epilogue:
    """Steps found behind a product, up to the node `last`, which they all lead to."""

    last: Node
    step: int = 0
    bias: Node | None = None
    activation: str = "none"
    multiply: Node | None = None
    residual: Node | None = None

    @property
    def operands(self) -> list[Node]:
        return [n for n in (self.bias, self.multiply, self.residual) if n is not None]


@graph_pass(never_slower=True)
def fuse_epilogues(traced: Traced) -> bool:
    """Gates first: either factor of one is the other's operand."""
    changed = False
    for gates in (True, False):
        for node in [n for n in traced.graph.nodes if _is_product(n)]:
            if node.users:  # neither dead nor fused by now
                changed |= _fuse(traced, node, gates)
    return changed


def _is_product(node: Node) -> bool:
    """A product's result: of `linear`, or one of those of `linears`."""
    return node.target is LINEAR or (node.target is operator.getitem and _owner(node) is not None)


def _owner(node: Node) -> Node | None:
    """The `linears` node that a result is taken from."""
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, Node) and source.target is LINEARS else None


def _fuse(traced: Traced, product: Node, gates: bool) -> bool:
    graph, found = traced.graph, _follow(traced, product)
    other = found.multiply
    gate = other if other is not None and _gates(product, other) else None
    if found.last is product or gates is (gate is None) or (gate is None and _owner(product)):
        return False
    if gate is not None and _reads_more(product, gate):
        return False
    read = [*_inputs(product), *found.operands, *(_inputs(gate) if gate is not None else ())]
    first = product if gate is None else min(product, gate)
    if changed_between([n for n in read if n is not gate], first, found.last) is not None:
        return False
    parts = [replace(_part(product), bias=found.bias or _part(product).bias)]
    if gate is not None:
        parts.append(_part(gate))
    multiply = None if gate is not None else found.multiply
    with graph.inserting_before(found.last):
        if found.step == BIAS:
            p = parts[0]
            new = graph.call_function(
                LINEAR, (_x(product), p.weight, p.bias, p.branch, p.format, p.n)
            )
        else:
            tail = (found.activation, multiply, found.residual)
            new = graph.call_function(FUSED, (_x(product), *arguments(parts), *tail))
    new.meta = dict(found.last.meta)
    found.last.replace_all_uses_with(new)
    _erase(graph, found.last, {product, gate})
    return True


def _reads_more(product: Node, gate: Node) -> bool:
    """Whether a gate that leaves others of its call behind costs more than it saves.

    x is then read once more, K numbers a row, and at least 4 N are neither written nor read again.
    """
    left = any(owner is not None and not {product, gate} >= {*owner.users}
               for owner in (_owner(product), _owner(gate)))  # fmt: skip
    x, y = value(_x(product)), value(product)
    return left and not bool(x.shape[-1] <= 4 * y.shape[-1])


def _follow(traced: Traced, product: Node) -> Epilogue:
    """The longest epilogue that ends in the product's own type."""
    now = best = Epilogue(product)
    x, y = value(_x(product)), value(product)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dtype != y.dtype:
        return best
    while len(now.last.users) == 1 and now.step < RESIDUAL:
        (user,) = now.last.users
        found = _step(now, user, product)
        if found is None or _shape(user) != _shape(product):
            break
        if found.step == RESIDUAL and now.step < ACTIVATION and y.device.type == "cpu":
            note = f"fuse_epilogues: {user.name} stays: nothing else follows {product.name}"
            traced.notes += [note] if note not in traced.notes else []
            break
        now = replace(found, last=user)
        if _alike(user, product):
            best = now if now.step else best
    return best


def _step(now: Epilogue, user: Node, product: Node) -> Epilogue | None:
    """`now` and one step more, None where `user` is none."""
    name = op_name(user)
    follows = user.args[:1] == (now.last,)
    if follows and now.step < ACTIVATION and (found := _activation(user, name)) is not None:
        return replace(now, step=ACTIVATION, activation=found)
    if name in CASTS and follows and _is_cast(user):
        return now
    operands = list(user.args)
    if user.kwargs or len(operands) != 2 or operands.count(now.last) != 1:
        return None
    other = operands[1 - operands.index(now.last)]
    if not isinstance(other, Node) or not _alike(now.last, product):
        return None
    if name == "mul" and now.step < MULTIPLY and _alike(other, product):
        return replace(now, step=MULTIPLY, multiply=other)
    if name == "add" and _alike(other, product):
        return replace(now, step=RESIDUAL, residual=other)
    if name == "add" and not now.step and _is_bias(other, product):
        return replace(now, step=BIAS, bias=other)
    return None


def _activation(node: Node, name: str) -> str | None:
    rest, given = node.args[1:], dict(node.kwargs)
    if given.pop("inplace", False) or rest not in ((), (False,)):
        return None
    tanh = given.pop("approximate", "none")
    if given or name not in ("relu", "silu", "gelu"):
        return None
    return "gelu_tanh" if name == "gelu" and tanh == "tanh" else name if tanh == "none" else None


def _is_cast(node: Node) -> bool:
    """Nothing but the data type changes, from one that engines compute in to another."""
    before, after = value(node.args[0]), value(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    wide = after.dtype is torch.float32 or before.dtype is torch.float32
    return (
        wide
        and before.device == after.device
        and [*map(str, before.stride())] == [*map(str, after.stride())]
    )


def _shape(node: Any) -> tuple[str, ...]:
    """Sides as text: comparing symbolic ones would add guards."""
    found = value(node)
    return tuple(map(str, found.shape)) if isinstance(found, Tensor) else ()


def _alike(node: Node, product: Node) -> bool:
    """A tensor of the product's shape, type and device."""
    a, b = value(node), value(product)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return _shape(node) == _shape(product) and (a.dtype, a.device) == (b.dtype, b.device)


def _is_bias(node: Node, product: Node) -> bool:
    a, b = value(node), value(product)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or _part(product).bias is not None:
        return False
    return a.dim() == 1 and _shape(node) == _shape(product)[-1:] and a.dtype == b.dtype


def _gates(product: Node, other: Node) -> bool:
    """Whether `other` is a product of the same x that nothing else reads."""
    return _is_product(other) and len(other.users) == 1 and _x(other) is _x(product)


def _x(product: Node) -> Any:
    return (_owner(product) or product).args[0]


def _inputs(product: Node) -> list[Node]:
    p = _part(product)
    return [n for n in (_x(product), p.bias, *p.weight, *p.branch) if isinstance(n, Node)]


def _part(product: Node) -> Part:
    owner = _owner(product)
    if owner is None:
        return part(product)
    return parts_of(*owner.args[1:])[product.args[1]]  # type: ignore[arg-type, index]


def _erase(graph: Graph, last: Node, products: set[Node | None]) -> None:
    """Remove the chain from `last` back to its products, and them from where they came."""
    pending, owners = [last], [_owner(p) for p in products if p is not None]
    for node in pending:
        if not node.users:
            inputs = [] if node in products else node.all_input_nodes
            graph.erase_node(node)
            pending += inputs
    for owner in dict.fromkeys(o for o in owners if o is not None):
        _shrink(graph, owner)


def _shrink(graph: Graph, owner: Node) -> None:
    """Leave of a `linears` node what is still read."""
    parts, items = parts_of(*owner.args[1:]), list(owner.users)  # type: ignore[arg-type]
    left = sorted({item.args[1] for item in items})  # type: ignore[type-var]
    with graph.inserting_before(owner):
        if len(left) == 1:
            (p,) = [parts[i] for i in left]  # type: ignore[index]
            new = graph.call_function(
                LINEAR, (owner.args[0], p.weight, p.bias, p.branch, p.format, p.n)
            )
            new.meta = dict(items[0].meta)
        elif left:
            rest = arguments([parts[i] for i in left])  # type: ignore[index]
            new = graph.call_function(LINEARS, (owner.args[0], *rest))
            for key in ("val", "example_value"):
                if key in owner.meta:
                    new.meta[key] = [owner.meta[key][i] for i in left]
    for item in items:
        if len(left) == 1:
            item.replace_all_uses_with(new)
            graph.erase_node(item)
        else:
            item.args = (new, left.index(item.args[1]))
    graph.erase_node(owner)
