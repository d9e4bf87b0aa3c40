"""Random graphs like those dynamo gives, with what graph passes stumble over.

`draw(seed)` is a pure function of the seed: branches, reuse of weights, in-place operations, views,
several outputs, dead code, casts, slices, siblings, epilogues, low-rank patterns and near misses of
them, unpacked weights, mutation between two readers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from random_graphs import WIDTHS, Builder, Drawn, Value
from torch import fx
from torch.nn import functional as F

from sparsefx.ir.format import Format
from sparsefx.ir.op import UNPACK
from sparsefx.ir.sites import ChosenFormat, Site


def draw(seed: int) -> Drawn:
    """The graph of a seed."""
    builder = Builder(seed)
    return builder.build(builder.rng.randint(3, 9), STEPS)


def product(b: Builder) -> None:
    b.product(b.pick())


def siblings(b: Builder) -> None:
    """Two or three products of one x, perhaps with a write to x between them."""
    x = b.pick()
    for i in range(b.rng.randint(2, 3)):
        if i and b.rng.random() < 0.2:
            b.call("mul_", x.node, 0.5)
        b.product(x)


def gated(b: Builder) -> None:
    x, n = b.pick(), b.rng.choice(WIDTHS)
    gate, up = b.sparse(x.node, n, x.width), b.sparse(x.node, n, x.width)
    b.keep(b.call(operator.mul, b.call(F.silu, gate), up), n)
    if b.rng.random() < 0.3:
        b.keep(gate, n)


def epilogue(b: Builder) -> None:
    """Bias, activation and residual after a product; sometimes the inside is read again, or x is
    edited before them.
    """
    x, n = b.pick(), b.rng.choice(WIDTHS)
    y = b.sparse(x.node, n, x.width)
    inside = y
    if b.rng.random() < 0.15:
        b.call("mul_", x.node, 0.75)
    if b.rng.random() < 0.4:
        y = b.call(operator.add, y, b.hold(b.random(n), weight=True))
    if b.rng.random() < 0.6:
        y = b.call(b.rng.choice([F.relu, F.gelu, F.silu, torch.tanh, "relu"]), y)
    if b.rng.random() < 0.6:
        other = b.pick(n).node
        a, c = (y, other) if b.rng.random() < 0.5 else (other, y)
        y = b.call(b.rng.choice([operator.add, operator.add, operator.sub, torch.add]), a, c)
    b.keep(y, n)
    if b.rng.random() < 0.3:
        b.keep(inside, n)


def dense(b: Builder) -> None:
    """A product with a parameter in one of its spellings, packed at compile time or not."""
    x, n = b.pick(), b.rng.choice(WIDTHS)
    how = b.rng.randrange(5)
    shape = (x.width, n) if how in (1, 4) else (n, x.width)
    weight = b.matrix(*shape)
    bias = b.hold(b.random(n), weight=True)
    if how == 0:
        node = b.call(F.linear, x.node, weight, bias)
    elif how == 1:
        node = b.call(operator.matmul, x.node, weight)
    elif how == 2:
        node = b.call(torch.matmul, x.node, b.call("t", weight))
    elif how == 3:
        node = b.call(torch.addmm, bias, x.node, b.call("transpose", weight, 0, 1))
    else:
        node = b.call(torch.mm, x.node, weight)
    b.keep(node, n)


def unpacked(b: Builder) -> None:
    """A product with a weight that is unpacked first; sometimes that is read as well."""
    x, n = b.pick(), b.rng.choice(WIDTHS)
    packed, nodes = b.buffers(n, x.width)
    weight = b.call(UNPACK, nodes, str(packed.format), n, x.width, torch.float64)
    for _ in range(b.rng.randint(1, 2)):
        bias = b.hold(b.random(n), weight=True) if b.rng.random() < 0.5 else None
        if b.rng.random() < 0.5:
            b.keep(b.call(F.linear, x.node, weight, bias), n)
        else:
            b.keep(b.call(operator.matmul, x.node, b.call("t", weight)), n)
    if b.rng.random() < 0.2:
        b.keep(b.call(operator.add, b.pick(x.width).node, b.call("sum", weight, 0)), x.width)


def low_rank(b: Builder) -> None:
    """W x + s · B(A x) in one of its spellings, or a near miss."""
    x, n, r = b.pick(), b.rng.choice(WIDTHS), b.rng.choice((2, 3))
    y = b.sparse(x.node, n, x.width)
    for _ in range(b.rng.randint(1, 2)):
        y = _added(b, y, _branch(b, x, n, r), n)
    b.keep(y, n)


def _branch(b: Builder, x: Value, n: int, r: int) -> fx.Node:
    odd = b.rng.random()
    node = x.node
    if odd < 0.12:
        node = b.pick(x.width).node  # A and W read different inputs
    elif odd < 0.24:
        b.call(b.rng.choice(["mul_", "add_"]), node, 0.75)  # x changes between W and A
    if b.rng.random() < 0.3:
        node = b.call(F.dropout, node, 0.25, False)
    dtype = torch.float64
    if b.rng.random() < 0.2:
        b.casts, dtype = True, torch.float32
        node = b.call("to", node, dtype)
    h = _thin(b, node, r, x.width, odd > 0.95, dtype)
    if b.rng.random() < 0.3:
        gate = b.random(r).to(dtype)
        gate[: b.rng.randrange(r + 1)] = 0
        h = b.call(operator.mul, h, b.hold(gate, weight=True))
    if 0.24 < odd < 0.3:
        h = b.call(torch.tanh, h)
    t = _thin(b, h, n, r, dtype=dtype)
    how = b.rng.randrange(5)
    if how == 0:
        t = b.call(operator.mul, t, 2.0)
    elif how == 1:
        t = b.call(operator.mul, b.hold(b.random(1).reshape(()), weight=True), t)
    elif how == 2:
        t = b.call(operator.truediv, t, 4.0)
    elif how == 3:
        t = b.call("mul_", t, b.hold(b.random(1)))
    if 0.3 < odd < 0.36 and dtype is torch.float64:
        b.keep(t, n)  # read again
    return t


def _thin(
    b: Builder, x: fx.Node, n: int, k: int, bias: bool = False, dtype: torch.dtype = torch.float64
) -> fx.Node:
    """x · Wᵀ of x's type, with the weight stored either way."""
    weight = b.random(n, k, scale=k**-0.5).to(dtype)
    if b.rng.random() < 0.6 or bias:
        added = b.hold(b.random(n).to(dtype), weight=True) if bias else None
        return b.call(F.linear, x, b.hold(weight, weight=True), added)
    flipped = b.hold(weight.T.contiguous(), weight=True)
    return b.call(operator.matmul, x, flipped)


def _added(b: Builder, y: fx.Node, t: fx.Node, n: int) -> fx.Node:
    how = b.rng.randrange(9)
    if how == 0:
        return b.call(operator.add, t, y)
    if how == 1:
        return b.call(operator.sub, y, t)
    if how == 2:
        return b.call(operator.iadd, y, t)
    if how == 3:
        return b.call(torch.add, y, t, alpha=0.5)
    if how == 4:
        return b.call(operator.sub, t, y)
    if how == 5:
        b.keep(y, n)  # the product alone is read as well
    return b.call(operator.add, y, t)


def dora(b: Builder) -> None:
    """base + ((m - 1) · (base - bias) + m · s · B(A x))."""
    x, n = b.pick(), b.rng.choice(WIDTHS)
    bias = b.hold(b.random(n), weight=True) if b.rng.random() < 0.7 else None
    y = b.sparse(x.node, n, x.width, bias)
    m = b.call("view", b.hold(b.random(n).abs(), weight=True), 1, -1)
    low = _thin(b, _thin(b, x.node, 2, x.width), n, 2)
    direct = b.call(operator.sub, y, bias) if bias is not None else y
    first = b.call(operator.mul, b.call(operator.sub, m, 1), direct)
    second = b.call(operator.mul, b.call(operator.mul, m, low), 1.5)
    b.keep(b.call(operator.add, y, b.call(operator.add, first, second)), n)


def pointwise(b: Builder) -> None:
    a = b.pick()
    how = b.rng.randrange(6)
    if how < 2:
        node = b.call(b.rng.choice([torch.tanh, F.relu, F.gelu, "sigmoid", torch.neg]), a.node)
    elif how == 2:
        node = b.call(operator.mul, a.node, b.rng.choice([0.5, 1.0, -2.0]))
    else:
        target = b.rng.choice([operator.add, operator.sub, operator.mul, torch.maximum])
        node = b.call(target, a.node, b.pick(a.width).node)
        node = b.call(torch.tanh, node) if target is operator.mul else node
    b.keep(node, a.width)


def twice(b: Builder) -> None:
    """The same computation two times; sometimes something is written in between."""
    a, c = b.pick(), b.rng.choice([0.5, 2.0])
    first = b.call(operator.sub, b.call(operator.mul, a.node, c), a.node)
    if b.rng.random() < 0.4:
        b.call("add_", a.node, 0.25)
    second = b.call(operator.sub, b.call(operator.mul, a.node, c), a.node)
    if b.rng.random() < 0.3:
        b.call("mul_", first, 3.0)
    b.keep(b.call(operator.add, first, b.call(torch.tanh, second)), a.width)


def in_place(b: Builder) -> None:
    """A write to a value that others read before and after, by its name or by the result's."""
    a = b.pick()
    how = b.rng.randrange(6)
    if how == 0:
        node = b.call("relu_", a.node)
    elif how == 1:
        node = b.call(F.relu, a.node, inplace=True)
    elif how == 2:
        node = b.call("add_", a.node, b.pick(a.width).node)
    elif how == 3:
        node = b.call(operator.iadd, a.node, 0.5)
    elif how == 4:
        b.call(operator.setitem, a.node, (slice(None), slice(0, 4)), 0.5)
        return
    else:
        node = b.call("mul_", a.node, 0.5)
    if b.rng.random() < 0.5:
        b.keep(node, a.width)


def through_a_view(b: Builder) -> None:
    """A write through a slice, a chunk or another shape."""
    a, how = b.pick(), b.rng.randrange(3)
    if how == 0:
        view = b.call(operator.getitem, a.node, (slice(None), slice(2, 7)))
    elif how == 1:
        view = b.call(operator.getitem, b.call("chunk", a.node, 2, -1), b.rng.randrange(2))
    else:
        view = b.call("unsqueeze", a.node, 1)
    if b.rng.random() < 0.5:
        b.call("mul_", view, -1.0)
    else:
        b.call("copy_", view, b.call(torch.tanh, view))


def views(b: Builder) -> None:
    """Other shapes and back, with a product or an activation inside."""
    a, how = b.pick(), b.rng.randrange(4)
    if how == 0:
        node = b.call("reshape", b.call("reshape", a.node, -1, a.width // 4, 4), -1, a.width)
    elif how == 1:
        node = b.call("t", b.call(torch.tanh, b.call("t", a.node)))
    elif how == 2:
        wide = b.call("unsqueeze", a.node, 0)
        n = b.rng.choice(WIDTHS)
        y = b.sparse(wide, n, a.width)
        b.keep(b.call("squeeze", b.call(F.relu, y), 0), n)
        return
    else:
        node = b.call("contiguous", b.call("clone", a.node))
    b.keep(node, a.width)


def pieces(b: Builder) -> None:
    """Slices and concatenation of columns."""
    a = b.pick(32)
    halves = b.call(torch.split, a.node, 16, -1)
    left, right = (b.call(operator.getitem, halves, i) for i in (0, 1))
    b.keep(left, 16)
    if b.rng.random() < 0.5:
        b.keep(b.call(torch.cat, [right, left], -1), 32)
    else:
        b.keep(b.call(operator.getitem, a.node, (slice(None), slice(0, None, 2))), 16)


def norm(b: Builder) -> None:
    """A norm or a scale before a product."""
    x, how = b.pick(), b.rng.randrange(3)
    scale = b.hold(b.random(x.width), weight=True)
    if how == 0:
        node = b.call(F.layer_norm, x.node, (x.width,), scale, b.hold(b.random(x.width)))
    elif how == 1:
        node = b.call(operator.mul, b.call(F.rms_norm, x.node, (x.width,)), scale)
    else:
        mean, var = b.hold(b.random(x.width)), b.hold(b.random(x.width).abs() + 0.5)
        node = b.call(F.batch_norm, x.node, mean, var, scale, None, False)
    b.product(Value(node, x.width))
    if b.rng.random() < 0.3:
        b.keep(node, x.width)


def cast(b: Builder) -> None:
    a = b.pick()
    b.casts = True
    b.keep(
        b.call("to", b.call(F.relu, b.call("to", a.node, torch.float32)), torch.float64), a.width
    )


def dead(b: Builder) -> None:
    """What nothing reads."""
    x = b.pick()
    b.call(torch.tanh, b.sparse(x.node, 16, x.width))


def packed_later(b: Builder) -> None:
    """A dense weight that is packed at compile time, losslessly: factors are powers of 2."""
    x, n = b.pick(), b.rng.choice(WIDTHS)
    if b.rng.random() < 0.5:
        x = Value(_scaled(b, x.node, x.width), x.width)
        if b.rng.random() < 0.2:
            b.keep(x.node, x.width)
    weight = b.hold(b.random(n, x.width, scale=0.25), weight=True)
    site = Site((f"w{len(b.tensors)}.weight",), (n, x.width), "linear")
    b.chosen[weight] = ChosenFormat(site, Format.parse("fp32"))
    for _ in range(2 if b.rng.random() < 0.2 else 1):
        y = b.call(F.linear, x.node, weight, b.hold(b.random(n), weight=True))
        how = b.rng.randrange(4)
        if how < 2:
            y = _added(b, y, _branch(b, x, n, 2), n)
        elif how == 2:
            y = _scaled(b, y, n)
        b.keep(y, n)


def _scaled(b: Builder, x: fx.Node, width: int) -> fx.Node:
    """What can be folded into a product before or after; sometimes x is edited on the way."""
    scale = b.hold(2.0 ** torch.randint(-2, 3, (width,), generator=b.generator).double(), True)
    how = b.rng.randrange(3)
    if how == 0:
        node = b.call(F.layer_norm, x, (width,), scale, b.hold(b.random(width), weight=True))
    elif how == 1:
        node = b.call(operator.mul, x, scale)
    else:
        node = b.call(operator.add, x, b.hold(b.random(width), weight=True))
    if b.rng.random() < 0.4:
        b.call("mul_", x, 0.5)
    return node


STEPS: tuple[Callable[[Builder], None], ...] = (
    product, siblings, gated, epilogue, epilogue, dense, unpacked, low_rank, low_rank, low_rank,
    dora, pointwise, twice, in_place, through_a_view, views, pieces, norm, cast, dead, packed_later,
    packed_later,
)  # fmt: skip
