"""One rule per op family: which axes of its arguments and results carry the same index.

`RULES` is keyed by the op's bare name. A rule may assume that the node has a tensor value. Ops in
no table are unknown: every axis that meets one is fixed, with the op's name as reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx.ir.products import argument, op_name, value
from sparsefx.passes.coupled_axes import Axes, Axis, count, rank, shape, shown
from sparsefx.passes.coupled_views import PIECES, VIEWS

Rule = Callable[[Axes, Node], None]


def apply(axes: Axes, node: Node) -> None:
    """Add what one node couples."""
    name = op_name(node).rstrip("_") if node.op == "call_function" else ""
    rule = RULES.get(name)
    if node.op == "output":
        for arg in node.all_input_nodes:
            axes.fix_node(arg, "model output")
    elif node.op == "placeholder":
        axes.fix_node(node, "model input")
    elif node.op == "get_attr" or name in ASSERTS:
        return
    elif rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        elementwise(axes, node)
    elif rule is not None and (isinstance(value(node), Tensor) or name == "getitem"):
        rule(axes, node)
    elif name not in PIECES:
        for each in (*node.all_input_nodes, node):
            axes.fix_node(each, f"{shown(node)}: no rule for this op")


def tensors(node: Node) -> Iterator[Node]:
    """Arguments that are tensors."""
    for arg in node.all_input_nodes:
        if isinstance(value(arg), Tensor):
            yield arg


def operand(node: Node, position: int, name: str) -> Node:
    """A tensor argument that the op must have."""
    found = tensor(node, position, name)
    assert found is not None
    return found


def tensor(node: Node, position: int, name: str = "") -> Node | None:
    arg = argument(node, position, name)
    return arg if isinstance(arg, Node) and isinstance(value(arg), Tensor) else None


def elementwise(axes: Axes, node: Node) -> None:
    """Broadcasting: axes are matched from the right."""
    for arg in tensors(node):
        for i in range(1, rank(arg) + 1):
            axes.same(axes.axis(arg, -i), axes.axis(node, -i))
    if op_name(node).startswith("add"):
        made = [a for a in tensors(node) if a not in axes.constant and shape(a) == shape(node)]
        for axis in axes.axes(node) if len(made) > 1 else []:
            axes.kind(axis, "residual")


def like_first(axes: Axes, node: Node) -> None:
    """The result has the first argument's axes, whatever else there is."""
    first = next(tensors(node))
    for left, right in zip(axes.axes(first), axes.axes(node), strict=True):
        axes.same(left, right)


def source(axes: Axes, node: Node) -> None:
    """Made from sizes alone."""
    axes.fix_node(node, f"{shown(node)} is made with a fixed size")


def contract(axes: Axes, node: Node, left: Axis, right: Axis, operands: tuple[Node, Node]) -> None:
    """A sum over an axis that both operands have."""
    axes.same(left, right)
    for axis, operand, other in ((left, operands[0], operands[1]), (right, *operands[::-1])):
        if operand in axes.constant and other not in axes.constant:
            axes.roles[axis] = "in"
    if operands[0] not in axes.constant and operands[1] not in axes.constant:
        axes.fix(left, f"{shown(node)} sums over it between two activations", order=False)


def made_by(axes: Axes, node: Node, weight: Node, axis: int, result: int, kind: str) -> None:
    """The result's axis is the weight's axis."""
    mine = axes.axis(weight, axis)
    axes.same(mine, axes.axis(node, result))
    axes.kind(mine, kind)
    if weight in axes.constant:
        axes.roles[mine] = "out"


def linear(axes: Axes, node: Node) -> None:
    x, w = operand(node, 0, "input"), operand(node, 1, "weight")
    for i in range(rank(x) - 1):
        axes.same(axes.axis(x, i), axes.axis(node, i))
    contract(axes, node, axes.axis(x, -1), axes.axis(w, -1), (x, w))
    if rank(w) == 2:
        made_by(axes, node, w, 0, -1, "ffn")
    _bias(axes, tensor(node, 2, "bias"), axes.axis(node, -1))


def _bias(axes: Axes, bias: Node | None, axis: Axis) -> None:
    if bias is not None and rank(bias):
        axes.same(axes.axis(bias, -1), axis)


def addmm(axes: Axes, node: Node) -> None:
    _product(axes, node, argument(node, 1, "mat1"), argument(node, 2, "mat2"))
    bias = tensor(node, 0, "input")
    if bias is not None:
        for i in range(1, rank(bias) + 1):
            axes.same(axes.axis(bias, -i), axes.axis(node, -i))


def matmul(axes: Axes, node: Node) -> None:
    _product(axes, node, node.args[0], node.args[1])


def _product(axes: Axes, node: Node, a: Any, b: Any) -> None:
    contract(axes, node, axes.axis(a, -1), axes.axis(b, -1 if rank(b) == 1 else -2), (a, b))
    if rank(b) > 1:
        if rank(b) == 2:
            made_by(axes, node, b, -1, -1, "ffn")
        axes.same(axes.axis(b, -1), axes.axis(node, -1))
    if rank(a) > 1:
        axes.same(axes.axis(a, -2), axes.axis(node, -2 if rank(b) > 1 else -1))
        if a in axes.constant and b not in axes.constant:
            axes.roles[axes.axis(a, -2)] = "out"
    for arg in (a, b):
        for i in range(3, rank(arg) + 1):
            axes.same(axes.axis(arg, -i), axes.axis(node, -i))


def convolution(axes: Axes, node: Node) -> None:
    x, w = operand(node, 0, "input"), operand(node, 1, "weight")
    sides = rank(w) - 2
    groups = argument(node, 8 if op_name(node) == "convolution" else 6, "groups") or 1
    channels, result = axes.axis(x, -1 - sides), axes.axis(node, -1 - sides)
    _spatial(axes, node, x, w, sides)
    if op_name(node) == "convolution" and argument(node, 6, "transposed"):
        axes.fix_node(node, f"{shown(node)}: transposed")
        axes.fix_node(w, f"{shown(node)}: transposed")
        axes.fix(channels, f"{shown(node)}: transposed")
        return
    made_by(axes, node, w, 0, -1 - sides, "channels")
    _bias(axes, tensor(node, 2, "bias"), result)
    if groups == 1:
        contract(axes, node, channels, axes.axis(w, 1), (x, w))
    else:
        _grouped(axes, node, channels, axes.axis(w, 0), int(groups))
        axes.fix(axes.axis(w, 1), f"{shown(node)}: inside a convolution group")


def _grouped(axes: Axes, node: Node, channels: Axis, filters: Axis, groups: int) -> None:
    """Whole groups are what may go; a depthwise convolution's group is one channel."""
    group = axes.invent(node, groups)
    for axis in (channels, filters):
        each = count(axes.size(axis))
        axes.link(axis, each, group, each // (len(each) // groups))


def _spatial(axes: Axes, node: Node, x: Node, w: Node, sides: int) -> None:
    for i in range(sides):
        for each in (x, w, node):
            axes.fix(axes.axis(each, -1 - i), f"{shown(node)}: spatial")
    if rank(x) == sides + 2:
        axes.same(axes.axis(x, 0), axes.axis(node, 0))


def transposed_convolution(axes: Axes, node: Node) -> None:
    x, w = operand(node, 0, "input"), operand(node, 1, "weight")
    sides = rank(w) - 2
    if (argument(node, 6, "groups") or 1) != 1:
        for each in (x, w, node):
            axes.fix_node(each, f"{shown(node)}: transposed convolution in groups")
        return
    _spatial(axes, node, x, w, sides)
    contract(axes, node, axes.axis(x, -1 - sides), axes.axis(w, 0), (x, w))
    made_by(axes, node, w, 1, -1 - sides, "channels")
    _bias(axes, tensor(node, 2, "bias"), axes.axis(node, -1 - sides))


def channels_only(sides: int) -> Rule:
    """Pooling and resizing: leading axes stay, the last `sides` are spatial."""

    def rule(axes: Axes, node: Node) -> None:
        x = next(tensors(node))
        for i in range(rank(node)):
            if i < rank(node) - sides:
                axes.same(axes.axis(x, i), axes.axis(node, i))
            else:
                axes.fix(axes.axis(x, i), f"{shown(node)}: spatial")
                axes.fix(axes.axis(node, i), f"{shown(node)}: spatial")

    return rule


def batch_norm(axes: Axes, node: Node) -> None:
    like_first(axes, node)
    for i, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1):
        vector = tensor(node, i, name)
        if vector is not None:
            axes.same(axes.axis(vector, 0), axes.axis(node, 1))
            if name == "weight":
                axes.roles[axes.axis(vector, 0)] = "scale"
    if tensor(node, 3, "running_mean") is None:
        for axis in axes.axes(node):
            axes.fix(axis, f"{shown(node)}: no running statistics")


def trailing_norm(axes: Axes, node: Node) -> None:
    """layer_norm, rms_norm: statistics over the last axes."""
    like_first(axes, node)
    sides = len(node.args[1])  # type: ignore[arg-type]
    for vector in list(tensors(node))[1:]:
        for i in range(1, rank(vector) + 1):
            axes.same(axes.axis(vector, -i), axes.axis(node, -i))
    for i in range(1, sides + 1):
        axes.fix(axes.axis(node, -i), f"{shown(node)} normalises over it", order=False)


def group_norm(axes: Axes, node: Node) -> None:
    """Channels of a group share statistics: whole groups may move, none may go."""
    like_first(axes, node)
    groups = axes.invent(node, int(argument(node, 1, "num_groups")))
    each = count(axes.size(axes.axis(node, 1)))
    per_group = len(each) // axes.size(groups)
    axes.link(axes.axis(node, 1), each, groups, each // per_group)
    for vector in list(tensors(node))[1:]:
        axes.same(axes.axis(vector, 0), axes.axis(node, 1))
    axes.fix(axes.axis(node, 1), f"{shown(node)} normalises over it", order=False)


def softmax(axes: Axes, node: Node) -> None:
    like_first(axes, node)
    dim = argument(node, 1, "dim")
    axes.fix(axes.axis(node, dim), f"{shown(node)} normalises over it", order=False)


def scan(axes: Axes, node: Node) -> None:
    like_first(axes, node)
    axes.fix(axes.axis(node, argument(node, 1, "dim")), f"{shown(node)} goes along it")


def reduction(axes: Axes, node: Node) -> None:
    """mean, sum, amax: the axes summed over must stay, the others pass."""
    x = next(tensors(node))
    dims = argument(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else dims or range(rank(x))
    gone = {d % rank(x) for d in dims}
    held = rank(x) == rank(node)
    for new, old in enumerate(i for i in range(rank(x)) if held or i not in gone):
        if old not in gone:
            axes.same(axes.axis(x, old), axes.axis(node, new))
    for i in gone:
        axes.fix(axes.axis(x, i), f"{shown(node)} reduces over it", order=False)


def attention(axes: Axes, node: Node) -> None:
    """scaled_dot_product_attention over (…, heads, tokens, width), heads grouped or not."""
    q, k, v = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    mask = tensor(node, 3, "attn_mask")
    for each in (k, v):
        for i in range(rank(each) - 2):
            mine, theirs = axes.axis(each, i), axes.axis(node, i)
            axes.same(mine, theirs)
            if 1 < axes.size(mine) < axes.size(theirs):
                heads = count(axes.size(theirs))
                axes.link(theirs, heads, mine, heads // (len(heads) // axes.size(mine)))
    for i in range(rank(q) - 1):
        axes.same(axes.axis(q, i), axes.axis(node, i))
    axes.same(axes.axis(q, -1), axes.axis(k, -1))
    axes.same(axes.axis(v, -1), axes.axis(node, -1))
    axes.same(axes.axis(k, -2), axes.axis(v, -2))
    axes.fix(axes.axis(q, -1), f"{shown(node)} sums over it between activations", order=False)
    axes.fix(axes.axis(k, -2), f"{shown(node)} normalises over it", order=False)
    for i in range(1, rank(mask) + 1 if mask is not None else 0):
        assert mask is not None
        axes.same(axes.axis(mask, -i), axes.axis(k, -2) if i == 1 else axes.axis(q, -i))
    if argument(node, 5, "is_causal"):
        axes.fix(axes.axis(q, -2), f"{shown(node)} is causal")
        axes.fix(axes.axis(k, -2), f"{shown(node)} is causal")


def embedding(axes: Axes, node: Node) -> None:
    table, ids = operand(node, 0, "weight"), operand(node, 1, "indices")
    axes.fix(axes.axis(table, 0), f"{shown(node)} looks rows up by number")
    made_by(axes, node, table, 1, -1, "residual")
    for i in range(rank(ids)):
        axes.same(axes.axis(ids, i), axes.axis(node, i))


ASSERTS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size"}
"""Ops that read a tensor and couple nothing."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("alias", "clone", "contiguous", "detach", "dropout", "to", "_to_copy", "lift_fresh_copy",
         "float", "type_as", "feature_dropout", "alpha_dropout", "zeros_like", "ones_like",
         "full_like", "native_dropout", "identity"),
        like_first,
    ),
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "relu", "gelu", "silu", "hardtanh", "hardswish",
         "hardsigmoid", "relu6", "mish", "selu", "celu", "softplus", "leaky_relu", "where",
         "masked_fill", "rsub", "pow", "copy", "__and", "__or", "addcmul", "clamp", "clip",
         "log_sigmoid", "square", "subtract", "multiply", "divide", "true_divide"),
        elementwise,
    ),
    **dict.fromkeys(
        ("arange", "zeros", "ones", "full", "empty", "scalar_tensor", "new_zeros", "new_ones",
         "new_full", "new_empty", "linspace", "eye"),
        source,
    ),
    "linear": linear, "addmm": addmm, "mm": matmul, "bmm": matmul, "matmul": matmul,
    "conv1d": convolution, "conv2d": convolution, "conv3d": convolution,
    "convolution": convolution,
    "conv_transpose1d": transposed_convolution, "conv_transpose2d": transposed_convolution,
    "conv_transpose3d": transposed_convolution,
    **{f"{name}{n}d": channels_only(n) for n in (1, 2, 3)
       for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool",
                    "upsample_nearest")},
    "upsample_bilinear2d": channels_only(2), "upsample_bicubic2d": channels_only(2),
    "upsample_linear1d": channels_only(1), "upsample_trilinear3d": channels_only(3),
    "batch_norm": batch_norm, "layer_norm": trailing_norm, "rms_norm": trailing_norm,
    "group_norm": group_norm,
    "softmax": softmax, "_softmax": softmax, "log_softmax": softmax, "cumsum": scan,
    "mean": reduction, "sum": reduction, "amax": reduction, "amin": reduction,
    "scaled_dot_product_attention": attention, "embedding": embedding,
    **VIEWS,
}  # fmt: skip
