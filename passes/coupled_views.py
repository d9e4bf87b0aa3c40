"""Rules of ops that only rearrange: reshape, transpose, cut, join, repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch.fx import Node

from sparsefx.ir.products import argument, op_name, value
from sparsefx.passes.coupled_axes import Axes, Axis, count, rank, shape, shown


def reshape(axes: Axes, node: Node) -> None:
    """Axes are aligned where the products of leading sizes agree."""
    x: Any = node.args[0]
    left, right = list(axes.axes(x)), list(axes.axes(node))
    while left or right:
        ins, outs = _aligned(axes, left, right)
        _block(axes, node, ins, outs)


def _aligned(axes: Axes, left: list[Axis], right: list[Axis]) -> tuple[list[Axis], list[Axis]]:
    """Take the shortest leading runs with equal products, axes of size 1 left out."""
    ins: list[Axis] = []
    outs: list[Axis] = []
    a = b = 1
    while True:
        if left and (a < b or (a == b == 1) or not right):
            ins.append(left.pop(0))
            a *= axes.size(ins[-1])
        elif right:
            outs.append(right.pop(0))
            b *= axes.size(outs[-1])
        if (a == b > 1) or not (left or right):
            break
    keep = [[x for x in side if axes.size(x) > 1] for side in (ins, outs)]
    return keep[0], keep[1]


def _block(axes: Axes, node: Node, ins: list[Axis], outs: list[Axis]) -> None:
    if not ins or not outs:
        return
    if len(outs) == 1:
        axes.factor(outs[0], ins, node)
    elif len(ins) == 1:
        axes.factor(ins[0], outs, node)
    elif (sizes := _refined(axes, ins, outs)) is None:
        for axis in (*ins, *outs):
            axes.fix(axis, f"{shown(node)}: {_sides(axes, ins)} to {_sides(axes, outs)}")
    else:
        parts = [axes.invent(node, size) for size in sizes]
        for side in (ins, outs):
            pending = list(parts)
            for axis in side:
                mine: list[Axis] = []
                while np.prod([axes.size(p) for p in mine], initial=1) < axes.size(axis):
                    mine.append(pending.pop(0))
                axes.factor(axis, mine, node)


def _refined(axes: Axes, ins: Sequence[Axis], outs: Sequence[Axis]) -> list[int] | None:
    """Sizes both sides can be built of, None when the cuts do not nest."""
    ends = {1}
    for side in (ins, outs):
        ends |= {int(p) for p in np.cumprod([axes.size(a) for a in side])}
    cuts = sorted(ends)
    if any(b % a for a, b in pairwise(cuts)):
        return None
    return [b // a for a, b in pairwise(cuts)]


def _sides(axes: Axes, group: Sequence[Axis]) -> tuple[int, ...]:
    return tuple(axes.size(a) for a in group)


def permute(axes: Axes, node: Node) -> None:
    x: Any = node.args[0]
    for new, old in enumerate(_order(node, rank(x))):
        axes.same(axes.axis(x, old), axes.axis(node, new))


def _order(node: Node, sides: int) -> list[int]:
    """The old axis of every new one."""
    order = list(range(sides))
    name, args = op_name(node).rstrip("_"), node.args[1:]
    if name == "permute":
        return [int(d) % sides for d in args[0]]  # type: ignore[union-attr, arg-type]
    if name in ("t", "T", "numpy_T"):
        return order[::-1]
    if name in ("mT", "adjoint"):
        a, b = -1, -2
    else:
        a, b = args  # type: ignore[assignment]
    order[a], order[b] = order[b], order[a]
    return order


def squeeze(axes: Axes, node: Node) -> None:
    """squeeze and unsqueeze: axes of size 1 come and go, the others keep their turn."""
    x: Any = node.args[0]
    name, dim = op_name(node).rstrip("_"), argument(node, 1, "dim")
    left, right = list(range(rank(x))), list(range(rank(node)))
    if name == "unsqueeze":
        right.pop(dim)
    elif rank(x) != rank(node):
        dims = left if dim is None else [dim] if isinstance(dim, int) else dim
        gone = {d % rank(x) for d in dims if shape(x)[d] == 1}
        left = [i for i in left if i not in gone]
    for old, new in zip(left, right, strict=True):
        axes.same(axes.axis(x, old), axes.axis(node, new))


def expand(axes: Axes, node: Node) -> None:
    x: Any = node.args[0]
    for i in range(1, rank(x) + 1):
        axes.same(axes.axis(x, -i), axes.axis(node, -i))


def repeat(axes: Axes, node: Node) -> None:
    x: Any = node.args[0]
    for i in range(1, rank(x) + 1):
        old, new = axes.axis(x, -i), axes.axis(node, -i)
        if axes.size(old) == axes.size(new):
            axes.same(old, new)
        elif axes.size(old) > 1:
            each = count(axes.size(new))
            axes.link(new, each, old, each % axes.size(old))


def repeat_interleave(axes: Axes, node: Node) -> None:
    x: Any = node.args[0]
    times, dim = node.args[1], argument(node, 2, "dim")
    if not isinstance(times, int) or dim is None:
        for each in (x, node):
            axes.fix_node(each, f"{shown(node)}: by a tensor of counts or over all axes")
        return
    for i in range(rank(x)):
        old, new = axes.axis(x, i), axes.axis(node, i)
        if axes.size(old) == axes.size(new):
            axes.same(old, new)
        elif axes.size(old) > 1:
            at = count(axes.size(new))
            axes.link(new, at, old, at // times)


def cut(axes: Axes, node: Node, x: Node, dim: int, start: int, step: int = 1) -> None:
    """`node` is x[start::step] along dim; the other axes are the same."""
    for i in range(rank(x)):
        old, new = axes.axis(x, i), axes.axis(node, i)
        if i != dim % rank(x) or axes.size(old) == axes.size(new):
            axes.same(old, new)
        elif axes.size(new):
            at = count(axes.size(new))
            axes.link(new, at, old, start + step * at)


def take(axes: Axes, node: Node) -> None:
    """slice and narrow."""
    x: Any = node.args[0]
    dim, start, step = argument(node, 1, "dim") or 0, argument(node, 2, "start") or 0, 1
    if op_name(node) == "slice":
        step = argument(node, 4, "step") or 1
    size = shape(x)[dim]
    first = min(max(start + size if start < 0 else start, 0), size)
    cut(axes, node, x, dim, first, step)
    if step != 1:
        axes.fix(axes.axis(x, dim), f"{shown(node)} steps by {step}")


def select(axes: Axes, node: Node) -> None:
    x: Any = node.args[0]
    _without(axes, node, x, argument(node, 1, "dim"))


def _without(axes: Axes, node: Node, x: Node, dim: int) -> None:
    rest = [i for i in range(rank(x)) if i != dim % rank(x)]
    for new, old in enumerate(rest):
        axes.same(axes.axis(x, old), axes.axis(node, new))
    axes.fix(axes.axis(x, dim), f"{shown(node)} selects by number")
    axes.kind(axes.axis(x, dim), "selected")


def getitem(axes: Axes, node: Node) -> None:
    """A piece of a list: what its maker's row of PIECES says."""
    maker: Any = node.args[0]
    rule = PIECES.get(op_name(maker))
    if rule is None:
        axes.fix_node(node, f"{shown(maker)}: no rule for this op")
    else:
        rule(axes, node, maker, int(node.args[1]))  # type: ignore[arg-type]


def split_piece(axes: Axes, node: Node, maker: Node, index: int) -> None:
    x: Any = maker.args[0]
    dim = argument(maker, 2, "dim") or 0
    before = value(maker)[:index]
    cut(axes, node, x, dim, sum(int(t.shape[dim]) for t in before))


def unbind_piece(axes: Axes, node: Node, maker: Node, index: int) -> None:
    x: Any = maker.args[0]
    _without(axes, node, x, argument(maker, 1, "dim") or 0)


def concat(axes: Axes, node: Node) -> None:
    parts: Any = node.args[0]
    dim = (argument(node, 1, "dim") or 0) % rank(node)
    start = 0
    for part in parts:
        for i in range(rank(part)):
            old, new = axes.axis(part, i), axes.axis(node, i)
            if i != dim:
                axes.same(old, new)
            else:
                at = count(axes.size(old))
                axes.link(new, start + at, old, at)
        start += axes.size(axes.axis(part, dim))


def stack(axes: Axes, node: Node) -> None:
    parts: Any = node.args[0]
    dim = (argument(node, 1, "dim") or 0) % rank(node)
    rest = [i for i in range(rank(node)) if i != dim]
    for part in parts:
        for old, new in enumerate(rest):
            axes.same(axes.axis(part, old), axes.axis(node, new))
    axes.fix(axes.axis(node, dim), f"{shown(node)} lays tensors side by side")


def glu(axes: Axes, node: Node) -> None:
    """The halves of one axis meet."""
    x: Any = node.args[0]
    dim = argument(node, 1, "dim")
    dim = (-1 if dim is None else dim) % rank(x)
    for i in range(rank(x)):
        old, new = axes.axis(x, i), axes.axis(node, i)
        if i != dim:
            axes.same(old, new)
        else:
            at = count(axes.size(old))
            axes.link(old, at, new, at % axes.size(new))


def pad(axes: Axes, node: Node) -> None:
    x: Any = node.args[0]
    for i in range(rank(x)):
        old, new = axes.axis(x, i), axes.axis(node, i)
        axes.same(old, new)
        if axes.size(old) != axes.size(new):
            axes.fix(old, f"{shown(node)} pads it")
            axes.fix(new, f"{shown(node)} pads it")


def moved(axes: Axes, node: Node) -> None:
    """roll and flip: values move along named axes, which therefore stay."""
    x: Any = node.args[0]
    for i in range(rank(x)):
        axes.same(axes.axis(x, i), axes.axis(node, i))
    dims: Any = node.args[2] if op_name(node) == "roll" and len(node.args) > 2 else node.args[1]
    if op_name(node) == "roll" and len(node.args) < 3:
        dims = range(rank(x))
    for dim in dims:
        axes.fix(axes.axis(node, dim), f"{shown(node)} moves along it")


PIECES: dict[str, Callable[[Axes, Node, Node, int], None]] = {
    "split": split_piece, "split_with_sizes": split_piece, "chunk": split_piece,
    "unsafe_split": split_piece, "unbind": unbind_piece,
}  # fmt: skip

VIEWS: dict[str, Callable[[Axes, Node], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), reshape),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "t", "T", "numpy_T", "mT"), permute),
    "squeeze": squeeze, "unsqueeze": squeeze,
    "expand": expand, "expand_as": expand, "broadcast_to": expand,
    "repeat": repeat, "repeat_interleave": repeat_interleave,
    "slice": take, "narrow": take, "select": select, "getitem": getitem,
    "cat": concat, "concat": concat, "concatenate": concat, "stack": stack,
    "glu": glu, "pad": pad, "constant_pad_nd": pad, "roll": moved, "flip": moved,
}  # fmt: skip
