"""Find `W x + s · B(A x)` in a graph: PEFT's LoRA layers, SVDQuant's branches, DoRA, SoRA's gates.

Nothing is changed here; `Refusal` says why a sum that looks like a branch is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx.ir.products import TRANSPOSES, VIEWS, argument, op_name, value
from sparsefx.passes.mutation import changed_between, plain_name

CASTS = {"to", "_to_copy", "float", "half", "bfloat16", "double", "type", "type_as"}
COPIES = {"contiguous", "clone", "alias"}
ROW_VIEWS = {"view", "reshape", "_unsafe_view", "flatten"}
DEEPEST = 12
"""Factors, casts and copies between two products; bounds the walk."""


class Refusal(Exception):
    """Why a sum that looks like a low-rank branch must stay as it is."""


@dataclass(frozen=True)
class Matrix:
    """A weight node; `flipped` where it is stored (in, out)."""

    node: Node
    flipped: bool

    @property
    def shape(self) -> tuple[int, int] | None:
        """(out, in), None where it is not recorded."""
        tensor = value(self.node)
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            return None
        a, b = tensor.shape
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        return (b, a) if self.flipped else (a, b)


@dataclass(frozen=True)
class Product:
    """`node` = x · Mᵀ + bias."""

    node: Node
    x: Node
    matrix: Matrix
    bias: Any


@dataclass
class Chain:
    """From a value down to the product it is a multiple of."""

    product: Product
    number: float = 1.0
    scalars: list[tuple[Node, bool]] = field(default_factory=list)
    """One-element tensors or symbolic numbers, and whether they divide."""
    vectors: list[Node] = field(default_factory=list)
    """Tensors of one number per column."""
    nodes: list[Node] = field(default_factory=list)
    """From the top down to and with the product."""
    refusal: str = ""


@dataclass
class Branch:
    """total = magnitude · (base + number · Π scalars · up(gates · down(x))), bias left outside."""

    total: Node
    base: Node
    x: Node
    down: Matrix
    up: Matrix
    outer: Chain
    inner: Chain
    magnitude: Node | None = None
    """DoRA's m / ‖W + sBA‖, one number per column; None elsewhere."""
    between: list[Node] = field(default_factory=list)
    """Casts, copies, dropouts and views of rows around the products."""

    @property
    def rank(self) -> int:
        shape = self.down.shape
        assert shape is not None
        return shape[0]


def find(total: Node, is_base: Callable[[Node], bool]) -> Branch | None:
    """The branch that a sum adds to a product, None where it adds something else.

    Raises Refusal where it adds one, but reading both in one place would change a result.
    """
    for base_side, term, sign in _addends(total):
        beneath = _down_to(base_side, is_base)
        if beneath is None:
            continue
        found = _plain(total, beneath, term) or _dora(total, beneath, term)
        if found is not None:
            found.outer.number *= sign
            _check(found, beneath, _own(found))
            return found
    return None


def product(node: Node) -> Product | None:
    """`node` as a product with a matrix that is an input or attribute of the graph."""
    name = op_name(node)
    if name == "linear":
        x, weight, bias = (argument(node, i, k) for i, k in enumerate(("input", "weight", "bias")))
        flipped = False
    elif name in ("matmul", "mm") and len(node.args) == 2:
        (x, weight), bias, flipped = node.args, None, True
    else:
        return None
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.name.startswith("sparsefx"):
        return None
    if not isinstance(x, Node) or not isinstance(weight, Node):
        return None
    while op_name(weight) in TRANSPOSES and _two_dimensional(weight):
        weight, flipped = weight.args[0], not flipped
        if not isinstance(weight, Node):
            return None
    return Product(node, x, Matrix(weight, flipped), bias) if _is_fixed(weight) else None


def _two_dimensional(node: Node) -> bool:
    tensor = value(node)
    return not isinstance(tensor, Tensor) or tensor.dim() == 2


def _is_fixed(weight: Node) -> bool:
    """Whether a node is an input or attribute, if through views and casts."""
    while op_name(weight) in VIEWS or op_name(weight) in TRANSPOSES:
        if not weight.args or not isinstance(weight.args[0], Node):
            return False
        weight = weight.args[0]
    return weight.op in ("placeholder", "get_attr")


def _addends(total: Node) -> Iterator[tuple[Node, Node, float]]:
    """(base, term, sign of the term) for both ways to read a sum."""
    name = plain_name(total)
    if name not in ("add", "sub") or len(total.args) != 2 or set(total.kwargs) - {"alpha"}:
        return
    a, b = total.args
    alpha = total.kwargs.get("alpha", 1)
    if not isinstance(a, Node) or not isinstance(b, Node) or a is b:
        return
    if not isinstance(alpha, (int, float)):
        return
    yield a, b, float(alpha) if name == "add" else -float(alpha)
    if name == "add" and alpha == 1:
        yield b, a, 1.0


def _down_to(node: Node, is_base: Callable[[Node], bool]) -> list[Node] | None:
    """Nodes from `node` through casts and views of rows to a base product."""
    path = [node]
    while not is_base(path[-1]):
        if len(path) > DEEPEST or not (_is_cast(path[-1]) or _is_row_view(path[-1])):
            return None
        path.append(path[-1].args[0])  # type: ignore[arg-type]
    return path


def chain(node: Node, depth: int = 0) -> Chain | None:
    """`node` as a multiple of a product with a matrix."""
    if depth > DEEPEST:
        return None
    if (found := product(node)) is not None:
        return Chain(found, nodes=[node])
    name = plain_name(node)
    if _is_cast(node) or name in COPIES or name == "dropout":
        source = argument(node, 0, "input")
        below = chain(source, depth + 1) if isinstance(source, Node) else None
        if below is not None and name == "dropout" and _drops(node):
            below.refusal = "dropout in training mode is between the two products"
    elif name in ("mul", "multiply", "div", "truediv", "divide", "neg"):
        below = _multiple(node, name, depth)
    else:
        return None
    if below is not None:
        below.nodes.insert(0, node)
    return below


def _multiple(node: Node, name: str, depth: int) -> Chain | None:
    if name == "neg":
        below = chain(node.args[0], depth + 1) if isinstance(node.args[0], Node) else None
        if below is not None:
            below.number = -below.number
        return below
    if len(node.args) != 2 or node.kwargs:
        return None
    divides = name not in ("mul", "multiply")
    a, b = node.args
    for top, factor in ((a, b),) if divides else ((a, b), (b, a)):
        below = chain(top, depth + 1) if isinstance(top, Node) else None
        if below is None:
            continue
        if isinstance(factor, (int, float)):
            below.number *= 1 / factor if divides and factor else float(factor)
            return below if factor or not divides else None
        kind = _factor(factor)
        if kind == "scalar":
            below.scalars.append((factor, divides))  # type: ignore[arg-type]
            return below
        if kind == "vector" and not divides:
            below.vectors.append(factor)  # type: ignore[arg-type]
            return below
    return None


def _factor(node: Any) -> str:
    """ "scalar", "vector" (one number per column) or "" by the recorded value."""
    found = value(node)
    if isinstance(found, (float, torch.SymFloat)):
        return "scalar"
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return ""
    sides = [side if isinstance(side, int) else 0 for side in found.shape]
    if all(side == 1 for side in sides):
        return "scalar"
    return "vector" if all(side == 1 for side in sides[:-1]) and sides[-1] > 0 else ""


def _is_cast(node: Node) -> bool:
    """Whether a node changes at most the float type of its input."""
    if op_name(node) not in CASTS or not isinstance(argument(node, 0, "input"), Node):
        return False
    new, old = value(node), value(node.args[0])
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return False
    wide = new.element_size() > 1
    return new.is_floating_point() and old.is_floating_point() and new.device == old.device and wide


def _is_row_view(node: Node) -> bool:
    """Whether a node regroups the rows of its input and keeps its columns."""
    if op_name(node) not in ROW_VIEWS or not isinstance(argument(node, 0, "input"), Node):
        return False
    new, old = value(node), value(node.args[0])
    if not isinstance(new, Tensor) or not isinstance(old, Tensor) or not new.dim() or not old.dim():
        return False
    sides = new.shape[-1], old.shape[-1]
    return all(isinstance(side, int) for side in sides) and sides[0] == sides[1]


def _drops(node: Node) -> bool:
    """Whether a dropout drops anything."""
    p = argument(node, 1, "p")
    training = [argument(node, 2, key) for key in ("training", "train")]
    asked = next((t for t in training if t is not None), True)
    return bool(asked) and p != 0


def _source(node: Node) -> tuple[list[Node], str]:
    """Nodes from an input back to what it is a copy, a cast or a regrouping of; why not."""
    path, refusal = [node], ""
    while len(path) <= DEEPEST:
        name = op_name(path[-1])
        drop = name == "dropout"
        if not (drop or name in COPIES or _is_cast(path[-1]) or _is_row_view(path[-1])):
            break
        if drop and _drops(path[-1]):
            refusal = "dropout in training mode is before A"
        path.append(argument(path[-1], 0, "input"))
    return path, refusal


def _plain(total: Node, beneath: list[Node], term: Node) -> Branch | None:
    outer = chain(term)
    inner = chain(outer.product.x) if outer is not None else None
    if outer is None or inner is None:
        return None
    if outer.vectors:
        raise Refusal("B's output is multiplied by a vector")
    a, b = inner.product, outer.product
    return Branch(total, beneath[-1], a.x, a.matrix, b.matrix, outer, inner)


def _dora(total: Node, beneath: list[Node], term: Node) -> Branch | None:
    """base + ((m - 1) · (base - bias) + m · s · B(A x)), as PEFT spells DoRA in eval mode."""
    for part, low, sign in _addends(term):
        if op_name(part) != "mul" or sign != 1 or len(part.args) != 2:
            continue
        for less, direct in (part.args, part.args[::-1]):
            if not isinstance(less, Node) or op_name(less) != "sub" or less.args[1:] != (1,):
                continue
            outer = chain(low)
            inner = chain(outer.product.x) if outer is not None else None
            base, bias = beneath[-1], beneath[-1].args[2]
            wanted = direct is base and bias is None
            if isinstance(direct, Node) and op_name(direct) == "sub" and bias is not None:
                wanted = direct.args == (base, bias)
            if outer is None or inner is None or not wanted or outer.vectors != [less.args[0]]:
                continue
            a, b = inner.product, outer.product
            inside = [direct] if isinstance(direct, Node) and direct is not base else []
            outer.nodes[:0] = [term, part, less, *inside]
            magnitude = less.args[0]
            assert isinstance(magnitude, Node)
            return Branch(total, base, a.x, a.matrix, b.matrix, outer, inner, magnitude)
    return None


def _own(found: Branch) -> list[Node]:
    """Nodes that go when the branch is fused: no other node may read them."""
    return [*found.outer.nodes, *found.inner.nodes]


def _check(found: Branch, beneath: list[Node], own: list[Node]) -> None:
    """Raise Refusal unless everything may be read where the sum is."""
    _check_readers(found, beneath, own)
    if why := found.outer.refusal or found.inner.refusal:
        raise Refusal(why)
    for name, part in (("A", found.inner.product), ("B", found.outer.product)):
        if part.bias is not None:
            raise Refusal(f"{name} has a bias")
    read = found.base.args[0]
    assert isinstance(read, Node)
    (mine, why), (theirs, _) = _source(found.x), _source(read)
    if mine[-1] is not theirs[-1]:
        raise Refusal("A and W read different inputs")
    if why:
        raise Refusal(why)
    _check_sizes(found)
    found.x = _common_input(found, mine, theirs, beneath)
    found.between = [*mine[:-1], *theirs[:-1], *beneath[:-1]]
    scales = [node for node, _ in (*found.outer.scalars, *found.inner.scalars)]
    reads = [*mine, *theirs, found.down.node, found.up.node, *found.inner.vectors, *scales]
    reads += [n for n in found.base.all_input_nodes if n not in reads]
    reads += [found.magnitude] if found.magnitude else []
    first = min((*own, *beneath, *mine[:-1], *theirs[:-1]))
    if (culprit := changed_between(reads, first, found.total)) is not None:
        raise Refusal(f"{op_name(culprit)} changes what is read in between")


def _check_readers(found: Branch, beneath: list[Node], own: list[Node]) -> None:
    inside = {found.total, *own, *beneath}
    for node in (*own, *beneath):
        other = next((user for user in node.users if user not in inside), None)
        if other is not None:
            what = "the product" if node in beneath else f"{op_name(node)} of the branch"
            raise Refusal(f"{what} is also read by {op_name(other) or other.op}")


def _check_sizes(found: Branch) -> None:
    down, up = found.down.shape, found.up.shape
    if down is None or up is None or down[0] != up[1]:
        raise Refusal("the sizes of A and B are not known")
    if down[0] * (up[0] + down[1]) >= up[0] * down[1]:
        raise Refusal(f"rank {down[0]} is not low for a ({up[0]}, {down[1]}) weight")
    gates = [value(v).shape[-1] for v in found.inner.vectors]
    if any(side != down[0] for side in gates):
        raise Refusal(f"gates of {gates} numbers for rank {down[0]}")


def _common_input(found: Branch, mine: list[Node], theirs: list[Node], beneath: list[Node]) -> Node:
    """The node that one product over both reads: of the base's type and the sum's shape."""
    regrouped = any(_is_row_view(n) for n in (*mine[:-1], *theirs[:-1], *beneath[:-1]))
    base = found.base.args[0]
    assert isinstance(base, Node)
    if not regrouped:
        return base
    node = next(n for n in mine if n is mine[-1] or _is_row_view(n))
    a, b, c, d = (value(n) for n in (node, base, found.total, found.inner.product.x))
    known = all(isinstance(t, Tensor) for t in (a, b, c, d))
    if not known or a.dtype != b.dtype or not a.dim() == c.dim() == d.dim():
        raise Refusal("A and W read their input in different shapes")
    return node
