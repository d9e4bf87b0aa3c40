"""Follow the channels of a tensor through a graph: which entry of a source scales each element.

Beside every tensor on the way stands an *index*, an integer tensor of its shape. Ops that only move
values are run on it, so views, splits, repeated key/value heads and attention need no theory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from sparsefx.ir.products import READS_SHAPE, TRANSPOSES, VIEWS, Use, argument, op_name, value
from sparsefx.passes.normalise import operands

CASTS = {
    "to", "_to_copy", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous",
    "clone", "alias", "detach", "lift_fresh_copy", "cpu", "cuda", "wait_tensor",
}  # fmt: skip
MOVES = (VIEWS | TRANSPOSES | CASTS | {"_unsafe_view", "movedim", "repeat_interleave"}) - {
    "index_select", "requires_grad_", "_assert_tensor_metadata",
}  # fmt: skip
"""Ops that only move, copy or repeat values."""
LIKE = {"type_as", "expand_as", "view_as"}
"""Their second operand gives a shape or a dtype only."""
IGNORED = READS_SHAPE | {"_assert_tensor_metadata"}
SCALES = {"mul", "div", "truediv"}
POSITIVE = {"relu", "leaky_relu", "neg"}
"""f(s·x) = s·f(x) for s > 0."""
NORMS = {"layer_norm", "rms_norm"}
ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class State:
    """What is known of one tensor on the way."""

    index: Any
    """int64 of the tensor's shape, or a tuple of such for ops with several results."""
    pure: bool = True
    """Only moved since the source."""
    plain: bool = True
    """Only moved, and mixed by attention."""
    head: int = 0
    """Size of the heads of the attention on the way, 0 without."""
    offset: float = 0.0
    """What is added to the source itself (Gemma's 1 + weight)."""


@dataclass
class Walk:
    """Everything that the values of a source reach."""

    products: Mapping[Node, Use]
    vector: bool
    """The source is a parameter that multiplies, not a product."""
    states: dict[Node, State] = field(default_factory=dict)
    reads: list[tuple[Use, State]] = field(default_factory=list)
    """Products of `products` with the values as their x."""
    blocked: list[tuple[str, Any]] = field(default_factory=list)
    """Readers that no factor passes, and the index that they see."""
    bias: Any = None
    """The bias of the norm that the source is the weight of."""


def follow(source: Node, index: Tensor, products: Mapping[Node, Use]) -> Walk:
    """Walk every reader of `source`; `index` has its shape."""
    walk = Walk(products, source not in products, {source: State(index)})
    pending = [source]
    while pending:
        node = pending.pop()
        state = walk.states[node]
        for user in node.users:
            name = op_name(user)
            if name in IGNORED or (name in LIKE and user.args[0] is not node):
                continue
            if user in walk.states:
                walk.blocked.append((f"{name} of it with itself", state.index))
                continue
            new = _through(walk, node, state, user)
            if isinstance(new, State):
                walk.states[user] = new
                pending.append(user)
            elif new:
                walk.blocked.append((new, state.index))
    return walk


def _through(walk: Walk, node: Node, state: State, user: Node) -> State | str:
    """The state after `user`, "" where the walk ends well, or why it is blocked."""
    name = op_name(user)
    if user.op == "output":
        return "the graph's output"
    if "out" in user.kwargs or sum(a is node for a in user.args) > 1:
        return name
    if user in walk.products:
        use = walk.products[user]
        if operands(use)[0] is node and sum(a is node for a in user.all_input_nodes) == 1:
            walk.reads.append((use, state))
            return ""
        return name
    try:
        return _op(walk, node, state, user, name)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"{name} ({str(error).splitlines()[0][:80]})"


def _op(walk: Walk, node: Node, state: State, user: Node, name: str) -> State | str:
    first = bool(user.args) and user.args[0] is node
    if name in CASTS and first:
        return state
    if name in MOVES and first:
        return replace(state, index=run_on(user, node, state.index))
    if not isinstance(state.index, Tensor):
        return name
    if name == "dropout" and first:
        return replace(state, pure=False)
    if name in SCALES and (first or name == "mul"):
        return replace(state, index=_wide(state.index, user), pure=False, plain=False)
    if name in POSITIVE and first and not _in_place(user):
        return replace(state, pure=False, plain=False)
    if name == "add" and state.pure and walk.vector:
        return _offset(node, state, user)
    if name in NORMS and argument(user, 2, "weight") is node:
        walk.bias = argument(user, 3, "bias") if name == "layer_norm" else None
        return replace(state, index=_wide(state.index, user), pure=False, plain=False)
    if name == ATTENTION and argument(user, 2, "value") is node:
        return _attention(state, user)
    if name in ("matmul", "bmm") and argument(user, 1, "other") is node:
        return _mixed(state, user)
    return name


def _in_place(node: Node) -> bool:
    return bool(node.kwargs.get("inplace")) or True in node.args[1:]


def _offset(node: Node, state: State, user: Node) -> State | str:
    """A number added to the source itself."""
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, (int, float)) or user.kwargs.get("alpha", 1) != 1:
        return "add"
    return replace(state, offset=state.offset + float(other))


def run_on(user: Node, node: Node, index: Any) -> Any:
    """The index after an op that moves values: the op itself, on the index."""

    def stand_in(n: Node) -> Any:
        known = index if n is node else value(n)
        if n is not node and not isinstance(known, int):
            raise ValueError(f"{n.name} is not a known size")
        return known

    args, kwargs = map_arg(user.args, stand_in), map_arg(user.kwargs, stand_in)
    if user.op == "call_method":
        return getattr(args[0], str(user.target))(*args[1:], **kwargs)
    return user.target(*args, **kwargs)  # type: ignore[operator]


def _wide(index: Tensor, user: Node) -> Tensor:
    return index.broadcast_to(tuple(value(user).shape))


def _attention(state: State, user: Node) -> State | str:
    """Values (B, H, T, d), the same for every T: attention mixes T with weights of its own."""
    index = state.index
    if user.kwargs.get("enable_gqa"):
        index = index.repeat_interleave(value(user).shape[-3] // index.shape[-3], -3)
    return _mixed(replace(state, index=index), user)


def _mixed(state: State, user: Node) -> State | str:
    row = state.index[..., :1, :]
    if not bool((state.index == row).all()):
        return f"{op_name(user)} that mixes channels"
    return replace(state, index=_wide(row, user), pure=False, head=int(row.shape[-1]))


def rows(use: Use, index: Tensor) -> tuple[int, ...] | None:
    """The source's entry behind each of the K channels of a product's x, None when they differ
    between rows of x.
    """
    if use.kind == "conv1x1":
        index = index.movedim(1, -1)
    flat = index.reshape(-1, index.shape[-1])
    return tuple(flat[0].tolist()) if bool((flat == flat[0]).all()) else None


def entries(index: Any) -> set[int]:
    """All entries of the source in an index."""
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return {i for part in parts for i in torch.unique(part).tolist()}
